"""The lock on a directory that is written to: real processes, a real kill."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from kava_jax.errors import KavaError
from kava_jax.journal.lock import LOCK_NAME, exclusive
from tests.tiny import contents, kava, write_config, write_workspace

STEPS = 24
RUN = ("train", "long.yaml")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tmp_path = tmp_path / "workspace"
    tmp_path.mkdir()
    write_workspace(tmp_path)
    write_config(
        tmp_path / "long.yaml",
        train={"steps": STEPS, "log_every": 1, "checkpoint_every": 4},
        eval={"max_new_tokens": 0, "batch_size": 8},
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(workspace: Path, *arguments: str) -> subprocess.Popen:
    """A command in a process of its own; one device and kept programs, to be quick."""
    own = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(workspace.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "kava_jax", *arguments],
        cwd=workspace,
        env=os.environ | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def halted(workspace: Path) -> subprocess.Popen:
    """A real ``kava train`` that stands still in the middle of its run."""
    process = started(workspace, *RUN)
    while process.poll() is None and not (workspace / "run" / "checkpoints" / "4").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None
    return process


@pytest.mark.long
def test_a_second_writer_is_refused_and_readers_are_not_until_the_first_is_killed(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = halted(workspace)
    try:
        before = contents(workspace)
        for arguments in (RUN, ("calibrate", "long.yaml", "recipe=calibrated")):
            ended = kava(capsys, *arguments)
            assert ended.code == 2
            (line,) = ended.err.splitlines()
            assert line.startswith(f"error: run.dir=run is in use by process {first.pid} on ")
        assert contents(workspace) == before
        assert started(workspace, "eval", "run", "--data", "data.jsonl", "--rows", "8").wait() == 0
    finally:
        first.kill()
        first.wait()
    assert (workspace / "run" / LOCK_NAME).exists()  # a file that nobody holds
    assert started(workspace, *RUN).wait() == 0
    lines = [json.loads(x) for x in (workspace / "run/metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1))
    assert not (workspace / "run" / LOCK_NAME).exists()


def test_what_was_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with exclusive(place, "out") as note:
        assert note is None
        assert (place / LOCK_NAME).is_file()
    assert contents(tmp_path) == {}
    with exclusive(place, "out"):
        (place.parent / "kept").touch()
    assert contents(tmp_path) == {"a": None, "a/kept": b""}


def test_a_lock_file_that_its_holder_has_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path, "out"):
        assert len(calls) == 2
        with pytest.raises(KavaError, match="in use"), exclusive(tmp_path, "out"):
            pass
    with exclusive(tmp_path, "out"):  # free again
        pass


def test_where_there_is_no_lock_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(tmp_path, "run.dir") as note:
        assert note is not None
        assert "No locks available" in note
    with exclusive(epath.Path("gs://bucket/run"), "run.dir") as note:
        assert note is not None
        assert "run.dir=gs://bucket/run is not locked" in note
