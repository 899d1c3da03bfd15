"""Sides of a benchmark in processes of their own: real processes, and what they say and do."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kava_jax.bench import harness
from kava_jax.bench.harness import compare
from kava_jax.errors import KavaError
from tests.bench.toy_sides import toy


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(harness, "ROUNDS", 2)


def test_sides_take_turns_and_short_work_fills_its_own(tmp_path: Path, capfd) -> None:
    found = compare({name: partial(toy, tmp_path, name) for name in ("long", "short")})
    # Each works once; then, by turns, the long one once and the short one to fill a fifth of a
    # second: once, twice and five times.
    order = (tmp_path / "order").read_text()
    assert re.fullmatch("(ls|sl)(ls{1,8}){2}", order)
    facts = {"side": "long", "tokens": 6, "runs": order.count("l")}
    assert found["facts"]["long"] == facts
    seconds = found["seconds"]
    for name, least in (("long", 0.3), ("short", 0.05)):
        own = seconds[name]
        assert own["rounds"] == 2
        assert least <= own["least"] <= own["median"] <= own["most"]
    medians = {name: own["median"] for name, own in seconds.items()}
    assert found["times_ours"] == {"long": 1, "short": medians["short"] / medians["long"]}
    assert found["tokens_per_second"] == {name: 6 / own for name, own in medians.items()}
    assert "flops_per_second" not in found
    assert found["failed"] == found["differences"] == {}
    assert capfd.readouterr().out == ""


def test_an_optional_side_may_fail_and_its_words_stay(tmp_path: Path) -> None:
    names = ("short", "refuses", "breaks", "dies")
    found = compare({name: partial(toy, tmp_path, name) for name in names}, optional=names[1:])
    assert set(found["seconds"]) == {"short"}
    assert found["failed"] == {
        "refuses": "field=1 is not 2; use 2",
        "breaks": "RuntimeError: in the middle",
        "dies": "exit code 3",
    }
    # What was told before the work was begun is not lost.
    assert found["facts"]["dies"] == {"side": "dies", "tokens": 6}
    assert "refuses" not in found["facts"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refuses", "refuses failed: field=1 is not 2; use 2"),
        ("breaks", "breaks failed: RuntimeError: in the middle"),
        ("dies", "dies failed: exit code 3"),
    ],
)
def test_a_side_that_fails_is_told_with_its_last_words(tmp_path: Path, name, words) -> None:
    with pytest.raises(KavaError, match=words):
        compare({name: partial(toy, tmp_path, name)})


def test_sides_that_give_other_numbers_take_no_turn(tmp_path: Path) -> None:
    """Also one that may fail: it did not."""
    numbers = {"bare": None, "one": 2.0, "other": 2.5}
    sides = {name: partial(toy, tmp_path, name, number) for name, number in numbers.items()}
    with pytest.raises(KavaError, match=r"other differs from one by 0.25 of .*other work"):
        compare(sides, tolerance=0.2, optional=("other",))
    assert sorted((tmp_path / "order").read_text()) == sorted("boo")


def test_numbers_are_the_same_within_a_tolerance_of_the_largest() -> None:
    ours = [np.array([4.0, -8.0]), np.array(3)]
    given = {"bare": [], "ours": ours, "near": [np.array([4.0, -8.5]), np.array(3)]}
    assert harness._differences(given, 0.0625) == {"near": 0.0625}
    assert harness._differences({"a": [], "b": []}, 0.0) == {}
    wrong = {
        "far": [np.array([4.0, -8.6]), np.array(3)],
        "not a number": [np.array([4.0, np.nan]), np.array(3)],
        "too few": [np.array([4.0]), np.array(3)],
        "another token": [np.array([4.0, -8.0]), np.array(4)],
    }
    for name, arrays in wrong.items():
        with pytest.raises(KavaError, match=f"{name} differs from ours"):
            harness._differences({"ours": ours, name: arrays}, 0.0625)
