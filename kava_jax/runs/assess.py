"""What finished models can do: ``kava eval``, and who answers what in ``kava report --samples``.

A run is evaluated with its alignment, a directory or a hub id without. Models are loaded one after
the other and whole (a teacher with its head), on demand: training needs none of this.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from kava_jax.config.file import parse_config
from kava_jax.data.dataset import HeldOut
from kava_jax.errors import KavaError, StoppedError
from kava_jax.evaluation.exact_match import ExactMatch
from kava_jax.journal.manifest import MANIFEST_NAME, OLD_MANIFEST_NAME
from kava_jax.runs.evaluate import answer, answer_notes, choice_note, evaluate
from kava_jax.runs.handed import assess_handed
from kava_jax.runs.prepare import Run, data_loader, load_dataset, prepare, prepare_alone
from kava_jax.runs.reopen import config_of, gone, reopen, reopen_student, restore, restore_student
from kava_jax.storage import Place, check_access, place


def assess(
    model: str,
    data: str,
    *,
    checkpoint: str,
    rows: int | None,
    handoff: bool = False,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Held-out figures of a run directory, a Hugging Face directory or a hub id on ``data``.

    ``overrides`` change fields of ``data`` and ``eval`` (format, field names, split, new tokens).
    A run whose teachers are gone is evaluated without alignment. With ``handoff`` a run's teachers
    are evaluated too, and answers from handed-over caches; every answer is timed.
    ``say`` is told what is not measured or not scored. ``eval_rows`` are those measured.
    The built-in generator is asked for its test split unless ``data.eval_split`` says otherwise.

    Raises StoppedError for a loss that is not finite: the weights were, as they were looked at.
    """
    for override in overrides:
        # Any other field would describe another model than the one whose weights are read.
        if not override.startswith(("data.", "eval.")):
            raise KavaError(f"override={override!r}: kava eval takes data.* and eval.* fields only")
    directory = place(model, "model")
    check_access(directory, "model")
    of_run = any((directory / name).is_file() for name in (MANIFEST_NAME, OLD_MANIFEST_NAME))
    lost = gone(config_of(directory, overrides)) if of_run and not handoff else {}
    if of_run:
        run = reopen_student(directory, overrides) if lost else reopen(directory, overrides)
    else:
        run = _of_model(model, data, overrides, checkpoint, handoff)
    settings = run.config.data
    split = settings.eval_split or ("test" if data.startswith("builtin:") else settings.split)
    held = HeldOut.of(data_loader(run)(data, split=split, rows=rows), run.encoder)
    teachers, statistics = {}, None
    if of_run and not lost:
        state = restore(run, checkpoint)
        params, statistics = state.params, state.statistics
        teachers = run.blueprint.load_teachers()
    else:
        student = restore_student(run, checkpoint)[1] if of_run else run.blueprint.load_student()
        params = {"student": student, "projector": {}}
    chosen = choice_note(run.config) if checkpoint == "best" else None
    notes = [f"{data}: {held.sentence}", *answer_notes(run.config, data, held)]
    notes += [chosen] if chosen else []
    for field, path in lost.items():
        notes.append(f"{field}={path!r} is gone: alignment with the teachers is not measured")
    for note in notes:
        say(note)
    # First, since it refuses runs that hand nothing over.
    handed = assess_handed(run, held, params, teachers) if handoff else {}
    found = evaluate(run, held, params, teachers, statistics, answers=not handoff) | handed
    if not math.isfinite(found["eval_loss"]):
        raise StoppedError(
            f"eval_loss={found['eval_loss']}: the weights are finite, and what is computed with "
            f"them overflows; use another checkpoint"
        )
    none = [name for name, value in found.items() if not math.isfinite(value)]
    if none:
        say(f"not measurable on these rows: {', '.join(none)}")
    return {"eval_rows": len(held.measured)} | found


def _of_model(
    model: str, data: str, overrides: Sequence[str], checkpoint: str, handoff: bool
) -> Run:
    """A directory or a hub id as the student of a run without teachers."""
    if handoff:
        raise KavaError(f"handoff: {model!r} is not a run directory; give one, or leave it out")
    if checkpoint != "last":
        raise KavaError(
            f"checkpoint={checkpoint!r}: {model!r} is not a run directory; leave it out"
        )
    fields = {
        # Otherwise it would be runs/run, and a run there would give its date to chat templates.
        "run": {"dir": model},
        "student": {"path": model},
        "data": {"path": data, "batch_size": 32},
    }
    return prepare(parse_config(fields, overrides))


def answer_all(run_dir: Place, count: int) -> dict[str, ExactMatch]:
    """The first ``count`` held-out questions of a finished run, answered by everyone.

    They are the student before and after the run, and each teacher by its name.

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
    answers = {"student before": answer(run, few, run.blueprint.student_start())}
    answers["student after"] = answer(run, few, restore(run).params["student"])
    for teacher in run.config.teachers:
        alone = prepare_alone(run.config, teacher.path)
        answers[teacher.name] = answer(alone, few, alone.blueprint.load_student())
    return answers
