"""Signals at exact moments of real commands: each ends with 130 or 75, one line and no traceback.

The runs are so long that one whose signal is lost does not end by itself.
"""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kava_jax.journal.checkpoint import Checkpoints
from kava_jax.journal.manifest import read_manifest
from tests.tiny import CONFIG, contents, write_config, write_workspace

ROOT = Path(__file__).parents[1]
# As long as nobody waits; only a signal that is lost takes this long.
LIMIT = 300
# Each is a process of its own. `make test` sends one signal of each kind: before the first step,
# after it, and one that is not Ctrl-C.
LONG = pytest.mark.long
# Sends this process the signal at a moment. Of ``MODULE:NAME#2``: when it is called a second time.
PROGRAM = """
import importlib, os, signal, sys, time
import kava_jax.cli as cli
number, moment = int(sys.argv.pop(1)), sys.argv.pop(1)
def send(sent=[]):
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), number)
%s
cli.main()
"""
AT_A_CALL = """
import kava_jax.cli.app as app
def patch(verbose):
    where, _, count = moment.partition("#")
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    place = importlib.import_module(module)
    for each in outer:
        place = getattr(place, each)
    called, left = getattr(place, name), [None] * int(count or 1)
    def calls(*args, **kwargs):
        left.pop() if left else None
        left or send()
        return called(*args, **kwargs)
    setattr(place, name, calls)
import kava_jax.cli.logs as logs
logs.show_logs = patch  # the first thing that every command calls
"""
# In the midst of an import, by a finder that finds nothing.
AT_AN_IMPORT = """
class Finder:
    def find_spec(name, *_):
        if name == moment:
            send()
sys.meta_path.insert(0, Finder)
"""
# Nothing can be raised out of a garbage collection, where JAX too runs code of its own.
IN_A_COLLECTION = """
import gc
gc.callbacks.append(lambda *_: moment in sys.modules and send())
"""
# As in code that is not Python: signals reach another thread, the main one does not come back.
STUCK = """
import kava_jax.cli.logs as logs
def stuck(verbose):
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    send()
    time.sleep(3600)
logs.show_logs = stuck
"""
# Some libraries catch everything.
SWALLOWED = """
import kava_jax.cli.logs as logs
def swallow(verbose):
    try:
        send()
        time.sleep(1)
    except BaseException:  # some libraries swallow whatever comes
        pass
    time.sleep(3600)
logs.show_logs = swallow
"""
# It happens that an exception of another kind takes the place of the interrupt.
DISGUISED = """
import kava_jax.cli.logs as logs
def disguise(verbose):
    try:
        send()
        time.sleep(1)
    except KeyboardInterrupt:
        raise RuntimeError("INTERNAL: CpuCallback error: KeyboardInterrupt")
logs.show_logs = disguise
"""


