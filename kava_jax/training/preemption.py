"""Being asked to end: SIGTERM or Ctrl-C with one process, JAX's sync point with several.

With several processes all must stop after the same step. ``jax.distributed`` catches SIGTERM on
every host then, and agrees on a step; with one process it does nothing, so this module listens.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class AskedToEndError(Exception):
    """An evaluation was left because the run has been asked to end."""


class Preemption:
    """Whether the run has been asked to end; made by :func:`listening`."""

    def __init__(self) -> None:
        self._asked, self._moments = False, 0

    def asked(self) -> bool:
        """Whether to save and stop now, the same on all processes.

        They all have to ask at the same moments: after every step and before every batch of an
        evaluation.
        """
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        self._moments += 1
        return reached_preemption_sync_point(self._moments)

    def check(self) -> None:
        """Raises AskedToEndError when the run has been asked to end."""
        if self.asked():
            raise AskedToEndError

    def notice(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal asks, a second one acts as it always does."""
        del frame
        self._asked = True
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def listening() -> Iterator[Preemption]:
    """Listen for the length of a training, and leave the handlers as they were found.

    Only the main thread may set handlers; elsewhere nothing is heard.
    """
    preemption, before = Preemption(), {}
    if jax.process_count() == 1:
        for number in SIGNALS:
            try:
                before[number] = signal.signal(number, preemption.notice)
            except ValueError:  # not the main thread
                break
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
