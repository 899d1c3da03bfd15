"""A run saved on eight devices goes on on two, and then on four, as if nothing had changed."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.runs.test_two_processes import assert_same_lines, lines, start
from tests.tiny import write_config, write_workspace
from tests.tolerances import TOL

STEPS, EVERY = 9, 3


def run(workspace: Path, name: str, devices: int) -> str:
    process = start(workspace, ["train", "run.yaml", f"run.dir={name}"], devices, [])
    _, words = process.communicate()
    assert process.returncode == 0, words
    return words


def cut_back(run_dir: Path, copy: Path, step: int) -> None:
    """A copy of a run as it stood when the checkpoint at ``step`` was its newest."""
    shutil.copytree(run_dir, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.long
def test_saved_on_eight_resumed_on_two_and_on_four(tmp_path: Path) -> None:
    write_workspace(tmp_path)
    train = {"steps": STEPS, "log_every": 1, "checkpoint_every": EVERY, "max_to_keep": 9}
    write_config(tmp_path / "run.yaml", train=train, mesh={"data": -1, "fsdp": 2})
    run(tmp_path, "whole", 8)
    cut_back(tmp_path / "whole", tmp_path / "moved", EVERY)
    assert f"continuing from the checkpoint at step {EVERY}" in run(tmp_path, "moved", 2)
    cut_back(tmp_path / "moved", tmp_path / "again", 2 * EVERY)
    assert f"continuing from the checkpoint at step {2 * EVERY}" in run(tmp_path, "again", 4)
    whole = lines(tmp_path / "whole")
    for name in ("moved", "again"):
        found = lines(tmp_path / name)
        assert_same_lines(found, whole)
        losses = [
            [line["loss"] for line in one if line["kind"] == "train"] for one in (found, whole)
        ]
        np.testing.assert_allclose(*losses, rtol=TOL["after_one_step"])
        assert len(losses[0]) == STEPS
