"""Train steps beside each other: what a probe costs, and the step of every arm of a grid."""

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from kava_jax.bench.timing import alternate, circumstances, summary
from kava_jax.config import Config
from kava_jax.data.batches import Batch, padded
from kava_jax.errors import KavaError
from kava_jax.experiments.grid import Grid, run_config
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import put_batch
from kava_jax.runs.calibrate import unmeasured
from kava_jax.runs.prepare import Run, fingerprints_of, load_dataset, prepare
from kava_jax.runs.train import begun, jitted_probe
from kava_jax.training.step import TrainState

STEPS_PER_ROUND = 5


def bench_diagnostics(config: Config) -> dict[str, Any]:
    """What a probe (``training.probe``) costs beside the step, at the config's interval.

    ``share_of_step`` is the probe's time divided by that of the steps between two probes. Writes
    nothing. Raises KavaError for a config that cannot run.
    """
    run = prepare(config)
    stream = load_dataset(run).stream
    teachers, batch = run.blueprint.load_teachers(), stream.batch(0)
    steps = _Steps(run, teachers, run.blueprint.fresh_state(), batch)
    probe, whole = jitted_probe(run), put_batch(padded(batch, stream.max_length), run.mesh)

    def probes() -> None:
        jax.block_until_ready(probe(steps.state, teachers, whole))

    seconds = alternate({"step": steps, "probe": probes})
    seconds["step"] = [value / STEPS_PER_ROUND for value in seconds["step"]]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    every = config.train.diagnose_every
    return {
        "name": "diagnostics",
        "config": config.run.name,
        "step_seconds": summary(seconds["step"]),
        "probe_seconds": summary(seconds["probe"]),
        "diagnose_every": every,
        "share_of_step": medians["probe"] / (every * medians["step"]) if every else 0.0,
        **_of_batch(batch),
        **circumstances(),
    }


def bench_arms(grid: Grid, base: Mapping[str, Any]) -> dict[str, Any]:
    """The train step of every arm of a grid on the same batch, and its time beside the baseline's.

    All arms are compiled first and stay in memory together. Writes nothing that it does not remove.
    Raises KavaError for a grid that starts from a pretrained student, which has to be trained.
    """
    if grid.pretrain is not None:
        raise KavaError(
            f"grid={grid.name} pretrains its student; give a grid without pretrain, the arms' "
            f"steps cost the same"
        )
    with tempfile.TemporaryDirectory() as folder:
        work, batch = {}, None
        for arm in grid.arms:
            config = run_config(grid, base, arm, grid.seeds[0], Path(folder))
            run = prepare(unmeasured(config))
            dataset = load_dataset(run)
            run, state = begun(config, run, dataset, fingerprints_of(run, dataset))
            batch = dataset.stream.batch(0)
            work[arm] = _Steps(run, run.blueprint.load_teachers(), state, batch)
            work[arm]()
        seconds = alternate(work)
    assert batch is not None  # a grid has an arm
    summaries = {
        arm: summary([value / STEPS_PER_ROUND for value in own]) for arm, own in seconds.items()
    }
    baseline = summaries[grid.baseline]["median"]
    return {
        "name": "arms",
        "grid": grid.name,
        "baseline": grid.baseline,
        "step_seconds": summaries,
        "relative": {arm: own["median"] / baseline for arm, own in summaries.items()},
        **_of_batch(batch),
        **circumstances(),
    }


class _Steps:
    """A round's train steps, always on the same batch; ``state`` is the one they arrived at."""

    def __init__(self, run: Run, teachers: Mapping[str, Params], state: TrainState, batch: Batch):
        self.state = state
        self._step, self._teachers = run.blueprint.jitted_step(), teachers
        self._batch = put_batch(batch, run.mesh)

    def __call__(self) -> None:
        for _ in range(STEPS_PER_ROUND):
            self.state, _ = self._step(self.state, self._teachers, self._batch)
        jax.block_until_ready(self.state)


def _of_batch(batch: Batch) -> dict[str, Any]:
    return {"batch": {"rows": batch.tokens.shape[0], "tokens_of_a_row": batch.tokens.shape[1]}}
