"""A config's own step with random weights: on CPU devices here, on a GPU where there is one."""

import json
from types import SimpleNamespace

import jax
import pytest

from kava_jax.bench import gpu_config
from kava_jax.plan.chips import chip_of
from kava_jax.plan.compiled import held
from tests.tiny import kava, write_workspace


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(write_workspace(tmp_path))
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()  # no weight is read
    monkeypatch.setattr(gpu_config, "STEPS", 2)
    return tmp_path


def measured(capsys, *overrides: str) -> dict:
    ended = kava(capsys, "bench", "gpu", "--config", "tiny.yaml", *overrides, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_a_config_is_measured_on_all_devices(workspace, capsys) -> None:
    found = measured(capsys, "data.batch_size=16", "mesh.data=1", "mesh.fsdp=-1")
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert (found["rows"], found["length"]) == (16, 64)
    assert found["tokens_per_second"] == 16 * 64 / found["step_seconds"]["median"]
    assert len(found["losses"]) == 3
    assert all(loss > 0 for loss in found["losses"])
    assert "failed" not in found
    run = gpu_config.random_weights(workspace / "tiny.yaml", ["mesh.data=1", "mesh.fsdp=-1"])
    arguments = sum(held(run, 16, 64).values())
    # What the step does not read (nothing here is large) the compiler leaves out.
    assert found["compiled"]["arguments"] == pytest.approx(arguments, rel=0.02)
    # No chip that a plan knows.
    assert found["mfu"] is found["plan"] is None


def test_a_step_without_room_stands_in_the_result(capsys, monkeypatch) -> None:
    def full(*_) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore words")

    monkeypatch.setattr(gpu_config, "_stepped", full)
    found = measured(capsys, "mesh.fsdp=8", "mesh.data=1")
    assert found["failed"] == "RESOURCE_EXHAUSTED: out of memory"
    assert found["compiled"]["temporaries"] > 0
    assert "tokens_per_second" not in found


def test_the_plan_of_a_chip_stands_beside(workspace, monkeypatch) -> None:
    asked = {}

    def run(command, **options) -> SimpleNamespace:
        asked.update(options, command=command)
        return SimpleNamespace(returncode=0, stdout='{"peak": 1}', stderr="")

    monkeypatch.setattr(gpu_config.subprocess, "run", run)
    assert gpu_config._planned(workspace / "tiny.yaml", ["seed=1"], "h200", 8) == {"peak": 1}
    words = [str(workspace / "tiny.yaml"), "seed=1", "--chip", "h200", "--devices", "8", "--json"]
    assert asked["command"][-7:] == words
    assert asked["env"]["JAX_PLATFORMS"] == "cpu"
    found = SimpleNamespace(returncode=2, stdout="", stderr="warning\nerror: no such chip\n")
    monkeypatch.setattr(gpu_config.subprocess, "run", lambda *_, **__: found)
    failed = gpu_config._planned(workspace / "tiny.yaml", [], "h200", 8)
    assert failed == {"failed": "error: no such chip"}


def test_a_device_is_known_by_its_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "TPU v5e": "v5e"}
    assert {name: getattr(chip_of(name), "name", None) for name in names} == names
    assert chip_of("cpu") is None
