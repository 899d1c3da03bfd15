"""The same held-out questions answered by the student before and after its run, and by teachers.

Models are loaded one after the other and whole (a teacher with its head), on demand: training needs
none of this.
"""

from collections.abc import Iterator
from typing import NamedTuple

from kava_jax.config.file import parse_config, without_teachers
from kava_jax.data.dataset import HeldOut
from kava_jax.errors import KavaError
from kava_jax.evaluation.exact_match import ExactMatch
from kava_jax.runs.evaluate import answer
from kava_jax.runs.prepare import Run, load_dataset, prepare
from kava_jax.runs.reopen import reopen, restore
from kava_jax.storage import Place


class Answered(NamedTuple):
    """Who answered, and the answers with their questions."""

    by: str
    answers: ExactMatch


def answer_all(run_dir: Place, count: int) -> list[Answered]:
    """The first ``count`` held-out questions of a finished run, answered by everyone.

    Raises:
        KavaError: ``count`` is not positive, the run's data are no questions with answers, or a
            model is not there.
    """
    if count < 1:
        raise KavaError(f"samples={count} is not positive; use 1 or more")
    run = reopen(run_dir, [f"eval.batch_size={count}"])
    held = load_dataset(run).held_out
    if not held.answered:
        raise KavaError(
            f"samples={count}: the rows of data.path={run.config.data.path} are no questions with "
            f"answers; leave --samples out"
        )
    # Only answers are wanted, so nothing has to be encoded.
    few = HeldOut([], held.answered[:count])
    return list(_everyone(run, few))


def _everyone(run: Run, held: HeldOut) -> Iterator[Answered]:
    yield Answered("student before", answer(run, held, run.blueprint.student_start()))
    yield Answered("student after", answer(run, held, restore(run).params["student"]))
    for teacher in run.config.teachers:
        own = {"student": {"path": teacher.path}, "recipe": "anchored"}
        alone = prepare(parse_config(without_teachers(run.config) | own))
        yield Answered(teacher.name, answer(alone, held, alone.blueprint.load_student()))
