"""Real processes that meet: what each of them has, and who did not come."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from kava_jax.parallel.hosts import absent, from_all, from_first, meet, on_host

# Joins the others as process {own}; ``hosts`` is the module.
JOINED = """
import sys, time
import jax
jax.config.update("jax_platforms", "cpu")
from kava_jax.errors import StoppedError
from kava_jax.parallel import hosts
from kava_jax.parallel.cluster import Cluster
own = int(sys.argv[1])
hosts.start(Cluster(sys.argv[2], int(sys.argv[3]), own))
"""


def ended(processes: int, program: str) -> list[str]:
    """What each of several processes printed; a fault in one is told with its words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Its output goes to stderr where processes are joined (see ``hosts``).
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED + program, str(own), address, str(processes)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in range(processes)
    ]
    found = [process.communicate(timeout=120) for process in running]
    for process, (_, words) in zip(running, found, strict=True):
        assert process.returncode == 0, words
    return [out for out, _ in found]


def test_who_does_not_come_is_named_with_the_place():
    """Two of three are late. The place can be met at again, once all are there."""
    late = """
hosts.meet("the door")
hosts.PATIENCE_SECONDS = 2
time.sleep(0 if own == 0 else 4)
try:
    hosts.meet("the bridge")
    print("crossed")
except StoppedError as error:
    print(error)
hosts.PATIENCE_SECONDS = 60
hosts.meet("the door")
"""
    first, *others = ended(3, late)
    words = "did not come to the place 'the bridge' within 2 s; look at what it says last, end all"
    assert first.startswith("processes 1, 2 ")
    assert words in first
    for other in others:  # what has timed out stays so: nobody crosses alone
        assert "crossed" not in other


def test_what_one_has_all_have():
    program = """
print(hosts.from_first(own + 7, "number"), hosts.from_all("é" * own, "text"))
print(len(hosts.from_all("x" * 9999, "long text")[1]))
"""
    assert ended(2, program) == ["7 ['', 'é']\n500\n"] * 2


def test_one_process_waits_for_nobody():
    meet("anywhere")
    assert from_first(3, "anywhere") == 3
    assert from_all("text", "anywhere") == ["text"]
    assert on_host(jax.numpy.arange(2), "anywhere").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("1\n\n\nRPC: /xla", "process 1"),
        (
            "/job:jax_worker/replica:0/task:12\n/job:jax_worker/replica:0/task:3\n",
            "processes 3, 12",
        ),
        ("", "a process"),
    ],
)
def test_a_timeout_of_a_library_is_read(listed, words):
    cause = RuntimeError(
        f"DEADLINE_EXCEEDED: Barrier timed out. Some timed out task names:\n{listed}"
    )
    error = TimeoutError("while waiting")
    error.__cause__ = cause
    assert absent(error) == words
    assert absent(RuntimeError("something else")) is None
