"""The decoding benchmark compares the same tokens of the same model directory."""

import numpy as np
import pytest

from kava_jax.bench import decode, peers, timing, turns
from kava_jax.errors import KavaError

pytest.importorskip("torch", reason="torch, the peer, is not installed")
TOY = decode.Sizes(rows=2, prompt=6, new_tokens=5, square=16)


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


def test_the_figures_of_decoding_fit_together() -> None:
    found = decode.bench_decode(TOY)
    medians = {name: own["median"] for name, own in found["seconds"].items()}
    assert set(medians) == {"kava", "transformers", "transformers_one_thread"}
    assert found["times_ours"] == {
        name: pytest.approx(median / medians["kava"]) for name, median in medians.items()
    }
    assert found["tokens_per_second"] == pytest.approx(2 * 5 / medians["kava"])
    # Projections and feed-forward of 2 layers, attention over half of 11 positions, and the head.
    weights = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
    per_token = 2 * (2 * weights + 4 * 16 * (11 + 1) / 2)
    assert found["floor_flops"] == 2 * (11 * per_token + 5 * 2 * 16 * 512)
    assert found["share_of_floor"] > 0
    assert found["torch"]


def test_tokens_that_differ_or_are_too_few_are_told() -> None:
    ours = np.arange(8).reshape(2, 4)
    decode._check_tokens(ours, ours.copy())
    with pytest.raises(KavaError, match=r"other tokens than we do \(75% agree\)"):
        decode._check_tokens(ours, np.where(ours < 2, 9, ours))
    with pytest.raises(KavaError, match=r"other tokens than we do \(0% agree\)"):
        decode._check_tokens(ours, ours[:, :3])


def test_a_peer_that_gives_other_tokens_is_not_timed(monkeypatch) -> None:
    def differ(ours, theirs):
        raise KavaError("other tokens")

    monkeypatch.setattr(decode, "_check_tokens", differ)
    monkeypatch.setattr(turns.Side, "turn", lambda self: pytest.fail("was timed"))
    with pytest.raises(KavaError, match="other tokens"):
        decode.bench_decode(TOY)


def test_without_torch_the_remedy_is_told(monkeypatch) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    with pytest.raises(KavaError, match="torch, which is not installed; pip install torch"):
        decode.bench_decode(TOY)
