"""A finished run whose teachers were moved or deleted: what needs only the student still works."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from kava_jax.runs.reopen import reopen, reopen_student, restore, restore_student
from tests.tiny import contents, kava, write_config, write_model, write_workspace
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, and a run that learns from nothing else."""
    place = write_workspace(tmp_path_factory.mktemp("gone"))
    write_model(place / "models" / "other", seed=3)  # reads as a hub id
    write_config(
        place / "tiny.yaml",
        teachers=[{"name": "big", "path": "teacher"}, {"name": "other", "path": "models/other"}],
        loss={"ce_weight": 0.0},
        train={"steps": 1, "log_every": 1},
    )
    return place


@pytest.mark.long
def test_export_evaluation_and_report_do_without_the_teachers(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)

    def done(*arguments: str):
        ended = kava(capsys, *arguments)
        assert ended.code == 0, ended.err
        return ended

    done("train", "tiny.yaml")
    done("export", "run", "--out", "with")
    whole = restore(reopen(Path("run"))).params["student"]
    evaluation = ("eval", "run", "--data", "data.jsonl", "--json")
    full = json.loads(done(*evaluation).out)

    (workspace / "teacher").rename(workspace / "moved")
    (workspace / "models").rename(workspace / "elsewhere")
    step, alone = restore_student(reopen_student(Path("run")))
    assert step == 1
    assert jax.tree.structure(alone) == jax.tree.structure(whole)
    for left, right in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
        assert left.sharding == right.sharding
        np.testing.assert_array_equal(left, right)
    done("export", "run", "--out", "without")
    assert contents(workspace / "without") == contents(workspace / "with")

    ended = done(*evaluation)
    found = json.loads(ended.out)
    assert "teachers.0.path='teacher' is gone: alignment" in ended.err
    assert "teachers.1.path='models/other' is gone" in ended.err
    assert found["eval_loss"] == pytest.approx(full["eval_loss"], rel=TOL["rearranged"])
    shared = {key: full[key] for key in ("eval_rows", "exact_match_strict", "exact_match_rows")}
    assert shared.items() <= found.items()
    assert not [key for key in found if "cos" in key]
    done("report", "run")

    ended = kava(capsys, "train", "tiny.yaml", "train.steps=2")
    assert ended.code == 2
    assert "teachers.0.path='teacher', teachers.1.path='models/other': a directory" in ended.err
    moved = ("teachers.0.path=moved", "teachers.1.path=elsewhere/other")
    assert "another place" in done("train", "tiny.yaml", "train.steps=2", *moved).err


@pytest.mark.long
def test_a_fresh_student_needs_the_teacher_that_gave_its_tokenizer(tmp_path, monkeypatch, capsys):
    write_workspace(tmp_path)
    geometry = json.loads((tmp_path / "student" / "config.json").read_text())
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept += ("num_attention_heads", "num_key_value_heads")
    student = {"geometry": {key: geometry[key] for key in kept}}
    write_config(
        tmp_path / "tiny.yaml",
        student=student,
        train={"steps": 1, "log_every": 1, "diagnose_every": None},
        eval={"max_new_tokens": 0},
    )
    monkeypatch.chdir(tmp_path)
    assert kava(capsys, "train", "tiny.yaml").code == 0
    assert kava(capsys, "export", "run", "--out", "with").code == 0
    shutil.move("teacher", "moved")
    ended = kava(capsys, "export", "run", "--out", "without")
    assert ended.code == 2
    assert "teachers.0.path='teacher': a directory when the run was made, and gone" in ended.err
    Path("teacher").symlink_to("moved")  # the remedy that it names
    assert kava(capsys, "export", "run", "--out", "without").code == 0
    assert contents(tmp_path / "without") == contents(tmp_path / "with")
