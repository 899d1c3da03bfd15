"""A run directory opened again, with its calibration and checkpoints, or gone on with.

What changes when a run goes on under another config is refused, or said in words.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.config.file import dump_config, parse_config, without_teachers
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.journal.checkpoint import Checkpoints, abstract_state
from kava_jax.journal.manifest import (
    CALIBRATION_NAME,
    MANIFEST_NAME,
    config_diff,
    fields_of,
    read_manifest,
)
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import replicated
from kava_jax.runs.assembly import schedules
from kava_jax.runs.prepare import Run, find_tokenizer, prepare
from kava_jax.storage import Place, check_access, reachable
from kava_jax.training.step import TrainState

# Fields that may change between a run and its continuation without changing what was learnt.
# More steps are new ones; rates and weights that follow the length of a run are computed again.
FREE_FIELDS = (
    "run.dir",
    "train.steps",
    "train.attention",
    "train.log_every",
    "train.eval_every",
    "train.diagnose_every",
    "train.checkpoint_every",
    "train.max_to_keep",
    "train.max_consecutive_skips",
    "eval",
    "mesh",
)

# Where a run's models, tokenizer and rows lie. They may move, since the manifest's fingerprints
# tell whether they are the same.
PATH_FIELDS = (
    "teachers.*.path",
    "student.path",
    "student.cut.path",
    "student.tokenizer",
    "data.path",
    "data.subset",
    "data.split",
    "data.eval_path",
    "data.eval_split",
)


def reopen(run_dir: Place, overrides: Sequence[str] = ()) -> Run:
    """A run directory that ``train`` made, prepared again from the config it was started with.

    The attention kernel is chosen again: this may be another kind of machine.
    """
    config = config_of(run_dir, overrides)
    check_directories(config)
    return prepare(config, read_measured_maps(config))


def reopen_student(run_dir: Place, overrides: Sequence[str] = ()) -> Run:
    """A run directory opened for its student alone; the teachers need not be there.

    The result's blueprint has no teachers, its config is the run's own. Only a student whose
    tokenizer came with the first teacher, or that was cut from it, needs that one still.
    """
    config = config_of(run_dir, overrides)
    raw = without_teachers(config)
    needed = [f"teachers.{index}.path" for index in range(len(config.teachers))]
    student = config.student
    borrowed = bool(student.geometry and needed and student.tokenizer is None)
    cut_here = student.cut is not None and student.cut.path is None
    check_directories(config, besides=needed[borrowed or cut_here :])
    if borrowed:
        raw["student"]["tokenizer"] = find_tokenizer(config)[1]
    if cut_here:
        raw["student"]["cut"]["path"] = config.teachers[0].path
    return replace(prepare(parse_config(raw)), config=config)


def recorded_config(run_dir: Place, overrides: Sequence[str] = ()) -> Config:
    """The config that a run's manifest holds.

    Raises KavaError: there is no manifest of this version, or an override is wrong.
    """
    return parse_config(read_manifest(run_dir)["config"], overrides)


def config_of(run_dir: Place, overrides: Sequence[str]) -> Config:
    """The config that a run was started with, at the place where the run lies now."""
    check_access(run_dir, "run")
    # First, so that an override can still name a kernel.
    chosen = ["train.attention=auto", *overrides]
    config = recorded_config(run_dir, chosen)
    # The directory may have been moved, and the manifest has the place where it was.
    located = config.run.model_copy(update={"dir": str(run_dir)})
    return config.model_copy(update={"run": located})


def model_paths(config: Config) -> dict[str, str]:
    """Where the models and the tokenizer lie or come from, by field."""
    paths = {f"teachers.{index}.path": one.path for index, one in enumerate(config.teachers)}
    student = config.student
    paths |= {"student.path": student.path, "student.tokenizer": student.tokenizer}
    paths |= {"student.cut.path": student.cut.path} if student.cut else {}
    return {field: path for field, path in paths.items() if path is not None}


def directories_of(config: Config) -> list[str]:
    """Those of the ``model_paths`` that are directories, for the manifest."""
    return [path for field, path in model_paths(config).items() if reachable(path, field).is_dir()]


def gone(config: Config) -> dict[str, str]:
    """The ``model_paths`` that were directories when the run was made, and are not there now."""
    known = set()
    if (config.run.directory / MANIFEST_NAME).is_file():
        known.update(read_manifest(config.run.directory).get("directories", ()))
    return {
        field: path
        for field, path in model_paths(config).items()
        if path in known and not reachable(path, field).is_dir()
    }


def check_directories(config: Config, besides: Sequence[str] = ()) -> None:
    """Refuse a run whose model directories are gone; their names might be taken for hub ids.

    ``besides`` are fields that do not matter. Raises KavaError.
    """
    lost = [f"{field}={path!r}" for field, path in gone(config).items() if field not in besides]
    if lost:
        raise KavaError(
            f"{', '.join(lost)}: a directory when the run was made, and gone now; put it back, or "
            f"a link to where it is (kava train also takes {lost[0].partition('=')[0]}=DIR)"
        )


def calibration_path(run_dir: Place) -> Place:
    """Where a run keeps what its calibration found."""
    return run_dir / CALIBRATION_NAME / "calibration.json"


def read_calibration(run_dir: Place) -> dict[str, Any]:
    """What a run's calibration found, by teacher: ``layer_map`` and scores.

    Raises KavaError when there is none, or its file is not whole.
    """
    path = calibration_path(run_dir)
    try:
        teachers = json.loads(path.read_text(encoding="utf-8"))["teachers"]
        return {
            name: {"layer_map": found["layer_map"], **found} for name, found in teachers.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KavaError(
            f"calibration={str(path)!r} cannot be read ({type(error).__name__}); run `kava "
            f"calibrate` with the run's config.yaml"
        ) from None


def read_measured_maps(config: Config) -> dict[str, LayerMap]:
    """The layer maps in the run's calibration; none where the config asks for none.

    Raises KavaError when there is no calibration, or its file is not whole.
    """
    if not config.needs_calibration:
        return {}
    where, found = config.run.directory, read_calibration(config.run.directory)
    path = str(calibration_path(where))
    return {name: LayerMap.from_dict(own["layer_map"], path) for name, own in found.items()}


def restore(run: Run, checkpoint: str = "last") -> TrainState:
    """The state at ``last``, ``best`` or a step number.

    Raises KavaError when its weights are not finite.
    """
    with Checkpoints(run.directory, run.config.train.max_to_keep, read_only=True) as checkpoints:
        state = checkpoints.restore(checkpoints.choose(checkpoint), restore_target(run))
    check_finite(run, state.params, int(state.step))
    return state


def check_finite(run: Run, params: Params, step: int) -> None:
    """Raises KavaError with the restored weights that hold NaN or infinity."""
    # Judged where the weights lie: one flag for each tensor comes back, and no weights move.
    every = jax.jit(
        lambda params: jax.tree.map(lambda x: jnp.isfinite(x).all(), params),
        out_shardings=replicated(run.mesh),
    )(params)
    flat, _ = jax.tree.flatten_with_path(every)
    wrong = [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in flat if not x]
    if wrong:
        raise KavaError(
            f"checkpoint={step} of {run.directory} holds NaN or infinity in "
            f"{', '.join(wrong)}; use an earlier one, or train again"
        )


def restore_student(run: Run, checkpoint: str = "last") -> tuple[int, Params]:
    """The student at ``last``, ``best`` or a step number, and that number.

    Raises KavaError when its weights are not finite.
    """
    student = run.blueprint.student
    abstract = abstract_state(nnx.to_pure_dict(student.abstract), student.shardings)
    with Checkpoints(run.directory, run.config.train.max_to_keep, read_only=True) as checkpoints:
        step = checkpoints.choose(checkpoint)
        params = checkpoints.restore_params(step, "student", abstract)
    check_finite(run, {"student": params}, step)
    return step, params


def restore_target(run: Run) -> Any:
    """Shapes, dtypes and places of the run's state, for reading a checkpoint into."""
    return abstract_state(run.blueprint.abstract_state(), run.blueprint.state_shardings())


