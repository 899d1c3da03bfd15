"""Two real processes share a run and survive each other (that they equal one: test_processes)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kava_jax.journal.lock import exclusive
from tests.tiny import CONFIG, JOINED, write_config, write_workspace
from tests.tolerances import TOL

pytestmark = pytest.mark.long

STEPS = 6
TIMED = ("step_seconds", "tokens_per_second", "probe_seconds", "probe_share_of_time")
ROOT = Path(__file__).parents[2]
# The others end so many seconds after a process has died.
LIMIT = 60
# The command with a heartbeat that is missed after 10 s; JAX's default, which it has, is 100 s.
IMPATIENT = """
import functools, jax
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, heartbeat_timeout_seconds=10
)
from kava_jax.cli import main
main()
"""


def start(
    workspace: Path,
    arguments: list[str],
    devices: int,
    flags: list[str],
    program: tuple[str, ...] = ("-m", "kava_jax"),
):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(workspace / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment |= JOINED if flags else {}
    return subprocess.Popen(
        [sys.executable, *program, *flags, *arguments],
        cwd=workspace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one(workspace: Path, *arguments: str) -> str:
    """One process with two devices; what it printed."""
    process = start(workspace, list(arguments), 2, [])
    out, words = process.communicate()
    assert process.returncode == 0, words
    return out


def pair(
    workspace: Path, *arguments: str, program: tuple[str, ...] = ("-m", "kava_jax")
) -> list[subprocess.Popen]:
    """Two processes with a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            workspace,
            list(arguments),
            1,
            ["--coordinator", address, "--processes", "2", "--process", str(number)],
            program,
        )
        for number in range(2)
    ]


def both(workspace: Path, *arguments: str) -> list[str]:
    """What each of two processes printed."""
    ended = [(process, *process.communicate()) for process in pair(workspace, *arguments)]
    for process, _, words in ended:
        assert process.returncode == 0, words
    return [out for _, out, _ in ended]


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in TIMED} for line in found]


def assert_same_lines(left: list[dict], right: list[dict]) -> None:
    assert [(x["step"], x["kind"]) for x in left] == [(x["step"], x["kind"]) for x in right]
    for ours, theirs in zip(left, right, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"kind", "layers"}:
            assert ours[key] == pytest.approx(theirs[key], rel=TOL["float32"], abs=TOL["float32"])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process and by two, weights split over both."""
    place = write_workspace(tmp_path_factory.mktemp("two"))
    write_config(
        place / "run.yaml",
        data=CONFIG["data"] | {"batching": "bucketed", "bucket": 16},
        train={"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "eval_every": 3},
        mesh={"data": 1, "fsdp": 2},
    )
    one(place, "train", "run.yaml", "run.dir=single")
    both(place, "train", "run.yaml", "run.dir=double")
    return place


def test_training_evaluating_and_answering_are_those_of_one(workspace: Path) -> None:
    single, double = workspace / "single", workspace / "double"
    assert_same_lines(lines(double), lines(single))
    assert (double / "answers.jsonl").read_text() == (single / "answers.jsonl").read_text()
    arguments = ["--data", "data.jsonl", "--rows", "16", "--json"]
    alone = json.loads(one(workspace, "eval", "single", *arguments))
    first, second = both(workspace, "eval", "double", *arguments)
    assert second == ""  # only the first process speaks
    found = json.loads(first)
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        assert found[key] == pytest.approx(value, rel=TOL["float32"], abs=TOL["float32"])


def test_a_damaged_file_of_the_second_process_is_told_by_both(workspace: Path) -> None:
    shutil.copytree(workspace / "double", workspace / "damaged")
    written = workspace / "damaged" / "checkpoints" / str(STEPS) / "default"
    for number in range(2):  # each took the digests of what it wrote, and of nothing else
        listed = json.loads((written / f"sha256.{number}.json").read_text())
        assert listed
        assert all(f"process_{number}" in name for name in listed)
    path = max((written / "ocdbt.process_1").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    for process in pair(workspace, "eval", "damaged", "--data", "data.jsonl"):
        _, words = process.communicate()
        assert process.returncode == 2, words
        name = path.relative_to(written)
        assert f"is damaged ({name} has changed since it was written)" in words


def test_a_pair_that_finds_the_directory_in_use_ends_with_one_line_each(workspace: Path) -> None:
    with exclusive(workspace / "held", "run.dir"):
        for process in pair(workspace, "train", "run.yaml", "run.dir=held"):
            _, words = process.communicate(timeout=LIMIT)
            assert process.returncode == 2, words
            told = [line for line in words.splitlines() if line.startswith("error: ")]
            assert told == [words.splitlines()[-1]]
            assert f"run.dir=held is in use by process {os.getpid()} on " in told[0]


def test_when_one_is_killed_the_other_ends_and_the_pair_resumes(workspace: Path) -> None:
    arguments = ["train", "run.yaml", "run.dir=killed"]
    first, second = pair(workspace, *arguments, program=("-c", IMPATIENT))
    metrics = workspace / "killed" / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    first.communicate(timeout=LIMIT)
    assert first.returncode not in (0, None)
    both(workspace, "train", "run.yaml", "run.dir=killed")
    # Not bit for bit: sums over processes come in no fixed order.
    assert_same_lines(lines(workspace / "killed"), lines(workspace / "double"))


def test_ctrl_c_on_one_saves_the_same_step_on_both(workspace: Path) -> None:
    first, second = pair(workspace, "train", "run.yaml", "run.dir=asked", "train.steps=100000")
    metrics = workspace / "asked" / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
        time.sleep(0.02)
    second.send_signal(signal.SIGINT)
    ended = [(*process.communicate(timeout=300), process.returncode) for process in (first, second)]
    assert [code for _, _, code in ended] == [75, 75], ended
    # Beside our line stand those of JAX's own threads.
    told = [line for _, words, _ in ended for line in words.splitlines() if "preempted: " in line]
    (said,) = set(told)
    assert len(told) == 2
    step = said.removeprefix("preempted: saved at step ").split(";")[0]
    written = workspace / "asked" / "checkpoints" / step / "default"
    found = {path.name for path in written.glob("sha256.?.json")}
    assert found == {"sha256.0.json", "sha256.1.json"}
