"""What ``kava ablate`` has left so far: ``grid.json``, and one ``<arm>.json`` per arm with a run.

Left out on purpose: what the records mean (``comparison``), and the directories of the runs, which
need not be there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from kava_jax.errors import KavaError
from kava_jax.experiments.ablation import GRID_NAME, read_arm
from kava_jax.experiments.grid import Grid
from kava_jax.experiments.outcome import Outcome


class Arm(NamedTuple):
    """One arm: what it sets, and its finished runs by seed, in the grid's order of seeds."""

    name: str
    fields: dict[str, Any]
    runs: dict[int, Outcome]


class Results(NamedTuple):
    """What a grid's directory holds: arms that have a finished run, in the grid's order."""

    grid: Grid
    base: dict[str, Any]
    versions: dict[str, str]
    arms: dict[str, Arm]


def read_results(directory: Path) -> Results:
    """Read what ``kava ablate`` left so far.

    Raises:
        KavaError: there is no grid, a file is broken, or two runs with the same seed had other
            data (the arm is named).
    """
    content = _read_grid(directory / GRID_NAME)
    try:
        grid = Grid.model_validate(content["grid"])
    except ValidationError as error:
        raise KavaError(
            f"{directory / GRID_NAME} is no grid of this version ({error.error_count()} problems); "
            f"run `kava ablate` again"
        ) from None
    arms = {}
    for name, fields in grid.arms.items():
        found = read_arm(directory, name)
        runs = {seed: _outcome(found[seed], name) for seed in grid.seeds if seed in found}
        if runs:
            arms[name] = Arm(name, fields, runs)
    _check_data(arms)
    return Results(grid, content["base"], content["versions"], arms)


def _check_data(arms: Mapping[str, Arm]) -> None:
    """Runs with the same seed must have read the same rows."""
    first: dict[int, tuple[str, str]] = {}
    for name, arm in arms.items():
        for seed, run in arm.runs.items():
            known, data = first.setdefault(seed, (name, run.data))
            if data != run.data:
                raise KavaError(
                    f"arms.{name}: seed {seed} was run on other data than arms.{known}; remove its "
                    f"record and its runs, and run `kava ablate` again"
                )


def _outcome(record: Mapping[str, Any], arm: str) -> Outcome:
    try:
        return Outcome(**record)
    except TypeError:
        raise KavaError(
            f"arms.{arm}: {arm}.json holds runs of another version; run `kava ablate` again with "
            f"another --out"
        ) from None


def _read_grid(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in ("grid", "base", "versions")}
    except (FileNotFoundError, NotADirectoryError):
        raise KavaError(f"{path} is missing; name a directory made by `kava ablate`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KavaError(
            f"{path} cannot be read ({type(error).__name__}); restore it, or run `kava ablate` "
            f"again"
        ) from None
