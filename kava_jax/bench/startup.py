"""``kava bench startup``: how long one waits before anything happens."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kava_jax.bench.timing import circumstances, summary
from kava_jax.config_file import shipped_config
from kava_jax.errors import KavaError
from kava_jax.training.metrics_file import METRICS_NAME

ROUNDS = 5
LIMIT = 300.0


def bench_startup() -> dict[str, Any]:
    """Seconds of ``kava --help``, of importing the package, and to the demo's first logged step.

    The first step (loading, encoding, the evaluation before it, compiling, one step, its line) is
    waited for twice: with an empty cache of compiled programs, and with the one that is left then.
    Each is a process of its own. Raises KavaError when a run ends before its first step.
    """
    kava = [sys.executable, "-m", "kava_jax"]
    # The package loads its names when they are asked for, and JAX with them.
    use = [sys.executable, "-c", "from kava_jax import KVDimensionProjector, MercatorKVLoss"]
    seconds = {
        name: summary([_lasts(command) for _ in range(ROUNDS)])
        for name, command in (("help", [*kava, "--help"]), ("import", use))
    }
    with tempfile.TemporaryDirectory() as folder:
        first_step = {kind: _first_step(Path(folder), kind) for kind in ("cold", "warm")}
    return {
        "name": "startup",
        "seconds": seconds,
        "first_step_seconds": first_step,
        **circumstances(),
    }


def _lasts(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _first_step(folder: Path, kind: str) -> float:
    """Seconds until the demo's run has written the line of its first step; it is stopped then."""
    run = folder / kind
    command = [sys.executable, "-m", "kava_jax", "train", str(shipped_config("demo.yaml"))]
    command += ["train.log_every=1", f"run.dir={run}"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    errors, started = folder / f"{kind}.stderr", time.perf_counter()
    with errors.open("w", encoding="utf-8") as words:
        process = subprocess.Popen(command, env=environment, stderr=words)
    try:
        while not _has_stepped(run / METRICS_NAME):
            if process.poll() is not None or time.perf_counter() - started > LIMIT:
                said = errors.read_text(encoding="utf-8").strip().splitlines()
                raise KavaError(f"the demo did not come to its first step: {said[-1:]}")
            time.sleep(0.05)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def _has_stepped(metrics: Path) -> bool:
    return metrics.is_file() and '"kind": "train"' in metrics.read_text(encoding="utf-8")
