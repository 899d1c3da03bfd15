"""What a student can do on held-out rows: loss, alignment, and answers."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from kava_jax.cache import KVCache
from kava_jax.config.run import MAIN_SET, Config
from kava_jax.data.batches import Batch, eval_batches
from kava_jax.data.dataset import Dataset, HeldOut
from kava_jax.data.text import Encoded
from kava_jax.data.tokenizer import pad_id
from kava_jax.errors import KavaError
from kava_jax.evaluation.answers import can_be_met, gold_answer
from kava_jax.evaluation.exact_match import ExactMatch, Generate, Sample, exact_match
from kava_jax.evaluation.heldout import make_held_out
from kava_jax.journal.manifest import write_atomically
from kava_jax.models.decoder import Params
from kava_jax.models.generate import generate
from kava_jax.parallel.hosts import on_host
from kava_jax.parallel.sharding import put_batch, spread_rows
from kava_jax.runs.prepare import Run
from kava_jax.storage import Place
from kava_jax.training.objective import Statistics
from kava_jax.training.step import TrainState
from kava_jax.training.summary import Figures

ANSWERS_NAME = "answers.jsonl"


def _go_on() -> None:
    """The check of an evaluation that nobody cuts short."""


def answer(
    run: Run, held: HeldOut, student: Params, check: Callable[[], None] = _go_on
) -> ExactMatch:
    """The student's greedy answers to held-out questions, scored.

    ``check`` is called before every batch and may raise.
    """
    return scored(run, held, continuation(run, student, check))


def scored(run: Run, held: HeldOut, generate: Generate) -> ExactMatch:
    """The answers to held-out questions that ``generate`` gives, scored."""
    settings = run.config.eval
    return exact_match(
        generate,
        run.encoder,
        held.answered,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )


def evaluate(
    run: Run,
    held: HeldOut,
    params: Mapping[str, Params],
    teachers: Mapping[str, Params],
    statistics: Statistics | None = None,
    *,
    answers: bool = True,
) -> dict[str, float]:
    """Held-out loss, alignment with the run's teachers, and (with ``answers``) exact match.

    ``statistics`` are a train state's; those of no step yet when absent.
    """
    held_out = make_held_out(run.blueprint.objective, run.mesh)
    known = run.blueprint.empty_statistics() if statistics is None else statistics
    found = held_out(params, teachers, known, held_out_batches(run, held.rows)).values
    if not (answers and run.config.eval.max_new_tokens and held.answered):
        return found
    return found | scores(answer(run, held, params["student"]))


def evaluator(
    run: Run,
    dataset: Dataset,
    teachers: Mapping[str, Params],
    check: Callable[[], None],
) -> Callable[[TrainState, int], Figures]:
    """What the loop is handed; ``check`` is called before every batch and may raise.

    Answers are slow to generate: at the end, and where ``eval.exact_match_every`` asks for them. At
    the end the further sets are measured as well, and all answers written to ``answers.jsonl``.
    """
    settings, held_out = run.config.eval, make_held_out(run.blueprint.objective, run.mesh)
    main = held_out_batches(run, dataset.held_out.rows, check)
    more = {name: held_out_batches(run, held.rows, check) for name, held in dataset.more.items()}
    sets = {MAIN_SET: dataset.held_out, **dataset.more}
    answered = [name for name, held in sets.items() if settings.max_new_tokens and held.answered]

    def evaluate_at(state: TrainState, step: int) -> Figures:
        last = step == run.config.train.steps
        known = (state.params, teachers, state.statistics)
        found = held_out(*known, main)
        values = dict(found.values)
        for name, batches in more.items() if last else ():
            figures = held_out(*known, batches, whole=False)
            values[f"{name}/eval_loss"] = figures.values["eval_loss"]
        every = settings.exact_match_every
        due = last or (every is not None and step > 0 and step % every == 0)
        answers = {}
        for name in answered if last else {MAIN_SET} & {*answered} if due else ():
            answers[name] = answer(run, sets[name], state.params["student"], check)
            prefix = "" if name == MAIN_SET else f"{name}/"
            values |= {f"{prefix}{key}": value for key, value in scores(answers[name]).items()}
        # All processes answer, since the model is spread over them; one of them writes.
        if last and answers and jax.process_index() == 0:
            write_answers(run.directory, answers)
        return found._replace(values=values)

    return evaluate_at


def evaluation_notes(run: Run, dataset: Dataset) -> list[str]:
    """What to say of a run's evaluations before it starts."""
    sets = {MAIN_SET: dataset.held_out, **dataset.more}
    notes = [note for name, held in sets.items() for note in answer_notes(run.config, name, held)]
    if run.config.eval.exact_match_every and not dataset.held_out.answered:
        notes.append("eval.exact_match_every does nothing: no held-out row can be scored")
    notes += _beyond_positions(run, sets)
    chosen = choice_note(run.config)
    return [*notes, chosen] if chosen and run.config.train.eval_every else notes