def check_steps(config: Config, done: int) -> None:
    """Raises KavaError when ``train.steps`` is less than the run has already done."""
    steps = config.train.steps
    if steps < done:
        raise KavaError(
            f"train.steps={steps} is less than the {done} steps that run.dir="
            f"{config.run.directory} has done; give {done} or more, or name another run.dir"
        )


def changes_in_words(
    earlier: Mapping[str, Any] | None, config: Config, state: TrainState
) -> list[str]:
    """One line for each path that moved, and one for a changed ``train.steps``.

    Args:
        earlier: the config that the run directory was last started with; None says nothing.
        config: the config of this start.
        state: what it goes on from.
    """
    if earlier is None:
        return []
    now = dump_config(config)
    paths = fields_of(now).keys() - fields_of(now, PATH_FIELDS).keys()
    moved = [
        f"{field} {change}: another place, the same content"
        for field, change in config_diff(earlier, now).items()
        if field in paths
    ]
    if earlier["train"]["steps"] == config.train.steps:
        return moved
    return [*moved, _rescheduled(parse_config(dict(earlier)), config, state)]


def _rescheduled(before: Config, now: Config, state: TrainState) -> str:
    """What ``train.steps`` does to the rates and weights of the next step."""
    step = int(state.step)
    # The optimizer counts the steps that it took; the weights go by all of them.
    taken = step - int(state.skips.total)
    old, new = schedules(before), schedules(now)
    changed = []
    for name, schedule in new.items():
        at = taken if name.startswith("lr_") else step
        # Compared as they are printed: a line of two equal numbers would say nothing.
        left, right = (f"{float(np.asarray(one(at))):.4g}" for one in (old[name], schedule))
        if left != right:
            changed.append(f"{name} {left} -> {right}")
    found = ", ".join(changed) or "all are as before"
    return (
        f"train.steps {before.train.steps} -> {now.train.steps}: rates and weights follow the "
        f"schedule of a run of {now.train.steps} steps from here; after step {step}: {found}"
    )
