"""Measuring so that the figure can be believed.

Compiled and warmed up first; what is compared runs in alternating rounds, so that a slow moment of
the machine falls on both; medians with their spread; device and versions stand beside the figures.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from kava_jax.training.manifest import versions

ROUNDS = 7


def alternate(work: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of every round of each piece of work, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(ROUNDS + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of the rounds."""
    return {
        "median": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "rounds": len(seconds),
    }


def compared(seconds: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    """Everyone's seconds, and their medians as multiples of ours."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "times_ours": {name: median / medians[ours] for name, median in medians.items()},
    }


def circumstances() -> dict[str, Any]:
    """Device and versions."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
