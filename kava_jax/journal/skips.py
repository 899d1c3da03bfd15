"""Steps that were skipped because their loss or gradient was not finite: said, and written down.

The step itself leaves the weights alone (``step``). Whether it did is known on the device; it is
asked for only when a line is logged or a checkpoint written, so that the host does not wait.
"""

import jax

from kava_jax.data.batches import BatchStream
from kava_jax.errors import StoppedError
from kava_jax.geometry import Mean
from kava_jax.journal.monitor import Monitor
from kava_jax.training.step import Skips


class SkipLog:
    """Looks after the skipped steps of one run.

    Args:
        start: the counts that the run starts with.
        max_consecutive_skips: this number of skipped steps in a row stops the run.
        stream: says which rows a step had.
        monitor: gets a record of each skipped step.
    """

    def __init__(
        self, start: Skips, *, max_consecutive_skips: int, stream: BatchStream, monitor: Monitor
    ):
        self._total, self._in_a_row = int(start.total), int(start.in_a_row)
        self._most, self._stream, self._monitor = max_consecutive_skips, stream, monitor
        self._pending: list[tuple[int, Mean]] = []

    @property
    def last_was_skipped(self) -> bool:
        """Whether the last step that was looked at was skipped."""
        return self._in_a_row > 0

    def add(self, done: int, total: Mean) -> None:
        """Step number ``done`` (from 1) ended with ``total`` skipped in all; not looked at yet."""
        self._pending.append((done, total))

    def settle(self, upto: int) -> None:
        """Look at what was added for steps up to this one.

        Raises StoppedError when too many steps in a row were skipped.
        """
        # Steps are added in their order, so those that are due are at the front.
        due = [one for one in self._pending if one[0] <= upto]
        self._pending = self._pending[len(due) :]
        # All counts come in one transfer, instead of one wait for each step.
        for done, mean in jax.device_get(due):
            total = int(mean.sum)
            self._in_a_row = self._in_a_row + 1 if total > self._total else 0
            self._total = total
            if self._in_a_row:
                rows = [int(row) for row in self._stream.row_indices(done - 1)]
                self._monitor.skipped(done, rows)
            if self._in_a_row >= self._most:
                raise StoppedError(
                    f"loss or gradient was not finite for {self._most} steps in a row, up to step "
                    f"{done} (train.max_consecutive_skips), and the weights were left as they were;"
                    f" look at the rows that metrics.jsonl names, lower the learning rates, and "
                    f"call again to go on from the last checkpoint, if there is one"
                )
