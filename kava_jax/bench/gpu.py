"""``kava bench gpu``: the named jobs on one accelerator, in a few minutes, with random weights.

First a small run is checked against references; then the real sizes are measured, each in a
process of its own, so that one side's memory is free again when the other starts. Nothing is read
or downloaded. What does not fit, fails or has no time left stands in the result with its reason.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

from kava_jax.errors import KavaError
from kava_jax.hf.known import KNOWN_CONFIGS


class Job(NamedTuple):
    """One pair at one length; ``rows`` are tried from the largest down until one fits."""

    name: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    length: int
    rows: tuple[int, ...] = (32, 16, 8)
    dtype: str = "bfloat16"
    steps: int = 5


def _named(teacher: str, student: str, length: int) -> Job:
    of = {"14B": "Qwen/Qwen2.5-14B", "7B": "Qwen/Qwen2.5-7B"}
    of |= {"1.5B": "Qwen/Qwen2.5-1.5B", "0.5B": "Qwen/Qwen2.5-0.5B"}
    name = f"{teacher} → {student}, {length} tokens"
    return Job(name, KNOWN_CONFIGS[of[teacher]], KNOWN_CONFIGS[of[student]], length)


JOBS = tuple(
    _named(*pair, length) for pair in (("14B", "1.5B"), ("7B", "0.5B")) for length in (512, 1024)
)
PEERS = ("torch", "torch_compile")
SIDES = ("ours", *PEERS)
BUDGET = 530.0
"""Seconds for everything, so that nine minutes are enough."""


def bench_gpu(
    jobs: tuple[Job, ...] = JOBS, sides: tuple[str, ...] = SIDES, budget: float = BUDGET
) -> dict[str, Any]:
    """Checks, then tokens per second, MFU and peak memory of every job and side.

    MFU is ``plan.floor.step_floor`` (model FLOPs, nothing recomputed counted) over seconds and the
    chip's dense bfloat16 peak (``plan.chips``); None for a device that is not in that table. Ours
    comes first for every job, then the peers, as long as there is time. Raises KavaError when the
    checks fail.
    """
    started = time.monotonic()

    def left() -> float:
        return budget - (time.monotonic() - started)

    checks = _worker("check", {}, left())
    if "failed" in checks:
        raise KavaError(f"the checks before measuring failed: {checks['failed']}")
    measured: dict[str, dict[str, Any]] = {job.name: {} for job in jobs}
    for side in sides:
        for job in jobs:
            measured[job.name][side] = _largest_that_fits(side, job, left)
    return {"name": "gpu", "checks": checks, "jobs": measured, "seconds": budget - left()}


def _largest_that_fits(side: str, job: Job, left: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"failed": "no time was left"}
    for rows in job.rows:
        if left() < 10:
            return found
        found = _worker(side, job._asdict() | {"rows": rows}, left()) | {"rows": rows}
        if "failed" not in found:
            return found
    return found


def _worker(side: str, job: dict[str, Any], limit: float) -> dict[str, Any]:
    """What one process measured; ``failed`` with the end of its words where it measured nothing."""
    command = [sys.executable, "-m", "kava_jax.bench.gpu_worker", side, json.dumps(job)]
    # The GPU belongs to one side: nearly all of it to JAX, which by itself takes three quarters;
    # and beside PyTorch, where JAX only counts FLOPs, none.
    own = {"JAX_PLATFORMS": "cpu"} if side in PEERS else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=max(1.0, limit),
            env=os.environ | own,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": "no time was left"}
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["nothing was said"]
        return {"failed": words[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])
