"""A projector without parameters against a linear one whose kernel is the identity matrix."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.training.comparison import LayerComparison
from kava_jax.training.objective import TeacherLink
from kava_jax.training.optimizer import make_optimizer
from kava_jax.training.step import make_train_step
from tests.tolerances import TOL
from tests.training.small import MAP, STUDENT, Setting, batch, jitted, setting, start

DIRECTIONS = ("student_to_teacher", "teacher_to_student")


def of_kind(kind: str, direction: str = "student_to_teacher") -> Setting:
    """The small student under a teacher of its own geometry, with other weights."""
    made, width = setting(), STUDENT.kv_width
    side = {"d_model": width, "num_heads": STUDENT.num_kv_heads}
    projector = KVDimensionProjector(
        {"big": side}, width, kind=kind, direction=direction, student_heads=STUDENT.num_kv_heads
    )
    graph, weights = nnx.split(projector)
    eye = jax.tree.map(
        lambda x: jnp.eye(width) if x.ndim == 2 else jnp.zeros_like(x), nnx.to_pure_dict(weights)
    )
    link = TeacherLink(made.objective.student, LayerComparison("big", MAP), STUDENT)
    objective = replace(
        made.objective, projector=graph, teachers={"big": link}, direction=direction
    )
    other = jax.tree.map(lambda x: x[..., ::-1], made.params["student"])
    return made._replace(
        objective=objective,
        params=made.params | {"projector": eye},
        teachers={"big": other},
    )


def optimizer(projector_lr: float | None) -> optax.GradientTransformation:
    rates = {"student": optax.constant_schedule(1e-3), "projector": None}
    if projector_lr is not None:
        rates["projector"] = optax.constant_schedule(projector_lr)
    return make_optimizer(rates, weight_decay=0.1, clip_norm=1.0, b2=0.95)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_steps_are_those_of_an_identity_matrix_that_is_frozen(direction: str) -> None:
    found = {}
    for kind, rate in (("identity", 1e-2), ("linear", None)):
        made, group = of_kind(kind, direction), optimizer(rate)
        step = jitted(
            make_train_step(made.objective, group, kv_weight=made.kv_weight, microbatches=2)
        )
        state = start(made, group)
        for _ in range(2):
            state, metrics = step(state, made.teachers, batch())
        found[kind] = state, jax.device_get(metrics)
    (ours, metrics), (theirs, wanted) = found["identity"], found["linear"]
    assert ours.params["projector"] == {}
    assert float(metrics.pop("grad_norm_projector").sum) == 0
    assert float(wanted.pop("grad_norm_projector").sum) > 0
    # Among them are the running means, which a run without teachers does not have.
    assert metrics.keys() == wanted.keys() >= {"cos_running", "cos_shuffled_running", "big/kv_k"}
    for name, mean in metrics.items():
        np.testing.assert_allclose(mean, wanted[name], rtol=TOL["float32"], atol=TOL["float32"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=TOL["after_one_step"]),
        ours.params["student"],
        theirs.params["student"],
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_keys_in_float32_next_to_values_in_bfloat16_keep_every_bit(direction: str) -> None:
    made = of_kind("identity", direction)
    projector = nnx.merge(made.objective.projector, {})
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 2, 8, 12, 2, 8))
    cache = {"k": jnp.asarray(k, jnp.float32), "v": jnp.asarray(v, jnp.bfloat16)}
    comparison = made.objective.teachers["big"].comparison
    student, target, own = comparison.projected(projector, cache, cache, jax.random.key(0))
    for side in (student, target, own):
        np.testing.assert_array_equal(side["k"], cache["k"])
        np.testing.assert_array_equal(
            np.asarray(side["v"], np.float32), np.asarray(cache["v"], np.float32)
        )
    mapped = target if direction == "teacher_to_student" else student
    assert mapped["v"].dtype == jnp.float32
