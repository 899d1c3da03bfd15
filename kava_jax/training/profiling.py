"""A trace of a few steps for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from typing import Any

import jax

PROFILE_NAME = "profile"


class Profile:
    """Traces the steps ``first`` to ``last`` (counted from 1) into ``<run>/profile``.

    Waits for the devices on both sides, so that the trace holds whole steps and no others. A run
    that starts later than ``first``, or ends before ``last``, traces what there is.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None):
        self._directory, self._steps, self._on = run_dir / PROFILE_NAME, steps, False

    def before(self, number: int, state: Any) -> None:
        """Before the step that makes ``number`` steps."""
        if self._steps and not self._on and self._steps[0] <= number <= self._steps[1]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._on = True

    def after(self, number: int, state: Any) -> None:
        """After it."""
        if self._on and self._steps and number >= self._steps[1]:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Write what there is, if a trace is on."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
