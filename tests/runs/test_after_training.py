"""Whatever fails after the last step costs no step: the same command finishes from there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kava_jax.journal.checkpoint import Checkpoints
from kava_jax.journal.manifest import read_manifest
from kava_jax.journal.monitor import Monitor
from kava_jax.runs import evaluate as evaluating
from kava_jax.runs import train as training
from kava_jax.runs.blueprint import Blueprint
from tests.tiny import kava, write_config, write_workspace

STEPS = 3
COMMAND = ("train", "short.yaml")
# The real command, killed by the system while it writes the last evaluation's answers.
KILLED = """
import os, signal
from kava_jax.cli import main
from kava_jax.runs import evaluate
evaluate.write_answers = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


class BrokenError(Exception):
    """What is injected."""


def broken(*arguments: object, **named: object) -> None:
    raise BrokenError


# What runs after the last step, in its order: measuring, recording, scoring, and the very last.
LATER = (
    (evaluating, "make_held_out", lambda *_: broken),
    (Monitor, "evaluation", broken),
    (Checkpoints, "score", broken),
    (training, "write_results", broken),
)


def no_step(self: Blueprint) -> object:
    pytest.fail("a step was asked for again")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_workspace(tmp_path_factory.mktemp("after"))
    # The only checkpoint on the way is that of step 2, and nothing was evaluated there.
    train = {"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "max_to_keep": 1}
    write_config(place / "short.yaml", train=train)
    return place


def left(run: Path) -> list[dict]:
    """All of ``metrics.jsonl`` but the timings."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if "second" not in key} for line in found]


def check_saved(run: Path) -> None:
    with Checkpoints(run, 1, read_only=True) as checkpoints:
        assert checkpoints.newest_intact(pytest.fail) == STEPS


@pytest.mark.long
def test_what_fails_after_the_last_step_is_done_again_and_no_step_is(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    ended = kava(capsys, *COMMAND, "run.dir=whole")
    assert ended.code == 0, ended.err

    run = workspace / "broken"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *COMMAND, "run.dir=broken"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (run / "answers.jsonl").exists()
    check_saved(run)

    monkeypatch.setattr(Blueprint, "jitted_step", lambda self: no_step)
    for owner, name, fails in LATER:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(BrokenError):
                kava(capsys, *COMMAND, "run.dir=broken")
        check_saved(run)
        assert read_manifest(run)["results"] is None

    ended = kava(capsys, *COMMAND, "run.dir=broken")
    assert ended.code == 0, ended.err
    assert left(run) == left(workspace / "whole")
    for name in ("answers.jsonl", "projector.safetensors"):
        assert (run / name).read_bytes() == (workspace / "whole" / name).read_bytes()
    assert read_manifest(run)["results"]
    for directory in (run, workspace / "whole"):
        with Checkpoints(directory, 1, read_only=True) as checkpoints:
            assert checkpoints.steps() == [STEPS]
            assert checkpoints.choose("best") == STEPS
    metrics = Path("checkpoints", str(STEPS), "metrics", "metrics")
    scored = [json.loads((place / metrics).read_text()) for place in (run, workspace / "whole")]
    assert scored[0] == scored[1]
    assert scored[0]["eval_loss"] == left(run)[-1]["eval_loss"]
