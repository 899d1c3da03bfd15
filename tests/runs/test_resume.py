"""A run that goes on: in the memory of one state, from files that moved, for more steps."""

import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kava_jax.config.file import dump_config, load_config
from kava_jax.journal.checkpoint import Checkpoints
from kava_jax.journal.manifest import check_manifest
from kava_jax.runs.prepare import fingerprints_of, load_dataset, prepare
from kava_jax.runs.reopen import FREE_FIELDS, PATH_FIELDS, reopen, restore
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

QUICK: dict[str, Any] = {
    "data": CONFIG["data"] | {"eval_rows": 16},  # a tenth of the rows is less: 8 are held out
    "eval": {"max_new_tokens": 0, "batch_size": 8},
    "optimizer": {"student_lr": 1e-3},
    "loss": {"kv_weight": {"start": 1, "end": 0}},
}
CONSTANT = QUICK | {"optimizer": {"min_lr_ratio": 1.0}, "loss": {"kv_weight": 0.5}}
EVERY = ["train.log_every=1", "train.checkpoint_every=20", "train.diagnose_every=null"]


def trained(capsys, *changed: str) -> str:
    ended = kava(capsys, "train", "tiny.yaml", *EVERY, *changed)
    assert ended.code == 0, ended.err
    return ended.err


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def logged(run: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if record["kind"] == "train"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a run of four steps."""
    workspace = write_workspace(tmp_path_factory.mktemp("resume") / "work")
    write_config(workspace / "tiny.yaml", **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        train(load_config("tiny.yaml", [*EVERY, "train.steps=4"]), ["kava"])
    return workspace


@pytest.fixture
def workspace(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MOVES = {
    "teachers.0.path": ("teacher", "models/teacher"),
    "student.path": ("student", "models/student"),
    "data.path": ("data.jsonl", "rows/renamed.json"),
}


@pytest.mark.long
def test_everything_moved_and_twice_the_steps(workspace, monkeypatch, capsys):
    """Memory is counted where it is fullest: the state is read and nothing has been let go of."""
    gc.collect()
    before, counted = size(jax.live_arrays()), []
    read = Checkpoints.restore

    def counting(self, step, abstract):
        state = read(self, step, abstract)
        counted.append((size(state), size(jax.live_arrays()) - before))
        return state

    monkeypatch.setattr(Checkpoints, "restore", counting)
    for old, new in MOVES.values():
        (workspace / new).parent.mkdir(exist_ok=True)
        shutil.move(workspace / old, workspace / new)
    moved = [f"{field}={new}" for field, (_, new) in MOVES.items()]
    said = trained(capsys, "train.steps=8", *moved)
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    teacher = size(reopen(workspace / "run").blueprint.load_teachers())
    ((state, live),) = counted
    assert live <= 1.1 * (state + teacher)
    assert live >= state + teacher  # else something was not counted
    assert "continuing from the checkpoint at step 4" in said
    for field, (old, new) in MOVES.items():
        assert f'{field} "{old}" -> "{new}": another place, the same content' in said
    # By hand: a cosine from the peak to 0 at the last of 4 steps and of 8, and a line likewise.
    (line,) = [line for line in said.splitlines() if line.startswith("train.steps 4 -> 8: ")]
    assert "after step 4: lr_student 0 -> 0.0003887, lr_projector 0 -> 0.0003887" in line
    assert line.endswith(f"kv_weight 0 -> {1 - 4 / 7:.4g}")
    fifth = logged(workspace / "run")[5]
    assert fifth["lr_student"] == pytest.approx(1e-3 * (1 + math.cos(4 * math.pi / 7)) / 2)
    assert fifth["kv_weight"] == pytest.approx(1 - 4 / 7)


@pytest.mark.long
def test_a_run_extended_from_20_to_40_steps_is_the_uninterrupted_one(workspace, capsys):
    write_config(workspace / "tiny.yaml", **CONSTANT)
    trained(capsys, "train.steps=20", "run.dir=grown")
    said = trained(capsys, "train.steps=40", "run.dir=grown")
    assert "train.steps 20 -> 40: " in said
    assert "after step 20: all are as before" in said
    trained(capsys, "train.steps=40", "run.dir=whole")
    grown, whole = (
        {step: line["loss"] for step, line in logged(workspace / name).items()}
        for name in ("grown", "whole")
    )
    assert grown == whole
    assert sorted(grown) == list(range(1, 41))
    states = (restore(reopen(workspace / name)) for name in ("grown", "whole"))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_fewer_steps_than_are_done_are_refused(workspace, capsys):
    before = contents(workspace)
    ended = kava(capsys, "train", "tiny.yaml", *EVERY, "train.steps=3")
    assert ended.code == 2
    assert "train.steps=3 is less than the 4 steps that run.dir=run has done" in ended.err
    assert ended.err.count("\n") == 1
    assert contents(workspace) == before


SAME = {
    "another way to write it": ["data.path=./data.jsonl", "teachers.0.path=../{name}/teacher"],
    "absolute": ["student.path={here}/student", "teachers.0.path={here}/teacher"],
    "the tokenizer named": ["student.tokenizer=teacher"],
    "the tokenizer from elsewhere": ["student.tokenizer=builtin:tokenizer"],
    "held-out rows apart": ["data.path={here}/training.jsonl", "data.eval_path=held_out.jsonl"],
    "a split that a file does not have": ["data.split=validation", "data.subset=main"],
}


def cut_rows(workspace: Path, training: int) -> None:
    lines = (workspace / "data.jsonl").read_text().splitlines(keepends=True)
    (workspace / "training.jsonl").write_text("".join(lines[:training]))
    (workspace / "held_out.jsonl").write_text("".join(lines[training:]))


@pytest.mark.parametrize("what", SAME)
def test_another_name_for_the_same(what, workspace):
    cut_rows(workspace, 80)
    changed = [text.format(here=workspace, name=workspace.name) for text in SAME[what]]
    config = load_config("tiny.yaml", [*EVERY, "train.steps=4", *changed])
    run = prepare(config)
    found = {"config": dump_config(config), "fingerprints": fingerprints_of(run, load_dataset(run))}
    assert check_manifest(run.directory, free=FREE_FIELDS, paths=PATH_FIELDS, **found)


def other_tokenizer(workspace: Path) -> None:
    """The student elsewhere, with a tokenizer that gives the ids of Q and Z to each other."""
    shutil.copytree(workspace / "student", workspace / "other")
    path = workspace / "other/tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    found["model"]["vocab"] = vocabulary | {"Q": vocabulary["Z"], "Z": vocabulary["Q"]}
    path.write_text(json.dumps(found))
    (workspace / "teacher/tokenizer.json").unlink()  # else the two are found to disagree


OTHERS = {
    "teacher": (
        lambda here: write_model(here / "other", seed=9, num_hidden_layers=3),
        ["teachers.0.path=other"],
        "weights of teacher big",
    ),
    "student": (
        lambda here: write_model(here / "other", seed=9),
        ["student.path=other"],
        "student weights",
    ),
    "data": (
        lambda here: write_rows(here / "other.jsonl", 88, 5),
        ["data.path=other.jsonl"],
        "data",
    ),
    # The same text in the same order, but another row is the first that is held out.
    "held-out rows": (
        lambda here: cut_rows(here, 79),
        ["data.path=training.jsonl", "data.eval_path=held_out.jsonl"],
        "tokens of the data, or the tokenizer",
    ),
    "tokenizer": (
        other_tokenizer,
        ["student.path=other"],
        "tokens of the data, or the tokenizer",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_elsewhere_and_not_the_same_is_refused(what, workspace, capsys):
    arrange, changed, words = OTHERS[what]
    arrange(workspace)
    before = contents(workspace)
    ended = kava(capsys, "train", "tiny.yaml", *EVERY, "train.steps=4", *changed)
    assert ended.code == 2
    assert f"was started from other files: {words} " in ended.err
    assert ended.err.count("\n") == 1
    assert contents(workspace) == before


def test_a_calibration_is_not_measured_again_where_only_paths_changed(workspace, capsys):
    recipe = {"recipe": "calibrated"}
    write_config(workspace / "tiny.yaml", data=QUICK["data"], **recipe)
    assert kava(capsys, "calibrate", "tiny.yaml", "run.dir=fit").code == 0
    # Whoever measured again would write a file without this.
    path = workspace / "fit/calibration/calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mark": 1}))
    moved = ["teachers.0.path=./teacher", "student.path=./student", "data.path=./data.jsonl"]
    assert kava(capsys, "calibrate", "tiny.yaml", "run.dir=fit", *moved).code == 0
    assert json.loads(path.read_text())["mark"] == 1
    assert kava(capsys, "calibrate", "tiny.yaml", "run.dir=fit", "run.seed=1").code == 0
    assert "mark" not in json.loads(path.read_text())
