"""Sides of a benchmark, each in a process of its own, that take turns.

Libraries in one process disturb each other: threads of one wait by spinning on the cores that the
other computes on, and one allocator serves both. So each side is started as
``python -m kava_jax.bench.turns MODULE SIDE FOLDER``, where ``MODULE.ready(side, folder)`` loads
what the benchmark wrote to FOLDER, does the work once and says what came out. Then a line on stdin
is a turn, and the end of stdin is the end; every answer is one line of JSON.
"""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kava_jax.bench import timing
from kava_jax.errors import KavaError

# A turn of short work goes on for so many seconds.
TURN = 0.2

Facts = dict[str, Any]


class Ready(NamedTuple):
    """A side that has done its work once."""

    first: Facts
    """What it says of that first time."""
    run: Callable[[], Any]
    """Does the work again and waits for it."""
    last: Callable[[], Facts] = dict
    """What it says at its end."""


class Side:
    """A side's process, begun by ``side``."""

    def __init__(self, name: str, process: subprocess.Popen[str], stderr: Path):
        self.name = name
        self._process, self._stderr = process, stderr

    def answer(self) -> Facts:
        """Its next line; KavaError with the last it said on stderr when it has ended without."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        said = self._stderr.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise KavaError(f"{self.name} failed: {said[-1] if said else 'nothing was said'}")

    def turn(self) -> float:
        """Seconds of the work: of one run, or the mean of as many as fill a turn."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()["seconds"]

    def end(self) -> Facts:
        """What it says at its end."""
        assert self._process.stdin
        self._process.stdin.close()
        return self.answer()


@contextmanager
def side(module: str, name: str, folder: Path) -> Iterator[Side]:
    """Start a side; it does not outlive the ``with`` block."""
    stderr = folder / f"{name}.stderr"
    with stderr.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "kava_jax.bench.turns", module, name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield Side(name, process, stderr)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream
            stream.close()


class Taken(NamedTuple):
    """What a side said at first, the seconds of its turns, and what it said at last."""

    first: Facts
    seconds: list[float]
    last: Facts


def take_turns(
    module: str,
    sides: tuple[str, ...],
    folder: Path,
    check: Callable[[Mapping[str, Facts]], None],
    optional: tuple[str, ...] = (),
) -> dict[str, Taken | str]:
    """Let every side take ``timing.ROUNDS`` turns, one side after the other.

    Args:
        module: where ``ready`` is.
        sides: their names.
        folder: what they load from.
        check: of what all say at first; it raises KavaError where they do not do the same work.
        optional: sides that may fail; their last words stand instead of their figures.

    Raises KavaError when another side fails.
    """
    failed: dict[str, Taken | str] = {}
    with ExitStack() as stack:
        started = {name: stack.enter_context(side(module, name, folder)) for name in sides}
        first: dict[str, Facts] = {}
        for name, its in started.items():
            try:
                first[name] = its.answer()
            except KavaError as error:
                if name not in optional:
                    raise
                failed[name] = str(error)
        check(first)
        seconds: dict[str, list[float]] = {name: [] for name in first}
        for _ in range(timing.ROUNDS):
            for name in first:
                seconds[name].append(started[name].turn())
        taken = {name: Taken(first[name], seconds[name], started[name].end()) for name in first}
    return taken | failed


def main() -> None:
    """Be a side."""
    module, name, folder = sys.argv[1:]
    # What a library prints belongs elsewhere: stdout is read by a program.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: Facts) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        ready: Ready = importlib.import_module(module).ready(name, Path(folder))
    except KavaError as error:
        sys.exit(str(error))
    say(ready.first)
    for _ in sys.stdin:
        say({"seconds": _turn(ready.run)})
    say(ready.last())


def _turn(run: Callable[[], Any]) -> float:
    """Seconds of a long run; of short ones the mean of many, after one that is not counted."""
    started = time.perf_counter()
    run()
    once = time.perf_counter() - started
    if once > TURN:
        return once
    runs = math.ceil(TURN / once)
    started = time.perf_counter()
    for _ in range(runs):
        run()
    return (time.perf_counter() - started) / runs


if __name__ == "__main__":
    main()