@pytest.fixture(scope="module", autouse=True)
def heard() -> Iterator[None]:
    """Children hear what the process that runs the tests may have been told to ignore."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_workspace(tmp_path_factory.mktemp("signals"))
    # No teacher, one length of rows: little is compiled.
    common = {
        "data": CONFIG["data"] | {"batching": "bucketed", "bucket": 64},
        "teachers": [],
        "student": {"path": "student", "tokenizer": "student"},
        "eval": {"max_new_tokens": 0, "batch_size": 8},
    }
    train = {"log_every": 1, "checkpoint_every": 3, "eval_every": 2}
    write_config(place / "long.yaml", train={"steps": 10**6, **train}, **common)
    write_config(place / "short.yaml", train={"steps": 2, **train}, **common)
    grid = {
        "name": "grid",
        "config": "long.yaml",
        "seeds": [1, 2],
        "score": "eval_loss",
        "baseline": "a",
        "contrast": "b",
        "arms": {"a": {}, "b": {"train.steps": 10**5}},
    }
    (place / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    return place


class Ended(NamedTuple):
    code: int
    lines: list[str]


def begin(workspace: Path, *command: str, to: int = subprocess.PIPE, **more) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workspace / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=workspace,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=to,
        text=True,
        **more,
    )


def end(process: subprocess.Popen) -> Ended:
    try:
        _, said = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it goes on: {process.communicate()[1]}")
    assert "Traceback" not in said, said
    assert "ignored" not in said, said
    return Ended(process.returncode, said.splitlines())


def signalled(
    workspace: Path, way: str, moment: str, *command: str, number: int = signal.SIGINT
) -> Ended:
    return end(begin(workspace, "-c", PROGRAM % way, str(int(number)), moment, *command))


@pytest.mark.parametrize(
    ("way", "moment"),
    [
        pytest.param(AT_A_CALL, "kava_jax.config.file:load_config", id="config"),
        pytest.param(AT_AN_IMPORT, "kava_jax.cli.studies", id="first import", marks=LONG),
        pytest.param(AT_AN_IMPORT, "numpy", id="import of numpy", marks=LONG),
        pytest.param(AT_AN_IMPORT, "jaxlib", id="import of jaxlib", marks=LONG),
        pytest.param(IN_A_COLLECTION, "flax", id="garbage collection", marks=LONG),
        pytest.param(STUCK, "", id="stuck", marks=LONG),
        pytest.param(SWALLOWED, "", id="swallowed", marks=LONG),
        pytest.param(DISGUISED, "", id="disguised", marks=LONG),
        pytest.param(AT_A_CALL, "kava_jax.data.text:Encoder.encode_all", id="tokens", marks=LONG),
        pytest.param(AT_A_CALL, "jax.stages:Lowered.compile", id="compilation", marks=LONG),
    ],
)
def test_before_there_is_anything_to_save_ctrl_c_is_130(workspace, way, moment):
    ended = signalled(workspace, way, moment, "train", "long.yaml", "run.dir=unsaved")
    assert ended.code == 130
    assert ended.lines[-1].startswith("interrupted (Ctrl-C): ")


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("kava_jax.journal.lines:Lines.step", id="step"),
        pytest.param("kava_jax.runs.loop:_evaluated#2", id="evaluation", marks=LONG),
        pytest.param("kava_jax.journal.checkpoint:Checkpoints.save", id="checkpoint", marks=LONG),
    ],
)
def test_after_a_step_ctrl_c_saves_and_is_75(workspace, moment, request):
    run = f"saved-{request.node.callspec.id}"
    ended = signalled(workspace, AT_A_CALL, moment, "train", "long.yaml", f"run.dir={run}")
    check_saved(workspace / run, ended)


def check_saved(run: Path, ended: Ended) -> None:
    assert ended.code == 75
    step = int(ended.lines[-1].removeprefix("preempted: saved at step ").split(";")[0])
    with Checkpoints(run, 9, read_only=True) as checkpoints:
        assert step in checkpoints.steps()
        assert checkpoints.newest_intact(pytest.fail) == step


@pytest.fixture(scope="module")
def last(workspace) -> Ended:
    """A run that is asked to end while it writes its last file, ``run``."""
    moment = "kava_jax.runs.train:write_results"
    return signalled(workspace, AT_A_CALL, moment, "train", "short.yaml")


@LONG
def test_while_the_last_things_are_written_nothing_is_lost(workspace, last):
    assert last.code == 75
    assert last.lines[-1].startswith("preempted: saved at step 2, the last; ")
    assert read_manifest(workspace / "run")["results"]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=LONG)])
def test_other_signals_before_a_step_mean_call_again(workspace, number):
    moment, command = "kava_jax.config.file:load_config", ("train", "long.yaml", "run.dir=none")
    ended = signalled(workspace, AT_A_CALL, moment, *command, number=number)
    assert ended == (
        75,
        [f"interrupted ({number.name}): what was complete stays; the same command starts again"],
    )


def test_what_nohup_ignores_stays_ignored(workspace):
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + PROGRAM % AT_A_CALL
    command = ("-c", program, str(int(signal.SIGHUP)), "kava_jax.config.file:load_config")
    ended = end(begin(workspace, *command, "train", "absent.yaml"))
    assert ended.code == 2
    assert ended.lines[-1].startswith("error: config='absent.yaml'")


@LONG
def test_a_closed_terminal_does_not_keep_a_run_from_saving(workspace):
    ours, terminal = pty.openpty()
    program = "import fcntl, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0)" + PROGRAM % ""
    command = ("-c", program, "0", "", "train", "long.yaml", "run.dir=closed")
    process = begin(workspace, *command, to=terminal, start_new_session=True)
    os.close(terminal)
    metrics, deadline = workspace / "closed" / "metrics.jsonl", time.monotonic() + LIMIT
    os.set_blocking(ours, False)
    while not (metrics.is_file() and '"kind": "train"' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            os.read(ours, 1 << 16)  # else the run would wait for room
        except BlockingIOError:
            time.sleep(0.02)
    os.close(ours)
    assert process.wait(LIMIT) == 75
    with Checkpoints(workspace / "closed", 9, read_only=True) as checkpoints:
        assert checkpoints.newest_intact(pytest.fail)


@LONG
@pytest.mark.parametrize(
    ("moment", "command"),
    [
        (
            "kava_jax.alignment.projector:KVDimensionProjector.save",
            ("calibrate", "tiny.yaml", "recipe=calibrated", "run.dir=measured"),
        ),
        ("kava_jax.hf.export:save_file", ("export", "run", "--out", "exported")),
        ("kava_jax.runs.assess:evaluate", ("eval", "student", "--data", "data.jsonl")),
    ],
    ids=["calibrate", "export", "eval"],
)
def test_other_commands_leave_nothing_that_looks_whole(workspace, last, moment, command):
    before = contents(workspace)
    ended = signalled(workspace, AT_A_CALL, moment, *command)
    assert ended.code == 130
    assert ended.lines[-1].startswith("interrupted (Ctrl-C): ")
    after = {name: file for name, file in contents(workspace).items() if file is not None}
    assert [name for name in after if name not in before and "compiled/" not in name] == []


@LONG
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core, which is not shared out")
def test_a_grid_ends_its_runs(workspace):
    """Only the grid is told, as ``kill -INT`` does; at a terminal its runs hear Ctrl-C too.

    The moment is the worst: the second run has begun, and nobody has written it down.
    """
    grid = ("ablate", "grid.yaml", "--out", "grid", "--jobs", "2")
    ended = signalled(workspace, AT_A_CALL, "os:sched_setaffinity#2", *grid)
    assert ended.code == 130
    assert len(ended.lines) == 1
    deadline = time.monotonic() + LIMIT
    while going := processes_in(workspace):
        assert time.monotonic() < deadline, going
        time.sleep(0.02)
    assert not list((workspace / "grid").glob("[ab].json"))


def processes_in(folder: Path) -> list[Path]:
    """What runs there, whoever has started it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if (process / "cwd").readlink() == folder:
                found.append(process)
    return found
