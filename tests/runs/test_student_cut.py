"""``student.cut``: one ``kava train`` cuts, aligns and heals; the same as ``kava cut`` by hand."""

import json
from typing import Any

import pytest
from safetensors.numpy import load_file

from kava_jax.config.file import load_config
from kava_jax.hf.cut_record import CUT_RECORD, read_cut_record, write_cut_record
from kava_jax.journal.metrics_file import read_metrics
from kava_jax.plan.chips import find_chip
from kava_jax.plan.planning import make_plan
from tests.tiny import CONFIG, kava, write_config, write_model, write_rows, write_workspace
from tests.tolerances import TOL

SMALL = {"layers": [0, 3], "kv_heads": 1, "intermediate_size": 16}
DATA = CONFIG["data"] | {"eval_path": "held.jsonl"}
HEALED = {
    "data": DATA,
    "projector": {"kind": "identity"},
    "loss": {"kl_weight": 1.0, "ce_weight": 0.0},
}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """The tiny workspace with a teacher of 4 layers and its student cut out of it."""
    write_workspace(tmp_path)
    write_model(tmp_path / "big", seed=3, num_hidden_layers=4)
    write_rows(tmp_path / "held.jsonl", 8, seed=5)
    configured(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(folder, run: str = "run", student: Any = None, **sections: Any) -> None:
    write_config(
        folder / "tiny.yaml",
        run={"name": "tiny", "dir": run},
        teachers=[{"name": "big", "path": "big"}],
        student={"cut": {"layers": 2, "rule": "evenly"}} if student is None else student,
        **(HEALED | sections),
    )


def figures(run) -> list[dict[str, Any]]:
    timed = ("seconds", "per_second", "share_of_time")
    return [
        {name: x for name, x in record.items() if not any(part in name for part in timed)}
        for record in read_metrics(run / "metrics.jsonl", "train")
    ]


@pytest.mark.long
def test_a_run_that_cuts_is_one_of_a_directory_that_was_cut(workspace, capsys) -> None:
    kept = {"layers": 2, "rule": "best_block", "intermediate_size": 20}
    configured(workspace, student={"cut": kept})
    assert kava(capsys, "train", "tiny.yaml").code == 0
    found = read_cut_record(workspace / "run")
    assert found is not None
    assert found.units is not None
    # By hand, of the layers and units that the run has found.
    layers = ",".join(map(str, found.layers))
    shown = [
        "--layers",
        layers,
        "--intermediate-size",
        "20",
        "--data",
        "data.jsonl",
        "--rows",
        "64",
    ]
    by_hand = kava(capsys, "cut", "big", "--out", "cut", *shown, "--dtype", "float32")
    assert by_hand.code == 0, by_hand.err
    assert read_cut_record(workspace / "cut") == found
    configured(workspace, "other", student={"path": "cut"})
    assert kava(capsys, "train", "tiny.yaml").code == 0
    assert figures(workspace / "run") == figures(workspace / "other")


@pytest.mark.long
def test_it_resumes_and_is_exported_with_its_record(workspace, capsys) -> None:
    assert kava(capsys, "train", "tiny.yaml", "train.steps=1").code == 0
    gone_on = kava(capsys, "train", "tiny.yaml", "train.steps=2")
    assert gone_on.code == 0, gone_on.err
    assert "continuing from the checkpoint at step 1" in gone_on.err + gone_on.out
    assert kava(capsys, "export", "run", "--out", "out").code == 0
    record = json.loads((workspace / "out" / CUT_RECORD).read_text())
    assert (record["layers"], record["teacher"], record["teacher_layers"]) == ([0, 3], "big", 4)
    assert len(load_file(workspace / "out" / "model.safetensors")) == len(
        load_file(workspace / "student" / "model.safetensors")
    )
    # The export is a cut student too: its layers' origins are known.
    configured(workspace, "again", student={"path": "out"})
    assert (
        "origin, because the student's layers were cut" in kava(capsys, "explain", "tiny.yaml").out
    )
    refused = kava(capsys, "cut", "out", "--out", "twice", "--keep", "1")
    assert refused.code == 2
    assert "was cut from 'big' already" in refused.err


@pytest.mark.long
def test_a_record_of_a_start_that_came_to_nothing_is_not_read(workspace, capsys) -> None:
    assert kava(capsys, "train", "tiny.yaml").code == 0
    right = read_cut_record(workspace / "run")
    assert right is not None
    stale = workspace / "stale"
    stale.mkdir()
    write_cut_record(stale, right.model_copy(update={"layers": (1, 2)}))
    configured(workspace, "stale")
    assert kava(capsys, "train", "tiny.yaml").code == 0
    assert read_cut_record(stale) == right


@pytest.mark.long
def test_a_run_that_lost_its_record_is_not_guessed_at(workspace, capsys) -> None:
    assert kava(capsys, "train", "tiny.yaml", "train.steps=1").code == 0
    (workspace / "run" / CUT_RECORD).unlink()
    for again in (("train", "tiny.yaml", "train.steps=2"), ("export", "run", "--out", "out")):
        refused = kava(capsys, *again)
        assert refused.code == 2
        assert f"run.dir=run has lost {CUT_RECORD}" in refused.err
        assert "restore it" in refused.err


@pytest.mark.long
def test_merged_heads_are_aligned_through_a_calibrated_projector(workspace, capsys) -> None:
    fitted = {"kind": "linear", "per_layer": True, "init": "calibrated"}
    fitted |= {"direction": "teacher_to_student"}
    student = {"cut": {"layers": 2, "kv_heads": 1}}
    configured(workspace, student=student, projector=fitted)
    assert "what the cut has broken is the target" in kava(capsys, "explain", "tiny.yaml").out
    ended = kava(capsys, "train", "tiny.yaml")
    assert ended.code == 0, ended.err
    assert kava(capsys, "eval", "run", "--data", "data.jsonl", "--rows", "8").code == 0


MERGED = {
    "kind": "linear",
    "per_layer": True,
    "init": "merged",
    "direction": "teacher_to_student",
    "training": "frozen",
}


@pytest.mark.long
def test_merged_heads_are_compared_with_the_teacher_s_merged_alike(workspace, capsys) -> None:
    """Both first layers read the same, so there the cut's keys and values are the target."""
    student = {"cut": {"layers": [0], "kv_heads": 1}}
    configured(workspace, student=student, projector=MERGED)
    ended = kava(capsys, "train", "tiny.yaml", "optimizer.student_lr=1e-2", "train.steps=2")
    assert ended.code == 0, ended.err
    start, *_, end = read_metrics(workspace / "run" / "metrics.jsonl", "eval")
    assert start["eval_cos_sim"] == pytest.approx(1, abs=TOL["float32"])
    assert end["eval_cos_sim"] < 1 - TOL["float32"]
    assert "It merges the teacher's KV heads as the cut" in kava(capsys, "explain", "tiny.yaml").out
    chosen = ("explain", "tiny.yaml", "recipe=healed", "projector={kind: linear, init: xavier}")
    assert 'projector.init "merged" -> "xavier"' in kava(capsys, *chosen).out


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"path": "big", "layer_map": "straddle"}, "teachers.0.layer_map pairs layers with others"),
        pytest.param(
            {"path": "teacher"},
            "teachers.0 has 4 KV heads of 4, and the cut merges 2 of 4",
            marks=pytest.mark.long,
        ),
    ],
)
def test_heads_of_another_basis_are_not_merged(teacher, said, workspace, capsys) -> None:
    write_model(workspace / "teacher", num_hidden_layers=4, num_key_value_heads=4)
    configured(workspace, student={"cut": {"path": "big", "kv_heads": 1, "layers": 2}})
    projector = ", ".join(f"{name}: {value}" for name, value in MERGED.items())
    config = [f"projector={{{projector}}}", f"teachers=[{json.dumps({'name': 'big'} | teacher)}]"]
    ended = kava(capsys, "train", "tiny.yaml", *config)
    assert ended.code == 2
    assert f"projector.init=merged: {said}" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


