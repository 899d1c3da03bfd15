"""Benchmarks count what they say they count; how long it takes is no test's business."""

import json
from pathlib import Path

import pytest
import yaml

from kava_jax.bench import steps, timing
from tests.tiny import contents, kava, write_workspace


def test_rounds_alternate_and_the_first_is_not_counted(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 3)
    order: list[str] = []
    seconds = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_diagnostics_are_measured_beside_the_step(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(write_workspace(tmp_path))
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(steps, "STEPS_PER_ROUND", 1)
    ended = kava(
        capsys, "bench", "diagnostics", "--config", "tiny.yaml", "train.diagnose_every=4", "--json"
    )
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    step, probe = found["step_seconds"]["median"], found["probe_seconds"]["median"]
    assert found["share_of_step"] == pytest.approx(probe / (4 * step))
    assert found["step_seconds"]["rounds"] == 2
    assert found["versions"]["jax"]
    assert not (tmp_path / "run").exists()


def test_every_arm_of_a_grid_is_timed_beside_its_baseline(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(write_workspace(tmp_path))
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(steps, "STEPS_PER_ROUND", 1)
    grid = {"name": "small", "config": "tiny.yaml", "seeds": [0], "baseline": "ce"}
    grid |= {"arms": {"ce": {"teachers": []}, "kv": {"recipe": "calibrated"}}}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    before = contents(tmp_path)
    ended = kava(capsys, "bench", "arms", "--config", "grid.yaml", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    medians = {arm: own["median"] for arm, own in found["step_seconds"].items()}
    assert found["relative"] == {"ce": 1, "kv": pytest.approx(medians["kv"] / medians["ce"])}
    assert contents(tmp_path) == before
    pretrained = grid | {"pretrain": {"train.steps": 1}}
    Path("grid.yaml").write_text(yaml.safe_dump(pretrained))
    ended = kava(capsys, "bench", "arms", "--config", "grid.yaml")
    assert ended.code == 2
    assert "grid=small pretrains its student" in ended.err


def test_an_unknown_benchmark_is_told(capsys) -> None:
    ended = kava(capsys, "bench", "everything")
    assert ended.code == 2
    assert ended.err.startswith("error: name='everything' is not a benchmark; use step, ")
