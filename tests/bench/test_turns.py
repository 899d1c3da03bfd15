"""Sides of a benchmark in processes of their own: real processes, and what they say and do."""

import re
from pathlib import Path

import pytest

from kava_jax.bench import timing, turns
from kava_jax.errors import KavaError

TOYS = "tests.bench.toy_sides"


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


def test_sides_take_turns_and_short_work_fills_its_own(tmp_path: Path) -> None:
    seen = {}
    taken = turns.take_turns(TOYS, ("long", "short"), tmp_path, seen.update)
    assert seen == {"long": {"side": "long"}, "short": {"side": "short"}}
    long, short = taken["long"], taken["short"]
    assert isinstance(long, turns.Taken)
    assert isinstance(short, turns.Taken)
    assert long.last == {"runs": 2}
    # One that is not counted, and as many as fill a turn.
    assert re.fullmatch("(ls{2,5}){2}", (tmp_path / "order").read_text())
    for side, at_least in ((long, 1.5 * turns.TURN), (short, turns.TURN / 4)):
        assert len(side.seconds) == 2
        assert min(side.seconds) >= at_least


def test_an_optional_side_may_fail_and_its_words_stay(tmp_path: Path) -> None:
    taken = turns.take_turns(
        TOYS, ("short", "refuses"), tmp_path, lambda first: None, optional=("refuses",)
    )
    assert isinstance(taken["short"], turns.Taken)
    assert taken["refuses"] == "refuses failed: field=1 is not 2; use 2"


def test_a_side_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(KavaError, match="refuses failed: field=1 is not 2; use 2"):
        turns.take_turns(TOYS, ("refuses",), tmp_path, lambda first: None)
    with pytest.raises(KavaError, match="breaks failed: RuntimeError: in the middle"):
        turns.take_turns(TOYS, ("breaks",), tmp_path, lambda first: None)


def test_sides_that_differ_take_no_turn(tmp_path: Path) -> None:
    def differ(first):
        raise KavaError("they differ")

    with pytest.raises(KavaError, match="they differ"):
        turns.take_turns(TOYS, ("short",), tmp_path, differ)
    assert not (tmp_path / "order").exists()
