"""The loop: batches in, checkpoints and metrics out. All decisions were made before it starts."""

from collections.abc import Callable, Mapping

import jax
import optax
from jax.sharding import Mesh

from kava_jax.config.run import TrainConfig
from kava_jax.data.batches import Batch, BatchStream, padded
from kava_jax.errors import PreemptedError
from kava_jax.journal.checkpoint import Checkpoints
from kava_jax.journal.lines import Clock, Lines
from kava_jax.journal.monitor import Monitor
from kava_jax.journal.skips import SkipLog
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import put_batch
from kava_jax.runs.preemption import AskedToEndError, Preemption
from kava_jax.runs.profiling import Profile
from kava_jax.training.objective import Metrics
from kava_jax.training.probe import Probed
from kava_jax.training.share import share_is_due
from kava_jax.training.step import TrainState
from kava_jax.training.summary import Figures, summarize_layers

Step = Callable[[TrainState, Mapping[str, Params], Batch], tuple[TrainState, Metrics]]
Probe = Callable[[TrainState, Mapping[str, Params], Batch], Probed]
Evaluate = Callable[[TrainState, int], Figures]


def run_steps(
    state: TrainState,
    *,
    step: Step,
    measuring_step: Step | None,
    probe: Probe | None,
    teachers: Mapping[str, Params],
    stream: BatchStream,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    monitor: Monitor,
    mesh: Mesh,
    rates: Mapping[str, optax.Schedule],
    settings: TrainConfig,
    share_every: int | None,
    preemption: Preemption,
    profile: Profile,
    evaluated: bool = True,
) -> tuple[TrainState, dict[str, float]]:
    """Train from ``state.step`` to ``settings.steps``; returns the last state and evaluation.

    ``evaluate(state, step)`` is called before the first step of a fresh run, every ``eval_every``
    steps and at the end; and before the first step of a resumed run where the evaluation due there
    was cut short (``evaluated`` is False). A checkpoint is written every ``checkpoint_every``
    steps, at the end, and when the run is asked to end. The last one is whole before the last
    evaluation begins, so that whatever fails from there on costs no step. ``probe`` (None without
    teachers) is called before a step, every ``diagnose_every``. ``measuring_step`` (None where the
    KV weight is no share) takes the steps at which a share is due, every ``share_every``.

    Raises:
        StoppedError: ``max_consecutive_skips`` steps in a row were not finite.
        PreemptedError: the run was asked to end before its last step; what was done is saved.
    """
    start = int(state.step)
    skips = SkipLog(
        state.skips,
        max_consecutive_skips=settings.max_consecutive_skips,
        stream=stream,
        monitor=monitor,
    )
    lines = Lines(start, monitor, skips, rates, settings.steps)
    upcoming: tuple[Batch, Batch] | None = None
    done = start

    def fetched(number: int) -> tuple[Batch, Batch]:
        """A step's batch on the host, and begun to be put on the devices."""
        rows = stream.batch(number)
        return rows, put_batch(rows, mesh)

    def whole(rows: Batch) -> Batch:
        """A batch at the greatest length: what is done rarely is compiled for one length only."""
        return put_batch(padded(rows, stream.max_length), mesh)

    evaluation, measured = Figures({}, {}), None
    try:
        if start == 0 or not evaluated:
            evaluation = _evaluated(evaluate, state, start, monitor)
        # A finished run needs its figures for the results, which are written after the loop; their
        # line has been written before.
        elif start >= settings.steps:
            evaluation = evaluate(state, start)
        if start > 0 and evaluation.values:
            # This checkpoint was written before its evaluation was whole.
            checkpoints.score(start, evaluation.values)
        lines.restart_clock(start)
        for number in range(start, settings.steps):
            rows, batch = upcoming or fetched(number)
            if probe and due(number, settings.diagnose_every):
                # Lines are in the order of the steps, and the probe's comes after this one.
                lines.settle()
                _probed(probe, state, teachers, whole(rows), monitor, lines.clock)
            taken = step
            if measuring_step and share_is_due(number, share_every):
                taken, batch = measuring_step, whole(rows)
            done = number + 1
            profile.before(done, state)
            state, metrics = taken(state, teachers, batch)
            if number == start:
                preemption.begin()  # now there is something to save
            last = done == settings.steps
            # Put on the devices while they are busy with this step.
            upcoming = None if last else fetched(done)
            profile.after(done, state)
            lines.step(done, metrics, int(rows.valid.sum()))
            if last or due(done, settings.log_every):
                lines.add(done, metrics)
            measured = None  # until this step's evaluation is whole
            if last:
                _settled(lines, skips, monitor, done)
                checkpoints.save(state, None)
                checkpoints.wait()
            if last or due(done, settings.eval_every):
                lines.settle()
                evaluation = _evaluated(evaluate, state, done, monitor)
                measured = evaluation.values
                lines.restart_clock(done)
            # Asked once a step whatever else is due, so that all processes ask equally often.
            asked = preemption.asked()
            if last:
                checkpoints.score(done, evaluation.values)
            # A run that is asked to end saves below, where it also waits for the write.
            elif due(done, settings.checkpoint_every) and not asked:
                _settled(lines, skips, monitor, done)
                checkpoints.save(state, measured)
            if asked and not last:
                raise AskedToEndError
    except AskedToEndError:
        _settled(lines, skips, monitor, done)
        if done > start:
            checkpoints.save(state, measured)
            checkpoints.wait()
        raise PreemptedError(_kept(start, done)) from None
    finally:
        profile.stop()
    return state, evaluation.values


def _evaluated(evaluate: Evaluate, state: TrainState, step: int, monitor: Monitor) -> Figures:
    evaluation = evaluate(state, step)
    monitor.evaluation(step, evaluation.values, evaluation.layers)
    return evaluation


def _kept(start: int, done: int) -> str:
    """What is left of a run that ends after step ``done`` and began after ``start``."""
    if done > start:
        return f"saved at step {done}; the same command goes on from there"
    if start > 0:
        return f"nothing done since the checkpoint at step {start}; the same command goes on there"
    return "asked to end before the first step, nothing to save; the same command starts over"


def _settled(lines: Lines, skips: SkipLog, monitor: Monitor, done: int) -> None:
    """Nothing up to step ``done`` is left unwritten, so that a checkpoint may follow."""
    lines.settle()
    skips.settle(done)
    # A resumed run writes only what comes after its checkpoint, so no earlier line may be missing.
    monitor.publish()


def due(number: int, every: int | None) -> bool:
    """Whether a step is one of those at which something is done; None is never."""
    return every is not None and number % every == 0


def _probed(
    probe: Probe,
    state: TrainState,
    teachers: Mapping[str, Params],
    batch: Batch,
    monitor: Monitor,
    clock: Clock,
) -> None:
    """What the probe found goes to the monitor."""
    jax.block_until_ready(state)  # else the probe would be charged for steps still under way
    with clock.paused():
        found = probe(state, teachers, batch)
        gradients = {name: float(value) for name, value in found.gradients.items()}
        figures = summarize_layers(found.layers)
    step = int(state.step)
    values = gradients | figures.values | clock.cost_of_pauses(step)
    monitor.diagnostics(step, values, figures.layers)
