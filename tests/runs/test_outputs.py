"""Whole tiny runs on outputs of layers: train, go on, evaluate, explain, export, report."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kava_jax.config.file import load_config
from kava_jax.errors import KavaError
from kava_jax.runs.prepare import prepare
from tests.tiny import CONFIG, contents, kava, write_config, write_workspace

# The last of the teacher's three layers is not read.
MAPPED = [{"name": "big", "path": "teacher", "layer_map": [[0, 0], [1, 1]]}]
QUICK: dict[str, Any] = {
    "teachers": MAPPED,
    "data": CONFIG["data"] | {"eval_rows": 16},
    "eval": {"max_new_tokens": 0, "batch_size": 8},
    "optimizer": {"student_lr": 1e-3, "min_lr_ratio": 1.0},
    "train": CONFIG["train"] | {"steps": 4, "diagnose_every": 2},
}


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    write_workspace(tmp_path)
    write_config(tmp_path / "tiny.yaml", **QUICK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(kind: str) -> list[dict[str, Any]]:
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def trained(capsys, *fields: str) -> None:
    ended = kava(capsys, "train", "tiny.yaml", *fields)
    assert ended.code == 0, ended.err


@pytest.mark.long
@pytest.mark.parametrize(
    ("match", "words"),
    [
        ("attention_outputs", "what each layer's attention adds to the residual stream"),
        ("block_outputs", "the residual stream after each layer"),
    ],
)
def test_a_whole_run(match, words, workspace, capsys) -> None:
    fields = (f"loss.match={match}", "loss.kv_weight=auto(0.5)")
    ended = kava(capsys, "explain", "tiny.yaml", *fields)
    assert f"Compared: {words}, of every real token" in ended.out
    assert "cut after layer 1" in ended.out
    trained(capsys, *fields)
    whole, last = records("train"), records("eval")[-1]
    shutil.rmtree("run")
    # A run that stops half-way and goes on is that run.
    trained(capsys, *fields, "train.steps=2")
    trained(capsys, *fields)
    timed = {"step_seconds", "tokens_per_second"}
    for ours, theirs in zip(records("train"), whole, strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {
            k: v for k, v in theirs.items() if k not in timed
        }
    assert records("eval")[-1] == last
    assert {"kv", "cos_o", "mag_ratio", "kv_gradient_share"} <= {
        *whole[0],
        *records("diagnostics")[0],
    }
    assert last["eval_cos_sim"] == last["eval_cos_o"]
    assert "eval_attention_cos" not in last
    assert {"big/cos_sim_o", "big/cka_o", "big/target_rank_o"} <= last["layers"].keys()
    assert all(name.endswith("_o") and len(row) == 2 for name, row in last["layers"].items())

    ended = kava(capsys, "eval", "run", "--data", "data.jsonl", "--json")
    assert ended.code == 0, ended.err
    assert {"eval_loss", "eval_cos_sim", "eval_alignment_gap"} <= json.loads(ended.out).keys()
    assert kava(capsys, "report", "run").code == 0
    page = Path("run/report.html").read_text()
    assert "cosine of outputs" in page
    assert "cosine, outputs" in page
    assert kava(capsys, "export", "run", "--out", "exported").code == 0
    assert f"to follow the {match.replace('_', ' ')} of" in Path("exported/README.md").read_text()


def test_the_teacher_is_read_up_to_the_last_mapped_layer_and_no_further(workspace) -> None:
    path = workspace / "teacher" / "model.safetensors"
    whole = load_file(path)

    def load(match: str, spoilt: int) -> None:
        name = f"model.layers.{spoilt}.mlp.down_proj.weight"
        tensors = whole | {name: np.full_like(whole[name], np.nan)}
        save_file(tensors, path, metadata={"format": "pt"})
        prepare(load_config("tiny.yaml", [f"loss.match={match}"])).blueprint.load_teachers()

    # Of the last mapped layer a cache needs keys and values alone, an output the whole.
    load("cache", 1)
    load("block_outputs", 2)
    with pytest.raises(KavaError, match=r"NaN or infinity in model.layers.1.mlp.down_proj"):
        load("block_outputs", 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["loss.parts=keys"], ["match=block_outputs with parts=keys", "set parts=both"]),
        (
            ["loss.key_space=post_rope"],
            ["match=block_outputs with key_space=post_rope", "set key_space=pre_rope"],
        ),
        (
            ["loss.remove_key_bias=true"],
            ["match=block_outputs with remove_key_bias=true", "set remove_key_bias=false"],
        ),
        (["teachers.0.layer_map=cka"], ["loss.match=block_outputs", "keys and values only"]),
        (
            ["projector={init: calibrated, kind: linear, per_layer: true}"],
            ["loss.match=block_outputs", "set projector.init=xavier"],
        ),
        (["recipe=calibrated", "loss.remove_key_bias=false"], ["loss.match=block_outputs"]),
    ],
)
def test_choices_about_caches_are_refused_in_one_line(fields, words, workspace, capsys) -> None:
    before = contents(workspace)
    ended = kava(capsys, "train", "tiny.yaml", "loss.match=block_outputs", *fields)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert all(word in ended.err for word in words), ended.err
    assert contents(workspace) == before
