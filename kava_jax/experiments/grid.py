"""The file of an experiment grid: arms times seeds over one base config.

    name: scratch
    config: demo.yaml              # next to this file, or one that ships with the package
    set: {train.steps: 800}        # dotted fields of every run
    pretrain: {train.steps: 2000}  # optional: a student made first by cross-entropy, once per seed
    seeds: [0, 1, 2]
    score: exact_match_strict      # or eval_loss
    baseline: ce
    contrast: kv                   # the one comparison with the baseline that was declared before
    against: {kv: [kl, long]}      # arms that are compared with others than the baseline, too
    arms:
      ce: {loss.kv_weight: 0, teachers: []}
      kv: {loss.kv: mercator}
      long: {teachers: [], train.steps: 1512}  # takes as long as kv, whose step costs 1.89 times

Two arms with the same seed differ in nothing but their own fields: data, their order and the
student's start are the same. ``ablation`` runs the grid.
"""

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from kava_jax.config.file import parse_config, read_override, read_yaml, shipped_config
from kava_jax.config.run import Config
from kava_jax.config.weights import Section
from kava_jax.errors import KavaError
from kava_jax.storage import written_out

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
Fields = dict[str, Any]
# The start of all arms is no arm.
PRETRAINED = "pretrain"
# What two arms must share, or they are no comparison.
SHARED = ("run.seed", "run.dir", "data", "student.path", "student.geometry")


class Grid(Section):
    """A grid as its file says it; see the module's example."""

    name: Name
    config: str
    set: Fields = Field(default={})
    pretrain: Fields | None = None
    seeds: tuple[int, ...] = Field(min_length=1)
    score: Literal["exact_match_strict", "eval_loss"] = "exact_match_strict"
    baseline: Name
    contrast: Name | None = None
    against: dict[Name, Name | tuple[Name, ...]] = Field(default={})
    arms: dict[Name, Fields] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> "Grid":
        named = [("baseline", self.baseline), ("contrast", self.contrast)]
        named += [("against", arm) for pair in self.pairs for arm in pair]
        for field, arm in named:
            if arm is not None and arm not in self.arms:
                raise ValueError(f"{field}={arm} is not an arm; use one of {', '.join(self.arms)}")
        for arm, other in self.pairs:
            if arm in (other, self.baseline):
                raise ValueError(f"against={arm}: {other} says nothing; name another arm")
        if PRETRAINED in self.arms:
            raise ValueError(f"an arm cannot be called {PRETRAINED}; give it another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} repeat; give different ones")
        for arm, fields in self.arms.items():
            # With a dot at both ends ``data`` covers ``data.rows``, and not what only begins alike.
            if shared := [
                key for key in fields if f"{key}.".startswith(tuple(f"{s}." for s in SHARED))
            ]:
                raise ValueError(
                    f"arms.{arm} sets {', '.join(shared)}, which all arms of a comparison share; "
                    f"put it under set"
                )
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What ``against`` asks for: an arm, and the other one that it is compared with."""
        listed = {arm: (o,) if isinstance(o, str) else o for arm, o in self.against.items()}
        return [(arm, other) for arm, others in listed.items() for other in others]

    @property
    def higher_is_better(self) -> bool:
        """Of the score."""
        return self.score != "eval_loss"


def load_grid(path: Path, overrides: Iterable[str] = ()) -> tuple[Grid, dict[str, Any]]:
    """The grid, and its base config as its file gives it.

    ``overrides`` (``section.field=value``) are put under ``set``. Raises KavaError: file or base
    config missing or broken, or an arm that is no valid run (the arm is named).
    """
    path = Path(written_out(str(path)))
    raw = read_yaml(path)
    # Anything but a mapping is left to the validation, which names the field.
    if isinstance(raw.get("set", {}), dict):
        raw["set"] = raw.get("set", {}) | dict(map(read_override, overrides))
    try:
        grid = Grid.model_validate(raw)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'grid'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise KavaError(f"grid={str(path)!r}: {'; '.join(problems)}") from None
    near = path.parent / written_out(grid.config)
    base = read_yaml(near if near.is_file() else shipped_config(grid.config))
    # All arms are parsed now: a typing error would show only after the runs of other arms.
    for arm in (*grid.arms, *([] if grid.pretrain is None else [PRETRAINED])):
        run_config(grid, base, arm, grid.seeds[0], Path("runs"))
    return grid, base


def run_directory(out: Path, arm: str, seed: int) -> Path:
    """Where a run of the grid in ``out`` lives."""
    return out / "runs" / arm / f"seed{seed}"


def exported(out: Path, seed: int) -> Path:
    """Where the pretrained student of a seed lies."""
    return run_directory(out, PRETRAINED, seed) / "export"


def run_config(grid: Grid, base: Mapping[str, Any], arm: str, seed: int, out: Path) -> Config:
    """The config of one run; ``arm`` may be ``pretrain``."""
    raw = deepcopy(dict(base))
    own = {"run.name": f"{grid.name}-{arm}", "run.seed": seed}
    fields = grid.set | (grid.pretrain or {} if arm == PRETRAINED else grid.arms[arm])
    if arm == PRETRAINED:
        own |= {"teachers": []}
    elif grid.pretrain is not None:
        # A geometry excludes a path; the rest of the section is every arm's.
        kept = {name: value for name, value in raw["student"].items() if name != "geometry"}
        raw["student"] = kept | {"path": str(exported(out, seed))}
    own |= {"run.dir": str(run_directory(out, arm, seed))}
    # Overrides are read as YAML, of which JSON is a part: quoted text stays text.
    overrides = [f"{key}={json.dumps(value)}" for key, value in (fields | own).items()]
    try:
        return parse_config(raw, overrides)
    except KavaError as error:
        raise KavaError(f"arms.{arm}: {error}") from None
