"""``kava bench``: how long things take, measured so that the figure can be believed.

Compiled and warmed up first; what is compared runs in alternating rounds, so that a slow moment of
the machine falls on both; medians with their spread; device and versions stand beside the figures.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from kava_jax.config import Config
from kava_jax.data.batches import padded
from kava_jax.parallel.sharding import put_batch
from kava_jax.runs.prepare import load_dataset, prepare
from kava_jax.runs.train import jitted_probe, jitted_step
from kava_jax.training.manifest import versions

ROUNDS, STEPS_PER_ROUND = 7, 5


def bench_diagnostics(config: Config) -> dict[str, Any]:
    """What a probe (``training.probe``) costs beside the step, at the config's interval.

    ``share_of_step`` is the probe's time divided by that of the steps between two probes. Writes
    nothing. Raises KavaError for a config that cannot run.
    """
    run = prepare(config)
    stream = load_dataset(run).stream
    teachers, state = run.blueprint.load_teachers(), run.blueprint.fresh_state()
    step, probe = jitted_step(run), jitted_probe(run)
    batch = stream.batch(0)
    short, whole = put_batch(batch, run.mesh), put_batch(padded(batch, stream.max_length), run.mesh)

    def steps() -> None:
        nonlocal state
        for _ in range(STEPS_PER_ROUND):
            state, _ = step(state, teachers, short)
        jax.block_until_ready(state)

    def probes() -> None:
        jax.block_until_ready(probe(state, teachers, whole))

    seconds = alternate({"step": steps, "probe": probes})
    seconds["step"] = [value / STEPS_PER_ROUND for value in seconds["step"]]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    every = config.train.diagnose_every
    return {
        "name": "diagnostics",
        "config": config.run.name,
        "step_seconds": _summary(seconds["step"]),
        "probe_seconds": _summary(seconds["probe"]),
        "diagnose_every": every,
        "share_of_step": medians["probe"] / (every * medians["step"]) if every else 0.0,
        "batch": {"rows": batch.tokens.shape[0], "tokens_of_a_row": batch.tokens.shape[1]},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }


def alternate(work: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of every round of each piece of work, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(ROUNDS + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _summary(seconds: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "rounds": len(seconds),
    }
