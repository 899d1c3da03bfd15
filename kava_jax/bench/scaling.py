"""``kava bench scaling``: what a token costs as rows get longer, models deeper, batches larger."""

import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from kava_jax.bench.pairs import Stepping, geometry, random_batch, random_run
from kava_jax.bench.timing import circumstances
from kava_jax.plan.floor import step_floor

STEPS = 5


class Range(NamedTuple):
    """The sizes that are tried, one axis at a time around the middle."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    rows: tuple[int, ...] = (1, 4, 16, 64)
    length: int = 256
    depth: int = 4
    row: int = 4
    width: int = 128
    vocabulary: int = 4096


def bench_scaling(sizes: Range) -> dict[str, Any]:
    """Seconds per token of the train step over each axis, beside the floor's FLOPs per token.

    ``exponent`` is the slope of log(seconds per token) over log(size), by least squares: 0 is a
    cost that does not depend on the size, 1 one in proportion to it. Teacher and student have the
    same depth and width; the middle is ``length``, ``depth``, ``row``.
    """
    middle = {"rows": sizes.row, "length": sizes.length, "depth": sizes.depth}
    axes = {"length": sizes.lengths, "depth": sizes.depths, "rows": sizes.rows}
    curves = {}
    for axis, values in axes.items():
        points = [_point(sizes, **middle | {axis: value}) for value in values]
        curves[axis] = {
            "sizes": list(values),
            "seconds_per_token": [point[0] for point in points],
            "flops_per_token": [point[1] for point in points],
            "exponent": exponent(values, [point[0] for point in points]),
            "floor_exponent": exponent(values, [point[1] for point in points]),
        }
    return {"name": "scaling", "middle": middle, "curves": curves, **circumstances()}


def exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
    """Slope of log(cost) over log(size) by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def _point(sizes: Range, *, rows: int, length: int, depth: int) -> tuple[float, float]:
    """Median seconds and floor FLOPs per token."""
    shape = geometry((depth, sizes.width, 4, 2, 3 * sizes.width), sizes.vocabulary)
    blueprint = random_run(shape, shape, rows=rows)
    step = Stepping(blueprint, random_batch(rows, length, sizes.vocabulary, length // 2))
    seconds = []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    tokens = rows * length
    floor = step_floor(blueprint, rows, length, rows * (length - length // 2)).total
    return statistics.median(seconds[1:]) / tokens, floor / tokens
