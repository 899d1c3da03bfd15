"""A trace of a few steps for TensorBoard's profiler or Perfetto."""

import re
from contextlib import ExitStack
from typing import Any

import jax

from kava_jax.errors import KavaError
from kava_jax.storage import Place, growing

PROFILE_NAME = "profile"


def first_and_last(written: str | None, steps: int) -> tuple[int, int] | None:
    """The steps that ``FIRST:LAST`` names, counted from 1; None where nothing is written.

    Raises KavaError for anything else, and for steps that a run of ``steps`` does not have.
    """
    if written is None:
        return None
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", written)
    if not found or int(found[1]) > int(found[2]):
        raise KavaError(f"--profile={written}: write FIRST:LAST, counted from 1, such as 10:15")
    if int(found[1]) > steps:
        raise KavaError(
            f"--profile={written} begins after the last of train.steps={steps}; name earlier steps"
        )
    return int(found[1]), int(found[2])


class Profile:
    """Traces the steps ``first`` to ``last`` (counted from 1) into ``<run>/profile``.

    Waits for the devices on both sides, so that the trace holds whole steps and no others. A run
    that starts later than ``first``, or ends before ``last``, traces what there is.
    """

    def __init__(self, run_dir: Place, steps: tuple[int, int] | None):
        self._run_dir, self._steps, self._on = run_dir, steps, False
        self._exit = ExitStack()

    def before(self, number: int, state: Any) -> None:
        """Before the step that makes ``number`` steps."""
        if self._steps and not self._on and self._steps[0] <= number <= self._steps[1]:
            jax.block_until_ready(state)
            files = self._exit.enter_context(growing(self._run_dir))
            jax.profiler.start_trace(files.directory / PROFILE_NAME)
            self._exit.callback(jax.profiler.stop_trace)
            self._on = True

    def after(self, number: int, state: Any) -> None:
        """After it."""
        if self._on and self._steps and number == self._steps[1]:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Write what there is, if a trace is on."""
        self._exit.close()
