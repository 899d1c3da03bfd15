"""Every benchmark at toy size, once: what it compares agrees, and what it counts is consistent."""

import json
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import numpy as np
import pytest

from kava_jax.bench import (
    decode,
    handing,
    harness,
    loss,
    original,
    teacher,
    train_step,
    waiting,
)
from kava_jax.bench.pairs import Pair, qwen2
from kava_jax.errors import KavaError
from tests.tiny import kava

PAIR = Pair(qwen2(4, 32, 4, 2, 64, 512), qwen2(2, 16, 4, 2, 32, 512), rows=2, length=16)
SHAPE = (2, 3, 16, 2, 32)
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(harness, "ROUNDS", 2)


@pytest.fixture
def nothing_installed(monkeypatch) -> None:
    def missing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness.metadata, "version", missing)


def medians(found) -> dict[str, float]:
    return {name: own["median"] for name, own in found["seconds"].items()}


@pytest.mark.long
@needs_torch
def test_the_loss_by_the_command(monkeypatch, capsys) -> None:
    """Without torch.compile: it takes most of a minute."""
    real = loss.bench_loss
    monkeypatch.setattr(loss, "bench_loss", lambda: real(SHAPE, optional=()))
    ended = kava(capsys, "bench", "loss", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    own = medians(found)
    assert set(own) == {"kava", "read_modify", "torch_eager"}
    assert found["times_ours"] == {
        name: pytest.approx(median / own["kava"]) for name, median in own.items()
    }
    assert set(found["differences"]) == {"torch_eager"}
    assert found["differences"]["torch_eager"] <= loss.TOLERANCE
    cache = 2 * 4 * 2 * 3 * 16 * 2 * 32
    assert found["facts"]["read_modify"]["bytes"] == 3 * cache
    assert found["facts"]["kava"]["inputs"] == 2 * cache
    assert found["facts"]["kava"]["temporaries"] > 0
    assert found["failed"] == {}
    assert found["torch"]
    assert found["name"] == "loss"
    assert found["versions"]["jax"]
    monkeypatch.setattr(loss, "bench_loss", lambda: found)
    ended = kava(capsys, "bench", "loss")
    rows = [line.split() for line in ended.out.splitlines()]
    assert [row[0] for row in rows] == list(own)
    assert rows[0][2:] == ["s", "1.00"]


@needs_torch
def test_the_peer_is_the_original_loss_with_a_mask() -> None:
    """Formulas in float64; the originals' names of metrics."""
    import torch

    (s, _, t, _), mask = loss.inputs(SHAPE)
    keep = np.broadcast_to(mask[None, :, :, None], s.shape[:-1]).copy()
    wide = [x.astype(np.float64)[keep] for x in (s, t)]
    of_s, of_t = (np.linalg.norm(x, axis=-1) for x in wide)
    cos = ((wide[0] * wide[1]).sum(-1) / of_s / of_t).mean()
    magnitude = ((np.log(of_s) - np.log(of_t)) ** 2).mean()
    tensors = map(torch.from_numpy, (s, t, keep))
    value, metrics = original.mercator(*tensors)
    want = {
        "loss": 1 - cos + 0.01 * magnitude,
        "cos_sim": cos,
        "dir_loss": 1 - cos,
        "mag_loss": magnitude,
        "s_magnitude": of_s.mean(),
        "t_magnitude": of_t.mean(),
        "mag_ratio": of_s.mean() / of_t.mean(),
    }
    assert float(value) == float(metrics["loss"])
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(want, rel=1e-4)


@pytest.mark.long
def test_the_head_with_and_without_prompts() -> None:
    found = loss.bench_ce((2, 24, 8, 400))
    positions = {"all": 2 * 24, "answers": 2 * 12}
    assert set(found["cases"]) == set(positions)
    for name, own in found["cases"].items():
        assert own["times_ours"]["naive"] == pytest.approx(
            medians(own)["naive"] / medians(own)["kava"]
        )
        assert set(own["differences"]) == {"naive"}
        assert own["differences"]["naive"] <= loss.CLOSE
        facts = own["facts"]
        assert facts["naive"]["temporaries"] >= 4 * 2 * 24 * 400
        assert facts["kava"]["temporaries"] > 0
        assert facts["kava"]["flops"] == 6 * positions[name] * 8 * 400


@pytest.mark.long
@needs_torch
def test_decoding_gives_the_same_tokens() -> None:
    found = decode.bench_decode(rows=2, prompt=6, new_tokens=5)
    own = medians(found)
    assert set(own) == {"kava", "transformers", "transformers_one_thread"}
    assert found["differences"] == {"transformers": 0.0, "transformers_one_thread": 0.0}
    assert found["tokens_per_second"]["kava"] == pytest.approx(2 * 5 / own["kava"])
    assert found["torch"]


@pytest.mark.long
def test_answers_from_a_handed_over_cache() -> None:
    found = handing.bench_handoff(PAIR, prompts=(9,), answers=(3,))
    ((case, own),) = found["cases"].items()
    assert (case, own["prompt"], own["answer"]) == ("9 + 3", 9, 3)
    assert set(medians(own)) == {"handed", "reading", "teacher", "student"}
    # By hand: eight tokens; keys and values in float32, 2 x 4 in two layers, 2 x 8 in four.
    carried, whole = 8 * 4 * 2 * np.array([2 * 8, 4 * 16])
    assert own["facts"]["handed"] == {"handed_bytes": carried, "teacher_bytes": whole}


@pytest.mark.long
@needs_torch
def test_the_step_beside_the_originals_loop() -> None:
    """Same weights, same first loss."""
    found = train_step.bench_step("torch-eager", PAIR)
    ours, theirs = (found["facts"][side] for side in ("kava", "torch_eager"))
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=train_step.TOLERANCE)
    assert set(found["differences"]) == {"torch_eager"}
    own = medians(found)
    assert found["times_ours"]["torch_eager"] == pytest.approx(own["torch_eager"] / own["kava"])
    assert found["tokens_per_second"]["kava"] == pytest.approx(2 * 16 / own["kava"])
    assert found["seconds"]["kava"]["rounds"] == 2
    # Four layers and the head of 512 x 32 do more than the weights' own bytes.
    assert ours["flops"] == theirs["flops"] > 0
    # Both hold the two models and the projector in float32. Ours ends at keys and values of the
    # teacher's last layer: without output projection, feed-forward, its norm, and the last norm.
    assert theirs["weights"] - ours["weights"] == 4 * (32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert ours["above_models"] != theirs["above_models"]


def test_ours_alone_needs_no_torch(nothing_installed) -> None:
    assert original.peer_sides(None) == ()
    with pytest.raises(KavaError, match="torch, which is not installed; pip install torch"):
        original.peer_sides("torch")


def test_an_unknown_peer_is_told() -> None:
    with pytest.raises(KavaError, match="--peer='tensorflow' is unknown; use torch or torch-eager"):
        train_step.bench_step("tensorflow")
    with pytest.raises(KavaError, match="--peer='torch' is unknown; use tunix, or leave it out"):
        teacher.bench_teacher("torch")


@pytest.mark.parametrize(
    ("peer", "package"), [(None, "torch"), ("tunix", "google-tunix")], ids=["torch", "tunix"]
)
def test_a_peer_that_is_missing_is_told(nothing_installed, capsys, peer, package) -> None:
    arguments = ("teacher", "--peer", peer) if peer else ("loss",)
    ended = kava(capsys, "bench", *arguments)
    assert ended.code == 2
    assert ended.err == (
        f"error: this benchmark compares with {package}, which is not installed; "
        f"pip install {package}\n"
    )


@pytest.mark.long
def test_the_cut_teacher_beside_the_whole_one() -> None:
    peer = "tunix" if find_spec("tunix") else None
    found = teacher.bench_teacher(peer, PAIR)
    assert set(found["seconds"]) - {"tunix"} == {"cut", "half", "whole"}
    assert set(found["differences"]) == ({"tunix"} if peer else set())
    # Three layers and keys and values of the fourth, against one and the second's.
    flops = {name: found["facts"][name]["flops"] for name in ("cut", "half")}
    assert flops["half"] < 0.5 * flops["cut"]


def test_an_exponent_is_the_slope_of_a_power_law() -> None:
    sizes = (1, 2, 4, 8)
    assert train_step.exponent(sizes, [3.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert train_step.exponent(sizes, [7.0] * 4) == pytest.approx(0, abs=1e-12)


@pytest.mark.long
def test_scaling_over_an_axis() -> None:
    middle = {"rows": 2, "length": 8, "depth": 1, "width": 16, "vocabulary": 64}
    assert set(train_step.AXES) < set(train_step.MIDDLE) == set(middle)
    curves = train_step.bench_scaling({"rows": (2, 4), "depth": (1, 2)}, middle)["curves"]
    # FLOPs of a token do not depend on the rows, and grow with the layers.
    assert curves["rows"]["floor_exponent"] == pytest.approx(0, abs=1e-9)
    one, two = curves["depth"]["flops_per_token"]
    assert one < two
    for curve in curves.values():
        assert len(curve["seconds_per_token"]) == 2
        assert all(seconds > 0 for seconds in curve["seconds_per_token"])


@pytest.mark.long
def test_reading_rows() -> None:
    found = waiting.bench_input(rows=64, batch_size=8, batches=4)
    assert set(found["tokens_per_second"]) == {"encode", "batch", "put"}
    assert len({own["tokens"] for own in found["facts"].values()}) == 1


@pytest.mark.long
def test_startup_waits_for_a_real_first_step(monkeypatch) -> None:
    monkeypatch.setattr(harness, "ROUNDS", 1)
    monkeypatch.setattr(waiting, "LIMIT", 0.2)
    with pytest.raises(KavaError, match="the demo did not come to its first step"):
        waiting.bench_startup()


def test_what_a_benchmark_does_not_take_is_told(capsys) -> None:
    wrong = {
        ("everything",): "name='everything' is not a benchmark; use step, loss, ",
        ("loss", "train.steps=3"): "name=loss: its sizes are fixed; leave --config and overrides",
        ("ce", "--peer", "torch"): "--peer=torch: ce has its own; only step, teacher and gpu are",
    }
    for arguments, words in wrong.items():
        ended = kava(capsys, "bench", *arguments)
        assert ended.code == 2
        assert ended.err.startswith(f"error: {words}")
