"""The KV loss's benchmark measures the same work on every side, and says so when it does not."""

import json

import numpy as np
import pytest

from kava_jax.bench import catalog, loss, loss_sides, peers, timing
from kava_jax.bench.torch_loss import mercator
from kava_jax.errors import KavaError
from tests.tiny import kava

pytest.importorskip("torch", reason="torch, the peer, is not installed")
TOY = loss.Sizes(layers=2, rows=3, length=16, heads=2, width=32)
WITHOUT_COMPILE = ("kava", "read_modify", "torch_eager")


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


def quickly(monkeypatch) -> None:
    """Toy sizes behind the command, without torch.compile: it takes most of a minute."""
    fixed = catalog._fixed("loss", lambda: loss.bench_loss(TOY, WITHOUT_COMPILE))
    monkeypatch.setitem(catalog.BENCHMARKS, "loss", catalog.BENCHMARKS["loss"]._replace(run=fixed))


def test_the_figures_of_the_loss_fit_together() -> None:
    found = loss.bench_loss(TOY, WITHOUT_COMPILE)
    medians = {name: own["median"] for name, own in found["seconds"].items()}
    assert set(medians) == set(WITHOUT_COMPILE)
    assert found["times_ours"] == {
        name: pytest.approx(median / medians["kava"]) for name, median in medians.items()
    }
    assert found["share_of_floor"] == pytest.approx(medians["read_modify"] / medians["kava"])
    assert found["seconds"]["kava"]["rounds"] == 2
    cache = 2 * 4 * 2 * 3 * 16 * 2 * 32
    assert found["input_bytes"] == 2 * cache
    assert found["floor_bytes"] == 3 * cache
    assert 0 < found["temporary_bytes"] == found["temporaries_of_inputs"] * 2 * cache
    assert found["failed"] == {}
    assert found["torch"]
    assert found["versions"]["jax"]


def test_a_peer_that_gives_other_numbers_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(loss, "TOLERANCE", -1.0)
    with pytest.raises(KavaError, match=r"torch_eager differs from ours by .*other work"):
        loss.bench_loss(TOY, WITHOUT_COMPILE)


def test_the_peer_is_the_original_loss_with_a_mask() -> None:
    """Formulas in float64; the originals' names of metrics."""
    import torch

    (s, _, t, _), mask = loss_sides.inputs(*TOY)
    keep = np.broadcast_to(mask[None, :, :, None], s.shape[:-1]).copy()
    wide = [x.astype(np.float64)[keep] for x in (s, t)]
    of_s, of_t = (np.linalg.norm(x, axis=-1) for x in wide)
    cos = ((wide[0] * wide[1]).sum(-1) / of_s / of_t).mean()
    magnitude = ((np.log(of_s) - np.log(of_t)) ** 2).mean()
    value, metrics = mercator(*map(torch.from_numpy, (s, t, keep)), alpha=1.0, beta=0.01)
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


def test_without_torch_the_remedy_is_told(monkeypatch, capsys) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    quickly(monkeypatch)
    ended = kava(capsys, "bench", "loss")
    assert ended.code == 2
    assert ended.err == (
        "error: this benchmark compares with torch, which is not installed; pip install torch\n"
    )


def test_the_command_shows_a_table_or_json(monkeypatch, capsys) -> None:
    quickly(monkeypatch)
    ended = kava(capsys, "bench", "loss")
    assert ended.code == 0, ended.err
    rows = [line.split() for line in ended.out.splitlines()]
    assert tuple(row[0] for row in rows) == WITHOUT_COMPILE
    assert rows[0][2:] == ["s", "1.00"]
    ended = kava(capsys, "bench", "loss", "--json")
    assert json.loads(ended.out)["sizes"] == TOY._asdict()
    ended = kava(capsys, "bench", "loss", "train.steps=3")
    assert ended.code == 2
    assert ended.err == "error: name=loss: its sizes are fixed; leave --config and overrides out\n"
