"""How everything here is measured: each side in a process of its own, all of them in turns.

Libraries in one process disturb each other: threads of one wait by spinning on the cores that the
other computes on, and one allocator serves both. So a benchmark names its sides, and each side is a
function that is called in a new process. Numbers that all sides have to give are compared before
anything is timed. As the sides take turns, a slow moment of the machine falls on all of them.
"""

import math
import multiprocessing
import os
import statistics
import timeit
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from kava_jax.errors import KavaError
from kava_jax.plan.compiled import memory_of

ROUNDS = 7
# A fork copies JAX's locks without the threads that hold them, and can deadlock.
_SPAWN = multiprocessing.get_context("spawn")

Facts = dict[str, Any]


class Side(NamedTuple):
    """What a side's function returns in the process that was started for it."""

    run: Callable[[], Any]
    """Does the work and waits for it. Returns the arrays that every side has to give, as a tree."""
    facts: Mapping[str, Any] = {}
    """Told before the work is done for the first time; ``tokens``, ``flops`` and ``bytes`` are
    per run."""
    last: Callable[[], Facts] = dict
    """Gives what is told after the last turn."""
    compared: bool = True
    """Whether what ``run`` returns is compared with the other sides'."""


# A function of a module, or a ``partial`` of one: it is pickled.
Make = Callable[[], Side]


def compare(
    sides: Mapping[str, Make], tolerance: float = 0.0, optional: tuple[str, ...] = ()
) -> Facts:
    """Let every side work once, compare what they give, and let each take ``ROUNDS`` turns.

    The first side is ours. Arrays have to agree with the first side that gives any:
    ``max|a - b| <= tolerance * max|a|`` of each. ``optional`` sides may fail.

    Returns by side: ``seconds`` (median, least, most), ``times_ours``, ``facts``, their rates
    (``tokens_per_second``), ``differences``, and the last words of those that ``failed``. Raises
    KavaError when another side fails, or one gives other numbers.
    """
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        processes = {name: _start(make, stack) for name, make in sides.items()}

        def each(question: str = "") -> Facts:
            answers: Facts = {}
            for name in [name for name in sides if name not in failed]:
                try:
                    answers[name] = _answer(*processes[name], question)
                except KavaError as error:
                    failed[name] = str(error)
                    if name not in optional:
                        raise KavaError(f"{name} failed: {error}") from None
            return answers

        # Facts come before the first run: a side without room for it has told its memory by then.
        facts = each()
        differences = _differences(each(), tolerance)
        rounds = [each("turn") for _ in range(ROUNDS)]
        last = each("end")
    seconds = {name: _summary([turns[name] for turns in rounds]) for name in last}
    medians = {name: own["median"] for name, own in seconds.items()}
    # Where our own side is optional and failed, there is nothing to take a multiple of.
    ours = medians.get(next(iter(sides)), math.nan)
    rates = {
        what: {name: facts[name][what] / m for name, m in medians.items() if what in facts[name]}
        for what in ("tokens", "flops", "bytes")
    }
    return {
        "seconds": seconds,
        "times_ours": {name: median / ours for name, median in medians.items()},
        **{f"{what}_per_second": own for what, own in rates.items() if own},
        "facts": {name: own | last.get(name, {}) for name, own in facts.items()},
        "differences": differences,
        "failed": failed,
    }


def compiled(program: Callable[..., Any], *given: Any, compared: bool = True, **facts: Any) -> Side:
    """A JAX function as a side, compiled for these arguments; ``temporaries`` are bytes."""
    made = jax.jit(program).lower(*given).compile()
    told = facts | {"temporaries": memory_of(made).temporaries}
    return Side(lambda: jax.block_until_ready(made(*given)), told, compared=compared)


def peer_version(package: str) -> str:
    """Version of a package that is compared with and not depended on; KavaError without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise KavaError(
            f"this benchmark compares with {package}, which is not installed; pip install {package}"
        ) from None


def _summary(seconds: list[float]) -> dict[str, float]:
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    return {"median": median, "least": least, "most": most, "rounds": len(seconds)}


def _differences(given: Mapping[str, list[np.ndarray]], tolerance: float) -> dict[str, float]:
    """How far every side's numbers are from the first side's that gives any."""
    first, *others = [name for name, arrays in given.items() if arrays] or [""]
    found = {}
    for name in others:
        far = [
            np.abs(a - b).max() / (np.abs(a).max() or 1.0) if a.shape == b.shape else math.inf
            for a, b in zip(given[first], given[name], strict=True)
        ]
        # numpy's maximum keeps a NaN, which Python's may pass over.
        found[name] = float(np.max(far))
        # Written so that NaN, for which every comparison is false, is refused.
        if not found[name] <= tolerance:
            raise KavaError(
                f"{name} differs from {first} by {found[name]:.3g} of the largest number; it does "
                f"other work, so its time would say nothing"
            )
    return found


def _start(make: Make, stack: ExitStack) -> tuple[Any, Any]:
    """The process of a side and a pipe to it; it does not outlive the stack."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(make, theirs), daemon=True)
    process.start()
    # As long as this process has that end too, ``recv`` waits for ever for a side that died.
    theirs.close()
    stack.callback(process.join)
    # Called first, as it was put there last; a side that is computing reads no message.
    stack.callback(process.kill)
    return process, ours


def _answer(process: Any, pipe: Any, question: str) -> Any:
    """What a side sends next, or when asked; KavaError with its last words where it failed."""
    try:
        if question:
            pipe.send(question)
        answer = pipe.recv()
    # It ended without a word, as a process does that is killed for its memory.
    except (EOFError, OSError):
        process.join()
        answer = KavaError(f"exit code {process.exitcode}")
    if isinstance(answer, KavaError):
        raise answer
    return answer


def _serve(make: Make, pipe: Any) -> None:
    """Be a side: send facts, the arrays of the first run, seconds of each turn, and facts."""
    os.dup2(2, 1)  # stdout is the result's; what a library prints belongs elsewhere
    try:
        side = make()
        pipe.send(dict(side.facts))
        # This run compiles and warms the caches. It is compared, and never timed.
        given = side.run()
        # As numpy arrays: the process that reads them imports no peer's library.
        pipe.send([np.asarray(leaf) for leaf in jax.tree.leaves(given)] if side.compared else [])
        while pipe.recv() == "turn":
            # Of one run, or the mean of as many as fill a fifth of a second.
            # The garbage collector is off meanwhile, as timeit has it.
            runs, seconds = timeit.Timer(side.run).autorange()
            pipe.send(seconds / runs)
        pipe.send(side.last())
    except KavaError as error:
        pipe.send(error)
    except Exception as error:  # whatever it is, the process that waits has to hear of it
        first, *_ = str(error).splitlines() or [""]
        pipe.send(KavaError(f"{type(error).__name__}: {first}"[:500]))
