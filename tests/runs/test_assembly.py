"""Weights that change over a run: what the schedules give at each step, counted by hand."""

from dataclasses import replace

import jax.numpy as jnp
import optax
import pytest

from kava_jax.config.file import parse_config
from kava_jax.runs.assembly import kv_weight, schedules
from tests.tiny import CONFIG
from tests.tolerances import TOL
from tests.training.by_recipe import made as by_recipe
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


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        (["loss.ce_weight=1"], [1, 1, 1, 1, 1]),
        (["loss.ce_weight=0", "loss.kl_weight={start: 0, end: 2}"], [0, 0.5, 1, 1.5, 2]),
        (["loss.ce_weight={start: 1, end: 0}", "loss.kl_weight=0.5"], [1.5, 1.25, 1, 0.75, 0.5]),
    ],
)
def test_a_share_follows_the_weights_of_the_language_terms(language, expected):
    config = parse_config(CONFIG, ["train.steps=5", "loss.kv_weight=auto(0.2)", *language])
    assert [float(kv_weight(config)(step)) for step in range(5)] == pytest.approx(expected)


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


def test_logit_kl_counts_as_its_own_ramp_says():
    made = setting(names=("big", "other"), kl_weight=1.0, ce_weight=0.5)
    objective = replace(made.objective, kl_weight=optax.linear_schedule(0.0, 3.0, 4))
    shares = (1.0, 1.0)
    for step, weight in ((0, 0.0), (1, 0.75), (4, 3.0)):
        (language, _), (metrics, _) = objective(
            made.params, made.teachers, batch(), jnp.int32(step), shares, made.statistics
        )
        # ``setting`` weighs its teachers with 1 and 2.
        kl = float(metrics["big/kl"].value) + 2 * float(metrics["other/kl"].value)
        want = 0.5 * float(metrics["ce"].value) + weight * kl
        assert float(language) == pytest.approx(want, rel=NEAR)
        assert kl > 0


def test_a_ramp_of_logit_kl_is_logged_and_takes_the_whole_teacher():
    ramp = {"start": 0, "end": 1}
    config = parse_config(CONFIG, ["train.steps=3", "loss.kl_weight={start: 0, end: 1}"])
    weight = schedules(config)["kl_weight"]
    assert [float(weight(step)) for step in range(4)] == [0, 0.5, 1, 1]
    for written, whole in ((ramp, True), ({"start": 0, "end": 0}, False), (0.0, False)):
        blueprint = by_recipe("anchored", **{"loss.kl_weight": written}).blueprint
        teacher = blueprint.teachers["big"]
        assert teacher.headless != whole
        assert ("final_norm" in teacher.part.shardings) == whole
        assert (blueprint.objective.kl_weight is not None) == whole
