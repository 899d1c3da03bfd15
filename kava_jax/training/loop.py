"""The loop: batches in, checkpoints and metrics out. All decisions were made before it starts."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from kava_jax.data.batches import Batch, BatchStream
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import put_batch
from kava_jax.training.checkpoint import Checkpoints
from kava_jax.training.monitor import Monitor
from kava_jax.training.objective import Metrics
from kava_jax.training.step import TrainState
from kava_jax.training.summary import summarize

Step = Callable[[TrainState, Mapping[str, Params], Batch], tuple[TrainState, Metrics]]
Evaluate = Callable[[TrainState, int], dict[str, float]]


class Cadence(NamedTuple):
    """How long, and how often what happens, in steps."""

    steps: int
    log_every: int
    eval_every: int | None
    checkpoint_every: int


def run_steps(
    state: TrainState,
    *,
    step: Step,
    teachers: Mapping[str, Params],
    stream: BatchStream,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    monitor: Monitor,
    mesh: Mesh,
    rates: Mapping[str, optax.Schedule],
    cadence: Cadence,
) -> tuple[TrainState, dict[str, float]]:
    """Train from ``state.step`` to ``cadence.steps``; returns the last state and evaluation.

    ``evaluate(state, step)`` is called before the first step of a fresh run, every ``eval_every``
    steps and at the end. A checkpoint is written every ``checkpoint_every`` steps and at the end.
    """
    start = int(state.step)
    evaluation: dict[str, float] = {}
    if start == 0:
        evaluation = evaluate(state, 0)
        monitor.evaluation(0, evaluation)
    clock = _Clock(start)
    for number in range(start, cadence.steps):
        batch = stream.batch(number, jax.process_index(), jax.process_count())
        clock.tokens += int(batch.valid.sum()) * jax.process_count()
        state, metrics = step(state, teachers, put_batch(batch, mesh))
        done = number + 1
        last = done == cadence.steps
        if last or done % cadence.log_every == 0:
            monitor.log(done, _line(metrics, rates, number) | clock.lap(done))
        measured = None
        if last or (cadence.eval_every and done % cadence.eval_every == 0):
            measured = evaluation = evaluate(state, done)
            monitor.evaluation(done, evaluation)
        if last or done % cadence.checkpoint_every == 0:
            checkpoints.save(state, measured)
        if measured is not None:
            clock.restart(done)
    if start >= cadence.steps:
        evaluation = evaluate(state, start)
    return state, evaluation


def _line(metrics: Metrics, rates: Mapping[str, optax.Schedule], number: int) -> dict[str, float]:
    """One logged line: the metrics of this very step and the rates it was taken with."""
    return summarize(metrics) | {
        f"lr_{group}": float(np.asarray(rate(number))) for group, rate in rates.items()
    }


class _Clock:
    """Speed since the last logged line, evaluation left out; only real tokens count."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._time, self.tokens = step, time.perf_counter(), 0

    def lap(self, step: int) -> dict[str, float]:
        seconds, tokens = time.perf_counter() - self._time, self.tokens
        steps = max(1, step - self._step)
        self.restart(step)
        return {"step_seconds": seconds / steps, "tokens_per_second": tokens / seconds}


def projector_path(run_dir: Path) -> Path:
    """Where a finished run leaves its projector."""
    return run_dir / "projector.safetensors"
