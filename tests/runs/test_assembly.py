"""Weights that change over a run: what the schedules give at each step, counted by hand."""

from dataclasses import replace

import jax.numpy as jnp
import optax
import pytest

from kava_jax.config.file import parse_config
from kava_jax.runs.assembly import kv_weight
from tests.tiny import CONFIG
from tests.tolerances import TOL
from tests.training.small import batch, setting

NEAR = TOL["float32"]


def weights(ramp: str, steps: int) -> list[float]:
    config = parse_config(CONFIG, [f"train.steps={steps}", f"loss.kv_weight={ramp}"])
    return [float(kv_weight(config)(step)) for step in range(steps)]


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ("{start: 4, end: 0}", [4, 3, 2, 1, 0]),
        ("{start: 2, end: 0, over: 0.6}", [2, 1, 0, 0, 0]),
        ("{start: 0, end: 1, over: 0.4}", [0, 1, 1, 1, 1]),
        ("{start: 0, end: 1, over: 0.01}", [0, 1, 1, 1, 1]),
        ("3", [3, 3, 3, 3, 3]),
    ],
)
def test_a_ramp_arrives_when_its_part_of_the_run_is_over(ramp, expected):
    assert weights(ramp, 5) == pytest.approx(expected)


def test_cross_entropy_counts_as_its_own_ramp_says():
    made = setting(names=())
    objective = replace(made.objective, ce_weight=optax.linear_schedule(0.0, 2.0, 4))
    share = (1.0, 1.0)

    def language(step: int) -> float:
        found, _ = objective(made.params, {}, batch(), jnp.int32(step), share, made.statistics)
        return float(found[0])

    assert language(0) == 0
    assert language(1) == pytest.approx(language(4) / 4, rel=NEAR)
    assert language(4) > 0
