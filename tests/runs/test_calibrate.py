"""``kava calibrate`` and calibrated runs, on eight devices: what is planted is found."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.stats import ortho_group

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.config.file import load_config
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.hf.export import export_model
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.runs import calibrate
from kava_jax.runs.train import train
from tests.tiny import (
    CONFIG,
    contents,
    kava,
    write_config,
    write_model,
    write_rows,
    write_workspace,
)
from tests.tolerances import TOL

RECIPE = {
    "recipe": "calibrated",
    "train": CONFIG["train"] | {"steps": 1},
    "eval": {"max_new_tokens": 0, "batch_size": 8},
}


@pytest.fixture(autouse=True, scope="module")
def _small():
    """Few rows, one layer each and hardly a ridge: what is planted has to come out."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROWS": 48, "LAYERS": 1, "RIDGE": 1e-6}.items():
            patch.setattr(calibrate, name, value)
        yield


def turned(params: dict, seed: int) -> dict:
    """The same model with other keys and values: rotations that its own weights undo.

    Values turn by any rotation of their head, which the output projection undoes. Keys and queries
    turn together, each pair (i, i + H / 2) by its own angle, which RoPE commutes with.
    """
    rng = np.random.default_rng(seed)
    attention = params["blocks"]["attention"]
    layers, _, kv_heads, head_dim = attention["k"]["kernel"].shape
    group = attention["q"]["kernel"].shape[2] // kv_heads
    new = jax.tree.map(np.array, params)
    for layer in range(layers):
        for head in range(kv_heads):
            own = slice(head * group, (head + 1) * group)
            value_turn = ortho_group.rvs(head_dim, random_state=rng)
            angles = rng.uniform(0, 2 * np.pi, head_dim // 2)
            key_turn = np.block(
                [
                    [np.diag(np.cos(angles)), np.diag(np.sin(angles))],
                    [-np.diag(np.sin(angles)), np.diag(np.cos(angles))],
                ]
            )
            into = new["blocks"]["attention"]
            for leaf in ("kernel", "bias"):
                for name, heads, turn in (
                    ("k", head, key_turn),
                    ("q", own, key_turn),
                    ("v", head, value_turn),
                ):
                    x = into[name][leaf]
                    x[layer, ..., heads, :] = x[layer, ..., heads, :] @ turn
            o = into["o"]["kernel"]
            o[layer, own] = np.einsum("hg,nhd->ngd", value_turn, o[layer, own])
    return new


def write_turned(directory: Path) -> Path:
    """A student and, as its teacher, the student with its keys and values turned."""
    write_model(directory / "student", seed=2, num_hidden_layers=3)
    spec = read_spec(directory / "student")
    params = turned(load_decoder_params(directory / "student", spec), seed=0)
    export_model(
        directory / "teacher",
        params,
        spec,
        dtype="float32",
        tokenizer=builtin_tokenizer(),
        card="turned",
    )
    write_rows(directory / "data.jsonl", 88)
    write_config(directory / "tiny.yaml", **RECIPE)
    return directory


def calibration(directory: Path) -> dict:
    return json.loads((directory / "run/calibration/calibration.json").read_text())


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_a_teacher_that_is_the_student_turned_is_seen_through(
    direction, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(write_turned(tmp_path))
    ended = kava(capsys, "calibrate", "tiny.yaml", f"projector.direction={direction}", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["teachers"]["big"]
    assert found["layer_map"]["teacher_layers"] == [[0], [1], [2]]
    assert min(found["r2_k"] + found["r2_v"]) >= 0.999
    assert found["cos_sim"] >= 0.999
    assert found["cos_centered"] >= 0.999
    assert found["tokens"]["fit"] > 5 * found["tokens"]["score"]
    assert calibration(tmp_path) == json.loads(ended.out)


def test_cka_finds_the_layer_and_another_student_is_not_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_turned(tmp_path))
    overrides = ["recipe=anchored", "teachers.0.layer_map=cka"]
    assert kava(capsys, "calibrate", "tiny.yaml", *overrides).code == 0
    found = calibration(tmp_path)["teachers"]["big"]
    assert found["layer_map"]["teacher_layers"] == [[0], [1], [2]]
    assert min(found["cka_k"] + found["cka_v"]) > 0.999
    assert not (tmp_path / "run/calibration/projector.safetensors").exists()
    write_model(tmp_path / "other", seed=9, num_hidden_layers=3)
    overrides = ["student.path=other", "run.dir=other_run"]
    assert kava(capsys, "calibrate", "tiny.yaml", *overrides).code == 0
    other = json.loads((tmp_path / "other_run/calibration/calibration.json").read_text())
    assert max(other["teachers"]["big"]["r2_k"][1:] + other["teachers"]["big"]["r2_v"][1:]) < 0.99


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A workspace after a calibrated run of one step."""
    directory = write_workspace(tmp_path_factory.mktemp("calibrated") / "work")
    write_config(directory / "tiny.yaml", **RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        train(load_config(Path("tiny.yaml"), []), ["kava"])
    return directory


@pytest.fixture
def own(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, to work in."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_calibrated_run_measures_trains_and_is_read_again(own, capsys):
    before = contents(own / "run/calibration")
    names = ("run/calibration/projector.safetensors", "run/projector.safetensors")
    weights = [
        nnx.to_pure_dict(nnx.state(KVDimensionProjector.load(own / name), nnx.Param))
        for name in names
    ]
    jax.tree.map(np.testing.assert_array_equal, *weights)  # frozen
    lines = (own / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    first = next(record for record in records if record["kind"] == "eval")
    # The run starts from what was fitted. It was scored on other rows, so not to the digit.
    fitted = calibration(own)["teachers"]["big"]["cos_sim"]
    assert first["eval_cos_sim"] == pytest.approx(fitted, abs=0.1)
    assert kava(capsys, "eval", "run", "--data", "data.jsonl", "--rows", "8").code == 0
    assert kava(capsys, "export", "run", "--out", "exported").code == 0
    # Started again, it has nothing to measure.
    assert kava(capsys, "train", "tiny.yaml").code == 0
    assert contents(own / "run/calibration") == before
    shutil.rmtree(own / "run/calibration")
    ended = kava(capsys, "eval", "run", "--data", "data.jsonl")
    assert ended.code == 2
    assert "calibration.json' cannot be read" in ended.err
    assert ended.err.count("\n") == 1


def test_another_config_does_not_touch_the_calibration_of_a_run(own, capsys):
    before = contents(own / "run")
    ended = kava(capsys, "train", "tiny.yaml", "loss.sink_tokens=3")
    assert ended.code == 2
    assert "loss.sink_tokens 4 -> 3" in ended.err
    assert contents(own / "run") == before


def test_kava_calibrate_alone_is_what_the_run_then_uses_unless_the_data_changed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(write_workspace(tmp_path))
    write_config(tmp_path / "tiny.yaml", **RECIPE)
    assert kava(capsys, "calibrate", "tiny.yaml").code == 0
    first = contents(tmp_path / "run/calibration")
    assert kava(capsys, "calibrate", "tiny.yaml", "train.log_every=5").code == 0
    assert contents(tmp_path / "run/calibration") == first
    write_rows(tmp_path / "data.jsonl", 88, seed=5)
    assert kava(capsys, "calibrate", "tiny.yaml").code == 0
    assert contents(tmp_path / "run/calibration") != first


@pytest.mark.long
def test_a_given_map_is_fitted_as_it_is_and_warmup_starts_from_the_fit(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(write_workspace(tmp_path))
    write_config(tmp_path / "tiny.yaml", **RECIPE)
    overrides = ["teachers.0.layer_map=[[2, 1]]", "projector.training=joint"]
    ended = kava(capsys, "train", "tiny.yaml", *overrides)
    assert ended.code == 0, ended.err
    found = calibration(tmp_path)["teachers"]["big"]["layer_map"]
    assert found == {"student_layers": [1], "teacher_layers": [[2]]}
    fitted, trained = (
        nnx.to_pure_dict(nnx.state(KVDimensionProjector.load(tmp_path / name), nnx.Param))
        for name in ("run/calibration/projector.safetensors", "run/projector.safetensors")
    )
    moved = [
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(trained), strict=True)
    ]
    # One step of Adam at 1e-3 from the fit, and not from anywhere else.
    assert 0 < max(moved) <= 1e-3 * (1 + 0.02) + TOL["float32"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=anchored"], "the config measures nothing"),
        (["data.rows=7"], "7 training rows are too few to calibrate with"),
    ],
)
def test_what_cannot_be_calibrated_is_told_and_nothing_is_written(
    overrides, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(write_workspace(tmp_path))
    write_config(tmp_path / "tiny.yaml", **RECIPE)
    ended = kava(capsys, "calibrate", "tiny.yaml", *overrides)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
