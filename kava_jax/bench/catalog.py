"""Every benchmark by its name, and what of it fits on a screen."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kava_jax.bench.harness import Facts
from kava_jax.errors import KavaError
from kava_jax.journal.manifest import versions

# The modules of this package, and which of their ``bench_NAME`` there are.
MODULES = {"step": "train_step", "loss": "loss", "ce": "loss", "teacher": "teacher"}
MODULES |= {"decode": "decode", "remat": "train_step", "scaling": "train_step"}
MODULES |= {"input": "waiting", "startup": "waiting", "gpu": "gpu", "handoff": "handing"}


def run_benchmark(name: str, config: Path | None, overrides: list[str], peer: str | None) -> Facts:
    """The named benchmark's result, with device and versions.

    Raises KavaError for an unknown name, and for what the benchmark does not take.
    """
    if name not in MODULES:
        raise KavaError(f"name={name!r} is not a benchmark; use {', '.join(MODULES)}")
    given: Facts = {}
    if name in ("step", "teacher", "gpu"):
        given["peer"] = peer
    elif peer is not None:
        raise KavaError(f"--peer={peer}: {name} has its own; only step, teacher and gpu are told")
    if name == "gpu":
        given |= {"config": config, "overrides": overrides}
    elif config is not None or overrides:
        raise KavaError(f"name={name}: its sizes are fixed; leave --config and overrides out")
    module = importlib.import_module(f"kava_jax.bench.{MODULES[name]}")
    found = getattr(module, f"bench_{name}")(**given)
    # Devices are looked at last: on a GPU that takes memory, which the sides have needed.
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"name": name, **found, "device": device, "versions": versions()}


def shown(found: Mapping[str, Any], case: str = "") -> dict[str, Any]:
    """Of every side: the median, as a multiple of ours, and what it does in a second."""
    rows = {}
    for side, own in found.get("seconds", {}).items():
        cells = [f"{own['median']:.4f} s", f"{found['times_ours'][side]:7.2f}"]
        cells += [
            f"{found[rate][side]:.3g} {what}/s"
            for what in ("tokens", "FLOPs", "bytes")
            if side in found.get(rate := f"{what.lower()}_per_second", {})
        ]
        rows[case + side] = "  ".join(cells)
    rows |= {case + side: f"failed: {words}" for side, words in found.get("failed", {}).items()}
    for name, own in found.get("cases", {}).items():
        rows |= shown(own, f"{name}/")
    for axis, curve in found.get("curves", {}).items():
        rows[axis] = f"exponent {curve['exponent']:+.2f}, floor {curve['floor_exponent']:+.2f}"
    return rows | {f"first step, {k}": s for k, s in found.get("first_step_seconds", {}).items()}