@pytest.mark.long
def test_a_smoke_run_knows_it(workspace, capsys) -> None:
    configured(workspace, student={"cut": SMALL}, projector={"kind": "linear"})
    smoke = kava(capsys, "train", "tiny.yaml", "--smoke")
    assert smoke.code == 0, smoke.err


@pytest.mark.long
def test_plan_and_explain_know_it(workspace, capsys) -> None:
    configured(workspace, student={"cut": SMALL}, projector={"kind": "linear"})
    told = kava(capsys, "explain", "tiny.yaml").out
    assert "Student: cut out of big, 2 of 4 layers (0, 3), 1 KV heads, 16 units in a layer." in told
    plan = make_plan(load_config("tiny.yaml"), find_chip("h100"), 1e9, lambda _: None)
    # Masters of the cut student, counted by hand: embedding, two layers, the last norm.
    attention = 16 * 16 + 16 * 4 * 2 + 16 * 16 + 16 + 4 * 2
    assert plan.held["student"] == 4 * (512 * 16 + 2 * (attention + 2 * 16 + 3 * 16 * 16) + 16)


@pytest.mark.parametrize(
    ("student", "named"),
    [
        ({"path": "student", "cut": {}}, "exactly one of path, geometry and cut (path and cut"),
        ({}, "exactly one of path, geometry and cut (none given)"),
        ({"cut": {"layers": "0,1"}}, "write a number of layers, or a list such as [0, 1, 2]"),
        ({"cut": {"layers": 5}}, "student.cut.layers=5: the teacher has 4 layers; keep 1 to 4"),
        (
            {"cut": {"layers": [0, 4]}},
            "student.cut.layers=0,4: the teacher has 4 layers; name some of 0",
        ),
        ({"cut": {"layers": [1, 0]}}, "each once, in ascending order"),
        (
            {"cut": {"kv_heads": 3}},
            "student.cut.kv_heads=3 does not divide the teacher's 2",
        ),
        (
            {"cut": {"intermediate_size": 99}},
            "student.cut.intermediate_size=99: the teacher has",
        ),
        ({"cut": {"rule": "first"}}, "student.cut.rule"),
        ({"cut": {"keep": 2}}, "student.cut.keep"),
        ({"cut": {"path": "nowhere"}}, "nowhere"),
    ],
)
def test_bad_input(workspace, capsys, student, named) -> None:
    configured(workspace, student=student)
    ended = kava(capsys, "train", "tiny.yaml")
    assert ended.code == 2
    assert named in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not (workspace / "run" / "manifest.yaml").exists()


def test_no_teacher_needs_the_name_of_the_model(workspace, capsys) -> None:
    ended = kava(
        capsys, "train", "tiny.yaml", "teachers=[]", "loss.kl_weight=0", "loss.ce_weight=1"
    )
    assert ended.code == 2
    assert "name the model that is cut: cut.path" in ended.err
    healed = ["student.cut.path=big", "teachers=[]", "loss.kl_weight=0", "loss.ce_weight=1"]
    assert kava(capsys, "train", "tiny.yaml", *healed).code == 0
