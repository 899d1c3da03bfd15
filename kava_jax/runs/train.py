"""Run, or continue, a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.config.file import dump_config
from kava_jax.config.run import Config
from kava_jax.data.dataset import Dataset
from kava_jax.errors import PreemptedError
from kava_jax.hf.cut_record import write_cut_record
from kava_jax.hf.handoff_files import write_handoff_record
from kava_jax.journal.checkpoint import Checkpoints, newest_step
from kava_jax.journal.lock import alone
from kava_jax.journal.manifest import (
    Fingerprints,
    check_manifest,
    write_config,
    write_manifest,
    write_results,
)
from kava_jax.journal.monitor import Monitor
from kava_jax.parallel.hosts import from_first, on_host
from kava_jax.runs.ahead import compiled_ahead
from kava_jax.runs.assembly import magnitude_note
from kava_jax.runs.calibrate import calibrated, place, unmeasured
from kava_jax.runs.cutting import settled
from kava_jax.runs.evaluate import evaluation_notes, evaluator
from kava_jax.runs.handed import record_of
from kava_jax.runs.handoff_fit import fitted_handoff
from kava_jax.runs.idle import idle_settings
from kava_jax.runs.loop import due, run_steps
from kava_jax.runs.preemption import Preemption, listening
from kava_jax.runs.prepare import Run, fingerprints_of, load_dataset, prepare
from kava_jax.runs.profiling import Profile
from kava_jax.runs.record import facts, results
from kava_jax.runs.reopen import (
    check_directories,
    check_finite,
    directories_of,
    read_measured_maps,
    restore_target,
)
from kava_jax.runs.resume import FREE_FIELDS, PATH_FIELDS, changes_in_words, check_steps
from kava_jax.runs.student_export import check_exportable
from kava_jax.storage import check_target, local_file
from kava_jax.training.step import TrainState


@dataclass(frozen=True)
class Trained:
    """What is left when a run has ended."""

    run: Run
    dataset: Dataset
    state: TrainState
    evaluation: dict[str, float]


def train(
    config: Config, command: Sequence[str], profiled: tuple[int, int] | None = None
) -> Trained:
    """Run, or continue, the training that ``config`` describes.

    ``profiled`` are the first and the last step to trace. Everything that can be wrong with the
    input is found before anything is written.

    Raises KavaError too when another command writes to the run directory at this moment, and
    PreemptedError when the run was asked to end after its first step.
    """
    check_target(config.run.directory, "run.dir")
    check_directories(config)
    idle = idle_settings(config)
    with alone(config.run.directory, "run.dir") as unlocked, listening() as preemption:
        told = [unlocked, *idle] if unlocked else idle
        trained = _train(config, command, told, preemption, profiled)
        # Asked while the last things were being written: who trains on shall not go on either.
        if preemption.asked():
            raise PreemptedError(
                f"saved at step {config.train.steps}, the last; the same command finds it finished"
            )
    return trained


def _train(
    config: Config,
    command: Sequence[str],
    told: Sequence[str],
    preemption: Preemption,
    profiled: tuple[int, int] | None,
) -> Trained:
    """``train`` in a run directory that nobody else writes to; ``told`` are lines to begin with."""
    run = prepare(unmeasured(config))
    dataset = load_dataset(run)
    plain, fingerprints = dump_config(config), fingerprints_of(run, dataset)
    earlier = check_manifest(
        run.directory,
        config=plain,
        fingerprints=fingerprints,
        free=FREE_FIELDS,
        paths=PATH_FIELDS,
    )
    # One process decides, because on a shared disk others may not see the newest checkpoint yet.
    newest = from_first(newest_step(run.directory), "start of training")
    if newest < 0:
        check_exportable(run)
        run, start = begun(config, run, dataset, fingerprints)
    else:  # a fresh state next to the one that is read would take its room twice
        check_steps(config, newest)
        if config.needs_calibration:
            run = prepare(config, read_measured_maps(config))
        start = None
    teachers = run.blueprint.load_teachers()
    write = jax.process_index() == 0
    if write:
        # The manifest comes second, since it makes the directory a run: a lone config may be
        # replaced. Both come before the first checkpoint, which alone would belong to no run.
        write_config(run.directory, plain)
        write_manifest(
            run.directory,
            command=command,
            config=plain,
            fingerprints=fingerprints,
            today=run.encoder.today,
            directories=directories_of(config),
            facts=facts(run, dataset),
            hardware={
                "hosts": jax.process_count(),
                "devices": jax.device_count(),
                "device_kind": jax.devices()[0].device_kind,
            },
        )
        if config.loss.handoff:
            write_handoff_record(run.directory, record_of(run, fingerprints))
    share = config.loss.share
    with Checkpoints(run.directory, config.train.max_to_keep) as checkpoints:
        notes = [*told, *dataset.notes, *evaluation_notes(run, dataset), run.blueprint.attending]
        maps = [teacher.map_note for teacher in run.blueprint.teachers.values()]
        notes += filter(None, [*maps, run.blueprint.repeated, magnitude_note(config)])
        resumed = checkpoints.newest_intact(notes.append)
        if resumed is not None:
            notes.append(f"continuing from the checkpoint at step {resumed}")
            start = checkpoints.restore(resumed, restore_target(run))
            check_finite(run, start.params, int(start.step))
            notes += changes_in_words(earlier, config, start)
        assert start is not None  # what was there a moment ago is intact, or has been refused
        begins = int(start.step)
        with Monitor(
            run.directory,
            total_steps=config.train.steps,
            start_step=begins,
            write=write,
        ) as monitor:
            for note in notes:
                monitor.note(note)
            evaluated = begins < config.train.steps and not due(begins, config.train.eval_every)
            if not evaluated:
                # Only the first process has the lines. All know whether one is due, so all ask.
                evaluated = bool(from_first(monitor.has_evaluation(begins), "last evaluation"))
            step, measuring_step = run.blueprint.jitted_step(), None
            if share:
                measuring_step = run.blueprint.jitted_step(share.share)
            if config.data.batching == "bucketed":
                lengths = dataset.stream.lengths(begins, config.train.steps)
                shapes = (start, teachers, config.data.batch_size)
                step = compiled_ahead(step, *shapes, lengths, monitor.note)
                if measuring_step and lengths:
                    longest = [dataset.stream.max_length]
                    measuring_step = compiled_ahead(measuring_step, *shapes, longest)
            state, evaluation = run_steps(
                start,
                step=step,
                measuring_step=measuring_step,
                probe=run.blueprint.jitted_probe() if config.teachers else None,
                teachers=teachers,
                stream=dataset.stream,
                evaluate=evaluator(run, dataset, teachers, preemption.check),
                checkpoints=checkpoints,
                monitor=monitor,
                mesh=run.mesh,
                rates=run.blueprint.rates,
                settings=config.train,
                share_every=share.every if share else None,
                preemption=preemption,
                profile=Profile(run.directory, profiled),
                evaluated=evaluated,
            )
    if run.blueprint.projector:
        _save_projector(run, state)
    if write:
        # Last of all: a manifest with results is one of a run that has ended.
        write_results(run.directory, results(evaluation))
    return Trained(run, dataset, state, evaluation)


def begun(
    config: Config, run: Run, dataset: Dataset, fingerprints: Fingerprints
) -> tuple[Run, TrainState]:
    """The run as it is trained and its state at step 0, after what it may need measured.

    ``run`` is that of the ``unmeasured`` config, with its data set and fingerprints.
    """
    if config.student.cut:
        cut, _ = settled(config, str(fingerprints.student), dataset.stream.rows)
        if jax.process_index() == 0:
            write_cut_record(config.run.directory, cut)
        run = prepare(unmeasured(config), cut=cut)
    measured = calibrated(config, run, dataset, fingerprints)
    run = prepare(config, measured.maps, run.blueprint.student_cut) if measured else run
    fitted = measured.projector if measured else None
    projector = None if fitted is None else place(run, fitted)
    return run, run.blueprint.fresh_state(projector, fitted_handoff(run, dataset))


def _save_projector(run: Run, state: TrainState) -> None:
    projector = run.blueprint.projector
    assert projector is not None
    # All processes take part, since each may hold only a part; one of them writes.
    params = jax.tree.map(partial(on_host, place="projector"), state.params["projector"])
    if jax.process_index() == 0:
        module: KVDimensionProjector = nnx.merge(projector.graph, params)
        with local_file(run.directory / "projector.safetensors") as path:
            module.save(path)
