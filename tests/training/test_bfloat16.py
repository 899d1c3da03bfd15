"""What is trained in bfloat16 is what is trained in float32: objective, gradients, whole steps.

A config builds every case twice, and both get the same weights and rows.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from kava_jax.alignment.kv_losses import KINDS
from kava_jax.alignment.layer_map import CALIBRATED_MAPS, NAMED_MAPS
from kava_jax.recipes import RECIPES
from kava_jax.training.step import initial_state, make_train_step
from tests.tolerances import TOL
from tests.training.by_recipe import made
from tests.training.small import PAIRS, batch

BATCH = batch()


def cosine(a: Any, b: Any) -> float:
    """Of two trees, each as one vector in float64."""
    x, y = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])
        for tree in (a, b)
    )
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


class Case(NamedTuple):
    """One run of the lane."""

    recipe: str
    kv: str = "mercator"
    layer_map: Any = "ratio"
    kl_weight: float = 0.0


CASES = (
    Case("original"),
    Case("anchored"),
    Case("calibrated", layer_map="calibrated"),
    Case("anchored", "mse", "uniform", 0.5),
    Case("original", "smooth_l1", "skip"),
    Case("calibrated", "hybrid", "last"),
    Case("original", "structural", "interpolated"),
    Case("anchored", "infonce", "cka"),
    Case("calibrated", "gram", PAIRS),
)


def test_the_lane_leaves_nothing_out() -> None:
    assert {case.recipe for case in CASES if case.kv == "mercator"} == set(RECIPES)
    assert {case.kv for case in CASES} == set(KINDS)
    assert {case.layer_map for case in CASES} == {*NAMED_MAPS, *CALIBRATED_MAPS, PAIRS}


def stepped(case: Case, dtype: str) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of a whole step in two microbatches, dropout on."""
    fields = {
        "teachers.0.layer_map": case.layer_map,
        "loss.kv": case.kv,
        "loss.kl_weight": case.kl_weight,
    }
    blueprint, params, teachers = made(case.recipe, dtype, **fields)
    plain = optax.sgd(1.0)  # parameters fall by their gradient
    step = make_train_step(
        blueprint.objective, plain, kv_weight=blueprint.kv_weight, microbatches=2
    )
    state = initial_state(params, plain, blueprint.empty_statistics())
    after, metrics = jax.jit(step)(state, teachers, BATCH)
    assert int(after.skips.total) == 0
    return float(metrics["loss"].value), jax.tree.map(np.subtract, params, after.params)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.recipe}-{c.kv}-{c.layer_map}")
def test_a_step_is_that_of_float32(case: Case) -> None:
    wide, wide_gradients = stepped(case, "float32")
    narrow, gradients = stepped(case, "bfloat16")
    assert 0 < abs(narrow / wide - 1) < TOL["bf16_loss"]
    assert 1 - cosine(gradients["student"], wide_gradients["student"]) < TOL["bf16_gradient"]
    if case.recipe == "calibrated":  # its projector is frozen
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients["projector"]))
    else:
        found = cosine(gradients["projector"], wide_gradients["projector"])
        assert 1 - found < TOL["bf16_gradient"]
