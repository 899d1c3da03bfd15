"""Real processes that are killed: whatever the moment, the run ends up as if nothing happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kava_jax.journal.checkpoint import Checkpoints
from kava_jax.journal.manifest import read_manifest
from tests.tiny import write_config, write_workspace

STEPS, KILLS = 12, 10
TIMED = ("step_seconds", "tokens_per_second", "probe_seconds", "probe_share_of_time")


def command(workspace: Path, name: str, *changed: str) -> subprocess.Popen:
    """The real ``kava train``; compiled programs are shared, so that a restart is quick."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workspace / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "kava_jax", "train", "long.yaml", f"run.dir={name}", *changed],
        cwd=workspace,
        env=os.environ | cache | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workspace: Path, name: str, *changed: str) -> str:
    process = command(workspace, name, *changed)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


def lines(run: Path) -> list[dict]:
    """All of ``metrics.jsonl`` but the timings, which are the only thing that may differ."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in TIMED} for line in found]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one run that nobody disturbed."""
    place = write_workspace(tmp_path_factory.mktemp("killed"))
    write_config(
        place / "long.yaml",
        train={
            "steps": STEPS,
            "log_every": 1,
            "eval_every": 4,
            "checkpoint_every": 2,
            "diagnose_every": 3,
        },
        eval={"max_new_tokens": 0, "batch_size": 8},
    )
    finish(place, "whole")
    return place


def began(process: subprocess.Popen, run: Path, seconds: float) -> None:
    """Wait until the run has written a line, or has ended."""
    size = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size != size:
            return
        time.sleep(0.005)


@pytest.mark.long
def test_ten_kills_at_random_moments_leave_no_trace(workspace: Path) -> None:
    run, chance, killed, during_save = workspace / "killed", random.Random(0), 0, 0
    while killed < KILLS:
        process = command(workspace, "killed")
        began(process, run, 120)
        # Half of the kills wait for a checkpoint that is being written.
        if killed % 2:
            partial = list((run / "checkpoints").glob("*tmp*"))
            while process.poll() is None and not partial:
                time.sleep(0.001)
                partial = list((run / "checkpoints").glob("*tmp*"))
            during_save += bool(partial)
        else:
            time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        killed += 1
        if read_manifest(run)["results"]:  # it had ended: another run, to be killed as well
            run.rename(workspace / f"killed-{killed}")
            assert lines(workspace / f"killed-{killed}") == lines(workspace / "whole")
    assert during_save
    finish(workspace, "killed")
    assert lines(run) == lines(workspace / "whole")


@pytest.fixture
def small_disk(workspace: Path) -> Iterator[Path]:
    """A file system of its own inside the workspace, with room for a few checkpoints."""
    place = workspace / "small_disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.long
def test_a_full_disk_ends_the_run_with_its_checkpoints_whole(
    workspace: Path, small_disk: Path
) -> None:
    changed = ["train.checkpoint_every=1", "train.max_to_keep=99"]
    process = command(workspace, "small_disk/run", *changed)
    said = process.communicate()[1]
    assert process.returncode == 1, said
    # Beside our line the threads of TensorStore and TensorBoard may print their own words.
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "no space is left on the disk" in told[0]
    with Checkpoints(small_disk / "run", 99, read_only=True) as checkpoints:
        kept = checkpoints.steps()
        assert 1 < len(kept) < STEPS
        assert checkpoints.newest_intact(pytest.fail) == kept[-1]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    finish(workspace, "small_disk/run", *changed)
    assert lines(small_disk / "run") == lines(workspace / "whole")


@pytest.mark.long
def test_a_term_signal_saves_and_the_same_command_goes_on(workspace: Path) -> None:
    process = command(workspace, "asked")
    metrics = workspace / "asked" / "metrics.jsonl"
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        began(process, workspace / "asked", 120)  # before a step there is nothing to save
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    *_, last = said.strip().splitlines()
    assert last.startswith("preempted: saved at step ")
    step = int(last.split()[4].rstrip(";"))
    assert (workspace / "asked" / "checkpoints" / str(step)).is_dir()
    assert f"continuing from the checkpoint at step {step}" in finish(workspace, "asked")
    assert lines(workspace / "asked") == lines(workspace / "whole")
