"""Being asked to end: by a signal with one process, at JAX's sync point with several.

With several processes all must stop after the same step. ``jax.distributed`` catches SIGTERM on
every host then, and agrees on a step; with one process it does nothing, so this module listens.
Before the first step is done there is nothing to save, and signals act as they did before.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class AskedToEndError(Exception):
    """An evaluation was left because the run has been asked to end."""


class Preemption:
    """Whether the run has been asked to end; made by :func:`listening`."""

    def __init__(self) -> None:
        self._asked, self._moments = False, 0
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        """From here on a signal is a question that ``asked`` answers, and ends nothing.

        Signals that are ignored, as SIGHUP is under nohup, stay ignored. Only the main thread may
        set handlers; elsewhere nothing is heard.
        """
        several = jax.process_count() > 1
        for number in SIGNALS:
            if several and number == signal.SIGTERM:
                continue  # JAX listens
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self.notice)
            except ValueError:  # not the main thread
                return

    def end(self) -> None:
        """Leave the handlers as they were found."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to save and stop now, the same on all processes.

        They all have to ask at the same moments: after every step and before every batch of an
        evaluation. Nothing else in the process may ask (see ``orbax_items.Manager``).
        """
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        # JAX wants a number that rises at every call; a step's stays the same within an evaluation.
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
        if number == signal.SIGHUP:
            _leave_terminal()
        # JAX listens to SIGTERM alone.
        if jax.process_count() > 1:  # JAX tells the other processes
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def listening() -> Iterator[Preemption]:
    """What a training asks; it listens from ``Preemption.begin`` to the end of the block."""
    preemption = Preemption()
    try:
        yield preemption
    finally:
        preemption.end()


def _leave_terminal() -> None:
    """Writing to a terminal that was closed is an error, which must not keep a run from saving."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream)
            os.close(null)
