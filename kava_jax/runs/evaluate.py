"""What a student can do on held-out rows: loss, alignment, and answers."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np

from kava_jax.data.batches import Batch, eval_batches
from kava_jax.data.dataset import HeldOut, bucket_of
from kava_jax.data.tokenizer import pad_id
from kava_jax.evaluation.exact_match import ExactMatch, Generate, exact_match
from kava_jax.evaluation.heldout import held_out, make_examine, make_measure
from kava_jax.hf.load import read_json
from kava_jax.models.decoder import Params
from kava_jax.models.generate import generate
from kava_jax.parallel.sharding import put_batch
from kava_jax.runs.prepare import Run
from kava_jax.training.objective import Statistics
from kava_jax.training.step import TrainState
from kava_jax.training.summary import Figures


def answer(run: Run, held: HeldOut, student: Params) -> ExactMatch:
    """The student's greedy answers to held-out questions, scored."""
    settings = run.config.eval
    return exact_match(
        _generate(run, student),
        run.encoder,
        held.examples,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )


def evaluate(
    run: Run,
    held: HeldOut,
    params: Mapping[str, Params],
    teachers: Mapping[str, Params],
    statistics: Statistics | None = None,
) -> dict[str, float]:
    """Held-out loss, alignment with the run's teachers, and exact match.

    ``statistics`` are a train state's; those of no step yet when absent.
    """
    objective = run.blueprint.objective
    batches = _held_out_batches(run, held)
    found = held_out(
        make_measure(objective, run.mesh),
        make_examine(objective, run.mesh),
        params,
        teachers,
        run.blueprint.empty_statistics() if statistics is None else statistics,
        batches,
    )
    return found.values | (_scores(run, held, params["student"]) if held.has_answers else {})


def evaluator(
    run: Run, held: HeldOut, teachers: Mapping[str, Params]
) -> Callable[[TrainState, int], Figures]:
    """What the loop is handed; answers are generated at the end only, being slow."""
    objective = run.blueprint.objective
    measure, examine = make_measure(objective, run.mesh), make_examine(objective, run.mesh)
    batches = _held_out_batches(run, held)
    answers = run.config.eval.exact_match and held.has_answers

    def evaluate_at(state: TrainState, step: int) -> Figures:
        found = held_out(measure, examine, state.params, teachers, state.statistics, batches)
        if answers and step == run.config.train.steps:
            scores = _scores(run, held, state.params["student"])
            found = found._replace(values=found.values | scores)
        return found

    return evaluate_at


def _scores(run: Run, held: HeldOut, student: Params) -> dict[str, float]:
    """Exact match by the names that ``metrics.jsonl`` uses."""
    answers = answer(run, held, student)
    return {
        "exact_match_strict": answers.strict,
        "exact_match_flexible": answers.flexible,
        "exact_match_stderr": answers.strict_error,
        "exact_match_rows": answers.rows,
    }


def _generate(run: Run, student: Params) -> Generate:
    """Greedy continuation that ends at the tokenizer's eos or those of the model's own config."""
    ends = {int(run.tokenizer.eos_token_id)}  # pyright: ignore[reportArgumentType]  (Encoder demands an eos)
    source = run.blueprint.student_dir
    if source is not None and (source / "generation_config.json").is_file():
        listed = read_json(source / "generation_config.json").get("eos_token_id", [])
        ends |= set(listed if isinstance(listed, list) else [listed])

    def continued(prompt_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
        new_BM = generate(
            run.blueprint.student.graph,
            student,
            prompt_BT,
            valid_BT,
            max_new_tokens=run.config.eval.max_new_tokens,
            eos_ids=tuple(sorted(ends)),
            pad_id=pad_id(run.tokenizer),
        )
        return np.asarray(new_BM)

    return continued


def _held_out_batches(run: Run, held: HeldOut) -> list[Callable[[], Batch]]:
    """What puts each batch on the devices, when it is its turn."""
    batches = eval_batches(
        held.rows,
        run.config.data.batch_size,
        max_length=run.config.data.max_length,
        bucket=bucket_of(run.config.data.max_length),
        pad_id=pad_id(run.tokenizer),
        sink_tokens=run.config.loss.sink_tokens,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return [partial(put_batch, batch, run.mesh) for batch in batches]
