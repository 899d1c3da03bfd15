"""Logged lines, written when the device has them: the host never waits for a step just begun.

A line's numbers are fetched as soon as they are ready, and waited for only when the next line, an
evaluation, a probe or a checkpoint is due. The order of what is written is that of the steps.

Steps whose loss or gradient was not finite are said and written down too. The step itself leaves
the weights alone (``step``); whether it did is known on the device, and is asked for with a line or
before a checkpoint.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kava_jax.data.batches import BatchStream
from kava_jax.errors import StoppedError
from kava_jax.geometry import Mean
from kava_jax.journal.monitor import Monitor
from kava_jax.training.objective import Metrics
from kava_jax.training.step import Skips
from kava_jax.training.summary import summarize


class Lines:
    """The lines of one run.

    Args:
        start: the step that the run starts after.
        monitor: gets the lines, and a record of each skipped step.
        stream: says which rows a step had.
        rates: learning rates, by group.
        steps: of the whole run.
        skips: the counts that the run starts with.
        max_consecutive_skips: this number of skipped steps in a row stops the run.
    """

    def __init__(
        self,
        start: int,
        monitor: Monitor,
        stream: BatchStream,
        rates: Mapping[str, optax.Schedule],
        steps: int,
        *,
        skips: Skips,
        max_consecutive_skips: int,
    ):
        self.clock = Clock(start)
        self._monitor, self._stream, self._most_skips = monitor, stream, max_consecutive_skips
        self._skipped, self._in_a_row = int(skips.total), int(skips.in_a_row)
        # Steps that nobody has looked at yet, and how many were skipped up to each.
        self._unseen: list[tuple[int, Mean]] = []
        # All at once and before the first step: a rate asked for later is computed on the device,
        # behind every step that waits there.
        numbers = jnp.arange(steps)
        self._rates = {name: np.asarray(jax.vmap(rate)(numbers)) for name, rate in rates.items()}
        # Lines to come: the step, its metrics on the device, and tokens of the run so far.
        self._pending: deque[tuple[int, Metrics, int]] = deque()
        self._tokens = 0

    def step(self, done: int, metrics: Metrics, tokens: int) -> None:
        """Step ``done`` was begun; ``tokens`` of its batch are real."""
        self._tokens += tokens
        self._unseen.append((done, metrics["skipped"]))
        # The device finishes steps in their order, so only the oldest line has to be asked for.
        if self._pending and _ready(self._pending[0][1]):
            self.settle()

    def add(self, done: int, metrics: Metrics) -> None:
        """Step ``done`` gets a line; the line before it is written now."""
        self.settle()
        # The tokens are those of now: when the line is written, later steps have added theirs.
        self._pending.append((done, metrics, self._tokens))

    def settle(self, upto: int = 0) -> None:
        """Write what has been added, waiting for it, and what was skipped up to step ``upto``.

        Raises StoppedError when too many steps in a row were skipped.
        """
        while self._pending:
            done, metrics, tokens = self._pending.popleft()
            # Reading the values waits for the step, so the lap ends when the step did.
            values = summarize(metrics)
            lap = self.clock.lap(done, tokens)
            # What was skipped is said before the line.
            self._tell_skipped(done)
            # A skipped step is none to the optimizer, whose count the rates go by; this step's rate
            # is the one that it would have taken.
            before = int(values["skipped"]) - int(self._in_a_row > 0)
            taken = done - 1 - before
            rates = {f"lr_{name}": float(table[taken]) for name, table in self._rates.items()}
            self._monitor.log(done, values | rates | lap)
        self._tell_skipped(upto)

    def _tell_skipped(self, upto: int) -> None:
        # Steps are added in their order, so those that are due are at the front.
        due = [one for one in self._unseen if one[0] <= upto]
        self._unseen = self._unseen[len(due) :]
        # All counts come in one transfer, instead of one wait for each step.
        for done, mean in jax.device_get(due):
            total = int(mean.sum)
            self._in_a_row = self._in_a_row + 1 if total > self._skipped else 0
            self._skipped = total
            if self._in_a_row:
                rows = [int(row) for row in self._stream.row_indices(done - 1)]
                self._monitor.skipped(done, rows)
            if self._in_a_row >= self._most_skips:
                raise StoppedError(
                    f"loss or gradient was not finite for {self._most_skips} steps in a row, up to "
                    f"step {done} (train.max_consecutive_skips), and the weights were left as they "
                    f"were; look at the rows that metrics.jsonl names, lower the learning rates, "
                    f"and call again to go on from the last checkpoint, if there is one"
                )

    def restart_clock(self, done: int) -> None:
        """Leave out what was done since step ``done`` ended; all lines are settled."""
        self.clock.restart(done, self._tokens)


def _ready(metrics: Metrics) -> bool:
    # This asks without waiting, while every way of reading a value waits for it.
    return all(leaf.is_ready() for leaf in jax.tree.leaves(metrics))


class Clock:
    """Speed since the last logged line, evaluations and probes left out; only real tokens count."""

    def __init__(self, step: int):
        self._start = step
        self._laps: list[float] = []
        self._pauses: list[float] = []
        self.restart(step, 0)

    def restart(self, step: int, tokens: int) -> None:
        """Begin a lap after ``step`` steps and ``tokens`` tokens of the run."""
        self._step, self._tokens, self._time = step, tokens, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        started = time.perf_counter()
        yield
        self._pauses.append(time.perf_counter() - started)
        self._time += self._pauses[-1]

    def lap(self, step: int, tokens: int) -> dict[str, float]:
        """End a lap at ``step`` and ``tokens`` tokens of the run; begin the next."""
        seconds, read = time.perf_counter() - self._time, tokens - self._tokens
        steps = max(1, step - self._step)
        self._laps.append(seconds / steps)
        self.restart(step, tokens)
        return {"step_seconds": seconds / steps, "tokens_per_second": read / seconds}

    def cost_of_pauses(self, step: int) -> dict[str, float]:
        """Seconds of the last probe, and of all probes as a share of the steps' time.

        The share takes medians, so that compiling counts on neither side; it needs three of each.
        """
        cost = {"probe_seconds": self._pauses[-1]}
        if min(len(self._laps), len(self._pauses)) >= 3:
            probes = len(self._pauses) * statistics.median(self._pauses)
            steps = (step - self._start) * statistics.median(self._laps)
            cost["probe_share_of_time"] = probes / steps
        return cost
