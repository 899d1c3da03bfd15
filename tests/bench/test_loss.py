"""The KV loss's benchmark measures the same work on every side, and says so when it does not."""

import json

import pytest

from kava_jax.bench import catalog, loss, peers, timing
from kava_jax.errors import KavaError
from tests.tiny import kava

pytest.importorskip("torch", reason="torch, the peer, is not installed")
TOY = loss.Sizes(layers=2, rows=3, length=16, heads=2, width=32)


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


@pytest.fixture
def _uncompiled(monkeypatch) -> None:
    """torch.compile takes a C++ compiler and most of a minute."""
    monkeypatch.setattr(loss, "_torch_compiled", lambda *inputs: (None, "not here"))


@pytest.mark.usefixtures("_uncompiled")
def test_the_figures_of_the_loss_fit_together() -> None:
    found = loss.bench_loss(TOY)
    medians = {name: own["median"] for name, own in found["seconds"].items()}
    assert set(medians) == {"kava", "read_modify", "torch_eager"}
    assert found["times_ours"] == {
        name: pytest.approx(median / medians["kava"]) for name, median in medians.items()
    }
    assert found["share_of_floor"] == pytest.approx(medians["read_modify"] / medians["kava"])
    assert found["seconds"]["kava"]["rounds"] == 2
    cache = 2 * 4 * 2 * 3 * 16 * 2 * 32
    assert found["input_bytes"] == 2 * cache
    assert found["floor_bytes"] == 3 * cache
    assert 0 < found["temporary_bytes"] == found["temporaries_of_inputs"] * 2 * cache
    assert found["torch_compiled_failed"] == "not here"
    assert found["torch"]
    assert found["versions"]["jax"]


@pytest.mark.usefixtures("_uncompiled")
def test_a_peer_that_gives_other_numbers_is_not_timed(monkeypatch) -> None:
    real = loss._torch_eager

    def other(*inputs):
        run = real(*inputs)

        def off():
            value, (k, v) = run()
            return value, (k, 1.01 * v)

        return off

    monkeypatch.setattr(loss, "_torch_eager", other)
    monkeypatch.setattr(peers, "alternate", lambda work: pytest.fail("was timed"))
    with pytest.raises(KavaError, match=r"torch_eager differs from ours by .*other work"):
        loss.bench_loss(TOY)


def test_where_torch_compile_does_not_work_the_reason_is_kept(monkeypatch) -> None:
    import torch

    def broken(function):
        def raises(*arguments):
            raise RuntimeError("no C++ compiler\nwas found")

        return raises

    monkeypatch.setattr(torch, "compile", broken)
    run, reason = loss._torch_compiled(*loss._inputs(TOY))
    assert run is None
    assert reason == "RuntimeError: no C++ compiler was found"


def test_without_torch_the_remedy_is_told(monkeypatch, capsys) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    fixed = catalog._fixed("loss", lambda: loss.bench_loss(TOY))
    shown = catalog.BENCHMARKS["loss"]._replace(run=fixed)
    monkeypatch.setitem(catalog.BENCHMARKS, "loss", shown)
    ended = kava(capsys, "bench", "loss")
    assert ended.code == 2
    assert ended.err == (
        "error: this benchmark compares with torch, which is not installed; pip install torch\n"
    )


@pytest.mark.usefixtures("_uncompiled")
def test_the_command_shows_a_table_or_json(monkeypatch, capsys) -> None:
    fixed = catalog._fixed("loss", lambda: loss.bench_loss(TOY))
    monkeypatch.setitem(catalog.BENCHMARKS, "loss", catalog.BENCHMARKS["loss"]._replace(run=fixed))
    ended = kava(capsys, "bench", "loss")
    assert ended.code == 0, ended.err
    rows = [line.split() for line in ended.out.splitlines()]
    assert [row[0] for row in rows] == ["kava", "read_modify", "torch_eager"]
    assert rows[0][2:] == ["s", "1.00"]
    ended = kava(capsys, "bench", "loss", "--json")
    assert json.loads(ended.out)["sizes"] == TOY._asdict()
    ended = kava(capsys, "bench", "loss", "train.steps=3")
    assert ended.code == 2
    assert ended.err == "error: name=loss: its sizes are fixed; leave --config and overrides out\n"
