"""The step beside the original's PyTorch loop, at toy size: same weights, same first loss."""

from importlib.util import find_spec

import pytest

from kava_jax.bench import step, timing
from kava_jax.bench.step import Pair, bench_step
from kava_jax.errors import KavaError

TOY = Pair(
    teacher=(4, 32, 4, 2, 64),
    student=(2, 16, 4, 2, 32),
    vocabulary=512,
    rows=2,
    length=16,
    prompt=6,
)
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


@needs_torch
def test_both_sides_do_the_same_work_and_are_set_side_by_side() -> None:
    found = bench_step(TOY, "torch-eager")
    ours, theirs = found["sides"]["ours"], found["sides"]["torch"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=step.AGREE)
    medians = [side["seconds"]["median"] for side in (ours, theirs)]
    assert found["times_faster_than"] == {"torch": pytest.approx(medians[1] / medians[0])}
    assert found["tokens_per_second"]["ours"] == pytest.approx(2 * 16 / medians[0])
    assert ours["seconds"]["rounds"] == 2
    # Four layers and the head of 512 x 32 do more than the weights' own bytes.
    assert found["floor_flops"] > 0
    ratio = ours["above_models"] / theirs["above_models"]
    assert found["memory_over"] == {"torch": pytest.approx(ratio)}


@needs_torch
def test_sides_that_differ_are_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(step, "AGREE", -1.0)
    with pytest.raises(KavaError, match=r"the first loss of ours is .* do not do the same work"):
        bench_step(TOY, "torch-eager")


def test_ours_alone_needs_no_torch() -> None:
    found = bench_step(TOY, None)
    assert set(found["sides"]) == {"ours"}
    assert found["times_faster_than"] == found["memory_over"] == {}


def test_a_side_that_fails_is_told_with_its_words(monkeypatch) -> None:
    monkeypatch.setitem(step.PEERS, "nobody", ("nobody",))
    monkeypatch.setattr(step, "_config", lambda *_: {})
    with pytest.raises(KavaError):
        bench_step(TOY, "nobody")


def test_an_unknown_peer_is_told() -> None:
    with pytest.raises(KavaError, match="--peer='tensorflow' is unknown; use torch or torch-eager"):
        bench_step(TOY, "tensorflow")