def _beyond_positions(run: Run, sets: Mapping[str, HeldOut]) -> list[str]:
    """What to say when answers may become longer than the student was made for."""
    if not run.config.eval.max_new_tokens:
        return []
    prompts = [row.prompt_length for held in sets.values() if held.answered for row in held.rows]
    longest = max(prompts, default=0) + run.config.eval.max_new_tokens
    positions = run.blueprint.student_spec.max_position_embeddings
    if not prompts or longest <= positions:
        return []
    return [
        f"warning: answers may reach {longest} tokens with their prompts, but the student was made "
        f"for max_position_embeddings={positions}; lower eval.max_new_tokens"
    ]


def choice_note(config: Config) -> str | None:
    """What to say when checkpoints are compared on rows that are called a test set."""
    data = config.data
    if data.eval_path is not None:
        place, name = f"data.eval_path={data.eval_path}", data.eval_path.rpartition("/")[2]
    elif data.eval_split is not None:
        place, name = f"data.eval_split={data.eval_split}", data.eval_split
    else:
        return None
    # As a word of its own: ``latest`` and ``contest`` name no test set.
    if "test" not in re.split(r"[^a-z]+", name.lower()):
        return None
    return (
        f"warning: `best` is the checkpoint with the lowest loss on {place}; figures of it on test "
        f"are no longer those of unseen rows. Hold out rows of the training data, and read the "
        f"test set once, at the end, under eval.sets"
    )


def answer_notes(config: Config, name: str, held: HeldOut) -> list[str]:
    """What to say before exact match on a set: rows that cannot be scored, or never be right."""
    asked = [row for row in held.examples if row.question]
    if not (config.eval.max_new_tokens and asked):
        return []
    notes, missing = [], len(asked) - len(held.answered)
    if missing:
        notes.append(
            f"exact match on {name}: {missing} of {len(asked)} answers have no `#### ` before "
            f"their number and are not scored"
        )
    never = [row.reply for row in held.answered if not can_be_met(row.reply)]
    if never:
        gold = gold_answer(never[0])
        notes.append(
            f"exact match on {name}: {len(never)} of {len(held.answered)} answers can never be met "
            f"by the strict rule, not even word for word (the first is {gold[:40]!r}); write one "
            f"bare number behind one `#### `"
        )
    return notes


def write_answers(directory: Place, answers: Mapping[str, ExactMatch]) -> None:
    """Every question with its answer, one JSON object a line, by set."""
    lines = [
        json.dumps({"set": name, **sample._asdict()})
        for name, found in answers.items()
        for sample in found.samples
    ]
    write_atomically(directory / ANSWERS_NAME, "\n".join(lines) + "\n")


def read_answers(directory: Place) -> dict[str, list[Sample]]:
    """What :func:`write_answers` wrote, by set; none where there is no such file.

    Raises KavaError when the file is not whole.
    """
    path = directory / ANSWERS_NAME
    if not path.is_file():
        return {}
    sets: dict[str, list[Sample]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            own = Sample(**{field: row[field] for field in Sample._fields})
            sets.setdefault(row["set"], []).append(own)
    except (ValueError, KeyError, TypeError) as error:
        raise KavaError(
            f"answers={str(path)!r} cannot be read ({type(error).__name__}); remove it, or let the "
            f"run evaluate again with `kava train`"
        ) from None
    return sets


def scores(answers: ExactMatch) -> dict[str, float]:
    """Exact match by the names that ``metrics.jsonl`` uses."""
    return {
        "exact_match_strict": answers.strict,
        "exact_match_flexible": answers.flexible,
        "exact_match_stderr": answers.strict_error,
        "exact_match_rows": answers.rows,
    }


def continuation(
    run: Run,
    student: Params,
    check: Callable[[], None] = _go_on,
    past: Callable[..., KVCache] | None = None,
) -> Generate:
    """Greedy continuation, by the run's own ends.

    ``past(prompt, valid, final lengths)`` is the cache of the prompt but for its last token.
    """

    def continued(prompt_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
        # All processes ask here, in step with each other (``Preemption.asked``).
        check()
        rows, most = len(prompt_BT), run.config.eval.max_new_tokens
        prompts = spread_rows(prompt_BT, run.mesh), spread_rows(valid_BT, run.mesh)
        new_BM = generate(
            # Not the graph of training batches: its attention kernels take no padding on the left.
            run.blueprint.student.graph,
            student,
            *prompts,
            max_new_tokens=most,
            eos_ids=run.end_ids,
            pad_id=pad_id(run.tokenizer),
            past=None if past is None else past(*prompts, prompts[1].sum(axis=1) + most),
        )
        return on_host(new_BM, "answers")[:rows]

    return continued


def batches_of(run: Run, rows: Sequence[Encoded]) -> list[Batch]:
    """Rows to measure, every batch of as many."""
    batches = eval_batches(
        rows,
        run.config.data.batch_size,
        max_length=run.config.data.max_length,
        bucket=run.config.data.length_bucket,
        pad_id=pad_id(run.tokenizer),
        sink_tokens=run.config.loss.sink_tokens,
    )
    return list(batches)


def held_out_batches(
    run: Run, rows: Sequence[Encoded], check: Callable[[], None] = _go_on
) -> list[Callable[[], Batch]]:
    """What puts each batch on the devices, when it is its turn; ``check`` is called before."""

    def placed(batch: Batch) -> Batch:
        check()
        return put_batch(batch, run.mesh)

    # Each goes to the devices when it is called for: a whole set may not fit next to the state.
    return [partial(placed, batch) for batch in batches_of(run, rows)]
