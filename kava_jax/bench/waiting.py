"""``kava bench input`` and ``startup``: how fast rows come in, and what one waits for at first."""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax

from kava_jax.bench.harness import Facts, Side, compare
from kava_jax.config.file import shipped_config
from kava_jax.data.batches import BatchStream
from kava_jax.data.problems import word_problems
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.errors import KavaError
from kava_jax.journal.metrics_file import METRICS_NAME
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch

LIMIT = 300.0
LENGTH = 128


def bench_input(rows: int = 2048, batch_size: int = 32, batches: int = 20) -> Facts:
    """Tokens a second of encoding text, of making batches, and of putting them on the devices.

    Encoding happens once, before the first step; batches are made while the devices compute, so
    what matters is that ``batch`` and ``put`` together are faster than any step.
    """
    given = (rows, batch_size, batches)
    found = compare({part: partial(_rows, part, *given) for part in ("encode", "batch", "put")})
    return {"rows_of_a_batch": batch_size, "batches": batches, **found}


def _rows(part: str, count: int, batch_size: int, batches: int) -> Side:
    encoder = Encoder(builtin_tokenizer(), max_length=LENGTH)
    problems = word_problems("train", 0, count)
    rows = [encoder.encode(problem) for problem in problems]
    stream = BatchStream(rows, batch_size=batch_size, max_length=LENGTH, seed=0, bucket=16)
    made, mesh = [stream.batch(number) for number in range(batches)], make_mesh()
    work = {
        "encode": lambda: [encoder.encode(problem) for problem in problems[: batch_size * batches]],
        "batch": lambda: [stream.batch(number) for number in range(batches)],
        "put": lambda: jax.block_until_ready([put_batch(batch, mesh) for batch in made]),
    }

    facts = {"tokens": sum(int(batch.valid.sum()) for batch in made)}
    return Side(work[part], facts, compared=False)


def bench_startup() -> Facts:
    """Seconds of ``kava --help``, of importing the package, and to the demo's first logged step.

    The first step (loading, encoding, the evaluation before it, compiling, one step, its line) is
    waited for twice: with an empty cache of compiled programs, and with the one that is left then.
    """
    # The package loads its names when they are asked for, and JAX with them.
    use = "from kava_jax import KVDimensionProjector, MercatorKVLoss"
    commands = {"help": ("-m", "kava_jax", "--help"), "import": ("-c", use)}
    found = compare({name: partial(_command, *words) for name, words in commands.items()})
    with tempfile.TemporaryDirectory() as folder:
        first_step = {kind: _first_step(Path(folder), kind) for kind in ("cold", "warm")}
    return {"first_step_seconds": first_step, **found}


def _command(*words: str) -> Side:
    command, quiet = [sys.executable, *words], subprocess.DEVNULL
    return Side(lambda: subprocess.run(command, check=True, stdout=quiet), compared=False)


def _first_step(folder: Path, kind: str) -> float:
    """Seconds until the demo's run has written the line of its first step; it is stopped then."""
    run = folder / kind
    command = [sys.executable, "-m", "kava_jax", "train", str(shipped_config("demo.yaml"))]
    command += ["train.log_every=1", f"run.dir={run}"]
    # The user's own cache may hold these programs; then no start would be cold.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    errors, started = folder / f"{kind}.stderr", time.perf_counter()
    # Into a file: a process stops when it writes to a pipe that is full and that nobody reads.
    with errors.open("w", encoding="utf-8") as words:
        process = subprocess.Popen(command, env=environment, stderr=words)
    try:
        metrics = run / METRICS_NAME
        # Each line is flushed when it is written, so the file tells the moment.
        while not (metrics.is_file() and '"kind": "train"' in metrics.read_text("utf-8")):
            if process.poll() is not None or time.perf_counter() - started > LIMIT:
                said = errors.read_text(encoding="utf-8").strip().splitlines()
                raise KavaError(f"the demo did not come to its first step: {said[-1:]}")
            time.sleep(0.05)
        return time.perf_counter() - started
    finally:
        # Not asked to end: it would save a run whose folder is removed anyway.
        process.kill()
        process.wait()
