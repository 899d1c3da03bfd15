"""The loop: batches in, checkpoints and metrics out. All decisions were made before it starts."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from kava_jax.data.batches import Batch, BatchStream, padded
from kava_jax.errors import PreemptedError
from kava_jax.models.decoder import Params
from kava_jax.parallel.hosts import from_first
from kava_jax.parallel.sharding import put_batch
from kava_jax.training.checkpoint import Checkpoints
from kava_jax.training.monitor import Monitor
from kava_jax.training.objective import Metrics
from kava_jax.training.preemption import Preemption
from kava_jax.training.probe import Probed, share_is_due
from kava_jax.training.profiling import Profile
from kava_jax.training.skips import SkipLog
from kava_jax.training.step import LossScale, TrainState
from kava_jax.training.summary import Figures, summarize, summarize_layers

Step = Callable[[TrainState, Mapping[str, Params], Batch], tuple[TrainState, Metrics]]
Probe = Callable[[TrainState, Mapping[str, Params], Batch], Probed]
Evaluate = Callable[[TrainState, int], Figures]


class Cadence(NamedTuple):
    """How long, and how often what happens, in steps; None is never."""

    steps: int
    log_every: int
    eval_every: int | None
    checkpoint_every: int
    diagnose_every: int | None = None
    share_every: int | None = None
    checkpoint_minutes: float | None = None
    most_skipped: int = 10


def run_steps(
    state: TrainState,
    *,
    step: Step,
    probe: Probe | None,
    teachers: Mapping[str, Params],
    stream: BatchStream,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    monitor: Monitor,
    mesh: Mesh,
    rates: Mapping[str, optax.Schedule],
    cadence: Cadence,
    preemption: Preemption,
    profile: Profile,
) -> tuple[TrainState, dict[str, float]]:
    """Train from ``state.step`` to ``cadence.steps``; returns the last state and evaluation.

    ``evaluate(state, step)`` is called before the first step of a fresh run, every ``eval_every``
    steps and at the end. A checkpoint is written every ``checkpoint_every`` steps, at the first
    logged step after ``checkpoint_minutes`` without one, at the end, and when the run is asked to
    end. ``probe`` (None without teachers) is called before a step, every ``diagnose_every`` and
    whenever a share is due.

    Raises:
        StoppedError: ``most_skipped`` steps in a row were not finite.
        PreemptedError: the run was asked to end before its last step; the state is saved.
    """
    start = int(state.step)
    evaluation = Figures({}, {})
    if start == 0:
        evaluation = evaluate(state, 0)
        monitor.evaluation(0, evaluation.values, evaluation.layers)
    clock, saved = _Clock(start), time.monotonic()
    skips = SkipLog(state.skips, most=cadence.most_skipped, stream=stream, monitor=monitor)
    for number in range(start, cadence.steps):
        batch = stream.batch(number, jax.process_index(), jax.process_count())
        measuring = share_is_due(number, cadence.share_every)
        if probe and (measuring or _due(number, cadence.diagnose_every)):
            whole = put_batch(padded(batch, stream.max_length), mesh)
            scale = _probed(probe, state, teachers, whole, monitor, clock)
            # Only then: how often one looks must not change what is learnt.
            state = state._replace(kv_scale=scale) if measuring else state
        clock.tokens += int(batch.valid.sum()) * jax.process_count()
        done = number + 1
        profile.before(done, state)
        state, metrics = step(state, teachers, put_batch(batch, mesh))
        profile.after(done, state)
        skips.add(done, metrics["skipped"])
        last, logged = done == cadence.steps, done % cadence.log_every == 0
        if last or logged:
            skips.settle()
            monitor.log(done, _line(metrics, rates, number) | clock.lap(done))
        measured = None
        if last or _due(done, cadence.eval_every):
            evaluation = evaluate(state, done)
            measured = evaluation.values
            monitor.evaluation(done, evaluation.values, evaluation.layers)
        asked = preemption.asked(done)
        late = logged and _overdue(saved, cadence.checkpoint_minutes)
        if last or asked or late or done % cadence.checkpoint_every == 0:
            skips.settle()
            checkpoints.save(state, measured)
            saved = time.monotonic()
        if last or asked:
            profile.stop()
        if asked and not last:
            checkpoints.wait()
            raise PreemptedError(f"saved at step {done}; the same command goes on from there")
        if measured is not None:
            clock.restart(done)
    if start >= cadence.steps:
        evaluation = evaluate(state, start)
    return state, evaluation.values


def _overdue(saved: float, minutes: float | None) -> bool:
    """Whether the last checkpoint is too old; the first process's clock counts for all."""
    return minutes is not None and bool(from_first(time.monotonic() - saved >= 60 * minutes))


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _probed(
    probe: Probe,
    state: TrainState,
    teachers: Mapping[str, Params],
    batch: Batch,
    monitor: Monitor,
    clock: "_Clock",
) -> LossScale:
    """The scale that the probe measured; what else it found goes to the monitor."""
    jax.block_until_ready(state)  # else the probe would be charged for steps still under way
    with clock.paused():
        found = probe(state, teachers, batch)
        gradients = {name: float(value) for name, value in found.gradients.items()}
        figures = summarize_layers(found.layers)
    step = int(state.step)
    values = gradients | figures.values | clock.cost_of_pauses(step)
    monitor.diagnostics(step, values, figures.layers)
    return found.kv_scale


def _line(metrics: Metrics, rates: Mapping[str, optax.Schedule], number: int) -> dict[str, float]:
    """One logged line: the metrics of this very step and the rates it was taken with."""
    values = summarize(metrics)
    # A skipped step is none to the optimizer, whose count the rates go by.
    taken = number - int(values["skipped"])
    return values | {f"lr_{group}": float(np.asarray(rate(taken))) for group, rate in rates.items()}


class _Clock:
    """Speed since the last logged line, evaluations and probes left out; only real tokens count."""

    def __init__(self, step: int):
        self._start = step
        self._laps: list[float] = []
        self._pauses: list[float] = []
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._time, self.tokens = step, time.perf_counter(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        started = time.perf_counter()
        yield
        self._pauses.append(time.perf_counter() - started)
        self._time += self._pauses[-1]

    def lap(self, step: int) -> dict[str, float]:
        seconds, tokens = time.perf_counter() - self._time, self.tokens
        steps = max(1, step - self._step)
        self._laps.append(seconds / steps)
        self.restart(step)
        return {"step_seconds": seconds / steps, "tokens_per_second": tokens / seconds}

    def cost_of_pauses(self, step: int) -> dict[str, float]:
        """Seconds of the last probe, and of all probes as a share of the steps' time.

        The share takes medians, so that compiling counts on neither side; it needs three of each.
        """
        cost = {"probe_seconds": self._pauses[-1]}
        if min(len(self._laps), len(self._pauses)) >= 3:
            probes = len(self._pauses) * statistics.median(self._pauses)
            steps = (step - self._start) * statistics.median(self._laps)
            cost["probe_share_of_time"] = probes / steps
        return cost


def projector_path(run_dir: Path) -> Path:
    """Where a finished run leaves its projector."""
    return run_dir / "projector.safetensors"
