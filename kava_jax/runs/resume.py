"""What changes when a run goes on under another config: refused, or said in words."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.journal.manifest import config_diff, fields_of
from kava_jax.runs.assembly import schedules
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
