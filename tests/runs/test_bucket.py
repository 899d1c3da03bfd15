"""A run on a bucket: the same command gives the same run, and a kill leaves no trace there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.runs.test_two_processes import assert_same_lines
from tests.tiny import JOINED, write_config, write_workspace

# All of them are in the test extra; an environment that is kept for long may lack the newest.
pytest.importorskip("gcsfs", reason="gcsfs is in the gcs extra only")
pytest.importorskip("gcp_storage_emulator", reason="the bucket is in the test extra only")
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
STEPS = 6
TIMED = ("step_seconds", "tokens_per_second", "probe_seconds", "probe_share_of_time")
KAVA = [sys.executable, "-m", "kava_jax"]


class Bucket:
    """A workspace on disk, and a bucket that the processes started here see."""

    def __init__(self, workspace: Path, port: int):
        from tests.bucket import environment

        self.workspace = workspace
        self.environment = environment(port) | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(workspace / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._address = self.environment["STORAGE_EMULATOR_HOST"]

    def start(
        self, *arguments: str, to: IO[str] | int = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen:
        return subprocess.Popen(
            [*KAVA, *arguments],
            cwd=self.workspace,
            env=os.environ | self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=to,
            text=True,
        )

    def finish(self, *arguments: str) -> str:
        process = self.start(*arguments)
        out, words = process.communicate()
        assert process.returncode == 0, words
        return out + words

    def names(self, url: str) -> list[str]:
        """Of everything below, as Google lists it; URLs again."""
        name = urllib.parse.quote(url.removeprefix("gs://bucket/"), safe="")
        listed = self._ask(f"/storage/v1/b/bucket/o?prefix={name}%2F")
        return [f"gs://bucket/{item['name']}" for item in json.loads(listed).get("items", [])]

    def read(self, url: str) -> bytes:
        name = urllib.parse.quote(url.removeprefix("gs://bucket/"), safe="")
        return self._ask(f"/storage/v1/b/bucket/o/{name}?alt=media")

    def write(self, url: str, content: bytes) -> None:
        name = urllib.parse.quote(url.removeprefix("gs://bucket/"), safe="")
        self._ask(f"/upload/storage/v1/b/bucket/o?uploadType=media&name={name}", content)

    def _ask(self, query: str, content: bytes | None = None) -> bytes:
        with urllib.request.urlopen(self._address + query, content) as answer:
            return answer.read()

    def lines(self, run: str) -> list[dict]:
        """All of ``metrics.jsonl`` but the timings."""
        return untimed(self.read(f"{run}/metrics.jsonl").decode())

    def kill_when(self, run: str, seen: Callable[[], bool]) -> None:
        """Train until ``seen``, and kill at once."""
        with (self.workspace / "words").open("w+") as words:  # a pipe would be full some time
            process = self.start("train", "run.yaml", f"run.dir={run}", to=words)
            while process.poll() is None and not seen():
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            words.seek(0)
            assert process.returncode == -signal.SIGKILL, words.read()

    def saved(self, run: str) -> tuple[set[int], set[int]]:
        """The steps of whole checkpoints, and those of which only a part is there."""
        found = self.names(f"{run}/checkpoints")
        parts = [name.partition("/checkpoints/")[2].split("/", 1) for name in found]
        whole = {int(step) for step, name in parts if name == "commit_success.txt"}
        return whole, {int(step) for step, _ in parts} - whole


def untimed(text: str) -> list[dict]:
    found = [json.loads(line) for line in text.splitlines()]
    return [{key: x for key, x in line.items() if key not in TIMED} for line in found]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """The bucket, and beside it on disk ``whole``, the run that nobody disturbed."""
    place = write_workspace(tmp_path_factory.mktemp("bucket"))
    train = {"steps": STEPS, "log_every": 1, "eval_every": 4, "checkpoint_every": 2}
    write_config(place / "run.yaml", train=train | {"diagnose_every": 3})
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.bucket", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    found = Bucket(place, port)
    try:
        while server.poll() is None and not listens(port):
            time.sleep(0.05)
        found.finish("train", "run.yaml", "run.dir=whole")
        yield found
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def whole(bucket: Bucket) -> list[dict]:
    return untimed((bucket.workspace / "whole" / "metrics.jsonl").read_text())


@pytest.fixture(scope="module")
def killed(bucket: Bucket, whole: list[dict]) -> str:
    """A run that was killed between two checkpoints, then while saving, and then finished."""
    run = "gs://bucket/runs/killed"
    bucket.kill_when(run, lambda: 2 in bucket.saved(run)[0])
    # What stood there at the checkpoint is there, whatever came after it.
    until = [line for line in whole if line["step"] <= 2]
    assert bucket.lines(run)[: len(until)] == until
    bucket.kill_when(run, lambda: any(part > 2 for part in bucket.saved(run)[1]))
    saved, parts = bucket.saved(run)
    assert max(parts) > max(saved)
    words = bucket.finish("train", "run.yaml", f"run.dir={run}")
    assert f"continuing from the checkpoint at step {max(saved)}" in words
    return run


def test_a_killed_run_ends_up_as_if_nothing_had_happened(
    bucket: Bucket, whole: list[dict], killed: str
) -> None:
    assert bucket.lines(killed) == whole
    names = {"answers.jsonl", "config.yaml", "manifest.yaml", "projector.safetensors"}
    listed = {name.removeprefix(f"{killed}/").split("/")[0] for name in bucket.names(killed)}
    assert listed == names | {"checkpoints", "metrics.jsonl", "tensorboard"}
    ours = bucket.read(f"{killed}/answers.jsonl").decode()
    assert ours == (bucket.workspace / "whole" / "answers.jsonl").read_text()
    # No directory of that name was made where the command ran.
    assert not list(bucket.workspace.glob("gs*"))


def test_its_export_evaluation_and_report_are_those_of_a_run_on_disk(
    bucket: Bucket, killed: str
) -> None:
    for _ in range(2):  # the second takes the place of the first
        bucket.finish("export", killed, "--out", "gs://bucket/exported")
    bucket.finish("export", "whole", "--out", "exported")
    for path in (bucket.workspace / "exported").iterdir():
        if path.name != "README.md":  # the card names the command
            assert bucket.read(f"gs://bucket/exported/{path.name}") == path.read_bytes()
    arguments = ["--data", "data.jsonl", "--rows", "8", "--json"]
    evaluated = [bucket.start("eval", run, *arguments) for run in (killed, "whole")]
    ours, theirs = (process.communicate()[0] for process in evaluated)
    assert ours == theirs
    bucket.finish("report", killed)
    assert b"Step 6 of 6." in bucket.read(f"{killed}/report.html")


def test_two_processes_put_a_damaged_checkpoint_aside_and_go_on(
    bucket: Bucket, whole: list[dict], killed: str
) -> None:
    data = f"{killed}/checkpoints/6/default"
    name = next(path for path in bucket.names(data) if "/d/" in path)
    content = bytearray(bucket.read(name))
    content[len(content) // 2] ^= 1
    bucket.write(name, bytes(content))
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    arguments = ["train", "run.yaml", f"run.dir={killed}", "mesh.data=1", "mesh.fsdp=2"]
    alone = JOINED | {"JAX_NUM_CPU_DEVICES": "1"}
    # Into files: a pipe that nobody reads fills up with gcsfs's warnings, and its writer waits.
    said = [bucket.workspace / f"said_{number}.txt" for number in range(2)]
    with said[0].open("w") as first, said[1].open("w") as second:
        pair = [
            bucket.start(*flags, str(number), *arguments, to=words, **alone)
            for number, words in enumerate((first, second))
        ]
        for process in pair:
            process.communicate()
    words = said[0].read_text()
    # Of a failure both say something; gcsfs's warnings would leave no room for it.
    both = [path.read_text().splitlines() for path in said]
    told = [line for lines in both for line in lines if "gcsfs" not in line]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(told)
    assert "checkpoint 6 is damaged" in words
    assert "continuing from the checkpoint at step 4" in words
    names = bucket.names(killed)
    assert f"{killed}/checkpoints_damaged/6/default/sha256.json" in names
    # Each has written its own part of the new one.
    for number in range(2):
        assert f"{data}/ocdbt.process_{number}/manifest.ocdbt" in names
    assert_same_lines(bucket.lines(killed), whole)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "run.yaml", "run.dir=gs://nobodys/run"], "run.dir=gs://nobodys/run: the bucket"),
        (["export", "whole", "--out", "gs://nobodys/run"], "out=gs://nobodys/run: the bucket"),
        (["report", "gs://nobodys/run"], "run=gs://nobodys/run: the bucket"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bucket_that_cannot_be_reached_is_said_in_one_line(
    bucket: Bucket, arguments: list[str], told: str
) -> None:
    process = bucket.start(*arguments)
    out, words = process.communicate()
    assert process.returncode == 2, words
    *_, last = words.strip().splitlines()
    assert last.startswith(f"error: {told}")
    assert "Traceback" not in words + out
