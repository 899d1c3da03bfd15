"""The search for the largest batch, on memory that is made up, against trying every batch."""

import math

import numpy as np
import pytest

from kava_jax.plan.most_rows import Tried, find_boundary

FIXED = 1000


def made_up(kind: str, rows: int) -> int:
    """Temporaries of so many rows: always more for more."""
    return {
        "line": 50 + 7 * rows,
        "kink": 50 + 3 * rows + 9 * max(0, rows - 30),
        "steps": 50 + 160 * math.ceil(rows / 20),
        "curve": 50 + rows**2,
        "bumps": 50 + 7 * rows + 8 * (rows == 32),
    }[kind]


class Compiler:
    """Counts what it is asked."""

    def __init__(self, kind: str):
        self.kind, self.asked = kind, []

    def __call__(self, rows: int) -> Tried:
        self.asked.append(rows)
        return Tried(rows, FIXED, made_up(self.kind, rows))


@pytest.mark.parametrize("kind", ["line", "kink", "steps", "curve"])
@pytest.mark.parametrize("unit", [1, 8])
@pytest.mark.parametrize("first", [8, 64])
def test_the_boundary_is_the_one_that_trying_every_batch_finds(kind, unit, first) -> None:
    compiler = Compiler(kind)
    tried = [compiler(first)]
    for device in np.random.default_rng(0).integers(FIXED, 3000, 12):
        limit = 0.75 * device
        fitting = [n for n in range(unit, 2000, unit) if FIXED + made_up(kind, n) <= limit]
        found = find_boundary(compiler, unit, tried, 0.75, int(device))
        most = max(fitting, default=0)
        assert (found.fits.rows if found.fits else 0) == most
        assert found.beyond == Tried(most + unit, FIXED, made_up(kind, most + unit))
        assert found.limit == limit
    assert len(compiler.asked) == len(set(compiler.asked))  # nothing is compiled twice
    assert all(rows % unit == 0 and rows > 0 for rows in compiler.asked)


def test_a_line_takes_two_tries_and_one_for_the_slope() -> None:
    compiler = Compiler("line")
    found = find_boundary(compiler, 1, [compiler(32)], 0.5, 4000)
    assert found.fits
    assert found.fits.rows == (2000 - FIXED - 50) // 7
    assert len(compiler.asked) == 4
    assert found.beyond == Tried(found.fits.rows + 1, FIXED, 50 + 7 * 136)


def test_a_bump_does_not_mislead() -> None:
    """As measured: 33 rows need less than 32, and 34 do not fit."""
    compiler = Compiler("bumps")
    found = find_boundary(compiler, 1, [compiler(32)], 1.0, FIXED + 50 + 7 * 33 + 3)
    assert found.fits
    assert (found.fits.rows, found.beyond.rows) == (33, 34)
    assert len(compiler.asked) <= 5


def test_what_never_fits_is_told() -> None:
    compiler = Compiler("line")
    found = find_boundary(compiler, 8, [compiler(64)], 0.75, 1000)
    assert found.fits is None
    assert found.beyond.rows == 8
