"""What a person sees of a run, and the numbers it leaves behind.

Every logging interval is one line of ``metrics.jsonl``, one point in TensorBoard, and one update of
a progress display on a terminal, or one plain line where there is none. Everything for people goes
to stderr; stdout belongs to ``--json``.

Left out on purpose: knowing where metrics come from (plain floats are handed in), deciding what is
good or bad (``kava_jax.diagnostics`` does), Weights & Biases.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from kava_jax.diagnostics import alarms
from kava_jax.training.display import LineDisplay, LiveDisplay

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"

Kind = Literal["train", "eval"]
Metrics = Mapping[str, float | None]


class Monitor:
    """Writes and shows the metrics of one run; use it as a context manager.

    Args:
        run_dir: gets ``metrics.jsonl`` and ``tensorboard/``; made if missing.
        total_steps: the step at which the run is done.
        start_step: 0 starts over and drops metrics of an earlier attempt; k > 0 continues after
            step k and drops what was written for later steps, so that no step appears twice.
        write: False on all processes but the first: nothing is written and nothing is shown.
        stream: where people look. A terminal gets a progress display, anything else plain lines.

    A value of None, NaN or infinity is written as ``null``, since JSON has no NaN; the last two are
    reported to the person as well. ``OSError`` (a full disk) passes through to the caller.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        write: bool = True,
        stream: TextIO | None = None,
    ):
        self._run_dir = run_dir
        self._total_steps = total_steps
        self._start_step = start_step
        self._write = write
        self._stream = sys.stderr if stream is None else stream
        self._active_alarms: frozenset[str] = frozenset()
