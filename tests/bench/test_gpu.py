"""A config's own step with random weights: on CPU devices here, on a GPU where there is one."""

import json
from importlib.util import find_spec

import pytest

from kava_jax.bench import gpu, harness
from kava_jax.plan.chips import chip_of
from kava_jax.plan.compiled import held
from tests.tiny import kava, write_workspace


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(write_workspace(tmp_path))
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()  # no weight is read
    monkeypatch.setattr(harness, "ROUNDS", 2)
    return tmp_path


def measured(capsys, *arguments: str) -> dict:
    ended = kava(capsys, "bench", "gpu", "--config", "tiny.yaml", "--json", *arguments)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.long
def test_a_config_is_measured_on_all_devices_beside_pytorch(workspace, capsys, monkeypatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # of the processes of the sides
    asked = ("recipe=original", "data.batch_size=16", "mesh.data=1", "mesh.fsdp=-1")
    peer = ("--peer", "torch-eager") if find_spec("torch") else ()
    found = measured(capsys, *peer, *asked)
    assert set(found["checks"]["check"]) == {"float32", "bfloat16"}
    assert found["checks"]["check"]["float32"] < 1e-3
    assert set(found["cases"]) == {"kava", "torch_eager"} if peer else {"kava"}
    for side, own in found["cases"].items():
        assert own["failed"] == {}
        median = own["seconds"][side]["median"]
        assert own["tokens_per_second"][side] == pytest.approx(16 * 64 / median)
        assert own["mfu"] is None  # no such chip
    facts = found["cases"]["kava"]["facts"]["kava"]
    assert facts["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert len(facts["losses"]) >= 3
    assert all(loss > 0 for loss in facts["losses"])
    run = gpu.random_weights(workspace / "tiny.yaml", list(asked))
    arguments = sum(held(run, 16, 64).values())
    # What the step does not read (nothing here is large) the compiler leaves out.
    assert facts["compiled"]["arguments"] == pytest.approx(arguments, rel=0.02)
    assert facts["compiled"]["temporaries"] > 0


def test_a_step_without_room_stands_in_the_result(capsys, monkeypatch) -> None:
    """Compiled but not run; tests/bench/test_harness.py holds that facts told before stay."""
    facts = {"device": "NVIDIA H200", "devices": 2, "compiled": {"peak": 5}}
    outcome = {"seconds": {}, "facts": {"kava": facts}, "failed": {"kava": "RESOURCE_EXHAUSTED"}}
    monkeypatch.setattr(gpu, "compare", lambda sides, **_: dict(outcome))
    (own,) = measured(capsys)["cases"].values()
    assert own["failed"] == {"kava": "RESOURCE_EXHAUSTED"}
    assert own["facts"]["kava"] == facts
    assert own["mfu"] is None
    monkeypatch.setitem(outcome, "flops_per_second", {"kava": 989e12})
    assert measured(capsys)["cases"]["kava"]["mfu"] == 0.5
    ended = kava(capsys, "bench", "gpu")
    assert ended.code == 0, ended.err
    assert ended.out == "kava/kava  failed: RESOURCE_EXHAUSTED\n"


def test_a_config_that_does_not_fit_together_is_told(capsys, monkeypatch) -> None:
    outcome = {"facts": {}, "failed": {"kava": "mesh.fsdp=3 does not fit"}}
    monkeypatch.setattr(gpu, "compare", lambda sides, **_: outcome)
    ended = kava(capsys, "bench", "gpu", "--config", "tiny.yaml")
    assert ended.code == 2
    assert ended.err == "error: mesh.fsdp=3 does not fit\n"


def test_a_device_that_computes_wrongly_is_not_measured(monkeypatch) -> None:
    figures = {"float32": [1.0, 2.0], "bfloat16": [1.0, 2.2]}
    monkeypatch.setattr(gpu, "_figures", lambda dtype, device: figures[dtype])
    with pytest.raises(gpu.KavaError, match=r"bfloat16 is off by 1.00e-01; 0.05 is allowed"):
        gpu._check()


def test_a_device_is_known_by_its_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "TPU v5e": "v5e"}
    names |= {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p", "TPU v5p": "v5p"}
    assert {name: getattr(chip_of(name), "name", None) for name in names} == names
    assert chip_of("cpu") is None
