"""What is reported as the student's magnitude is the student's, whatever the projector makes of it.

The student has one layer, so that a factor on its key and value projections is one on its cache.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.config.recipes import RECIPES
from kava_jax.training.probe import examine, figures
from kava_jax.training.summary import summarize
from tests.tolerances import TOL
from tests.training.by_recipe import made
from tests.training.small import batch

BATCH = batch()
FACTORS = (0.1, 100.0)


@cache
def program(recipe: str, kind: str | None = None) -> Callable[[float], tuple[Any, Any]]:
    """Factor on the student's cache -> training metrics and figures by layer."""
    fields = {"teachers.0.layer_map": ((1, 0),), "loss.center": "none", "loss.kv.beta": 0.5}
    fields |= {"projector.kind": kind} if kind else {}
    blueprint, params, teachers = made(recipe, "float32", 1, **fields)
    objective, statistics = blueprint.objective, blueprint.empty_statistics()
    whole, step = (1.0, 1.0), jnp.int32(0)

    def look(params: Any, teachers: Any, factor: jax.Array) -> tuple[Any, Any]:
        attention = params["student"]["blocks"]["attention"]
        scaled = jax.tree.map(lambda x: factor * x, {part: attention[part] for part in "kv"})
        student = params["student"] | {
            "blocks": params["student"]["blocks"] | {"attention": attention | scaled}
        }
        params = params | {"student": student}
        _, (metrics, _) = objective(params, teachers, BATCH, step, whole, statistics)
        return metrics, figures([examine(objective, params, teachers, BATCH, tokens=64)])

    run = jax.jit(look)
    return lambda factor: run(params, teachers, jnp.float32(factor))


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        *((recipe, "linear" if recipe == "healed" else None) for recipe in RECIPES),
        ("anchored", "linear"),
    ],
)
def test_magnitude_follows_the_students_cache_by_just_its_factor(recipe, kind) -> None:
    look = program(recipe, kind)
    metrics, layers = look(1.0)
    before = summarize(metrics)["mag_ratio"]
    for factor in FACTORS:
        scaled, scaled_layers = look(factor)
        assert summarize(scaled)["mag_ratio"] == pytest.approx(factor * before, rel=TOL["float32"])
        for part in "kv":
            names = [f"mag_ratio_{quantile}_{part}" for quantile in ("q10", "q50", "q90")]
            for name in names:
                found, plain = scaled_layers[f"big/{name}"], layers[f"big/{name}"]
                np.testing.assert_allclose(found, factor * plain, rtol=TOL["float32"])
            mine, theirs = (f"big/{side}_magnitude_{part}" for side in "st")
            assert float(scaled[mine].value) == pytest.approx(
                factor * float(metrics[mine].value), rel=TOL["float32"]
            )
            np.testing.assert_array_equal(scaled[theirs].value, metrics[theirs].value)


def test_the_magnitude_term_is_off_behind_a_norm_and_on_elsewhere() -> None:
    for recipe, kind in (("original", None), ("anchored", None), ("anchored", "linear")):
        for factor in (1.0, *FACTORS):
            metrics, _ = program(recipe, kind)(factor)
            off = (recipe, kind) == ("anchored", None)
            for part in "kv":
                loss, cos = (float(metrics[f"big/{x}_{part}"].value) for x in ("kv", "cos"))
                assert (f"big/mag_loss_{part}" in metrics) != off
                term = 0.0 if off else 0.5 * float(metrics[f"big/mag_loss_{part}"].value)
                assert loss == pytest.approx(1 - cos + term, rel=TOL["float32"])
                assert off or term > 100 * TOL["float32"]
