"""Probes against separate gradients and numpy, and on a student that is its own teacher."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.data.batches import Batch
from kava_jax.diagnostics import TokenSample, diagnose
from kava_jax.geometry import Mean
from kava_jax.training.comparison import LayerComparison
from kava_jax.training.objective import TeacherLink
from kava_jax.training.probe import TOKENS, Probed, examine, figures, make_probe
from kava_jax.training.share import LossScale
from kava_jax.training.step import TrainState, initial_state
from tests.tolerances import TOL
from tests.training.small import STUDENT, Setting, batch, setting

CLOSE = TOL["float32"]
SIDE_BY_SIDE = LayerMap((0, 2), ((0, 1), (1, 2)))
ZEROS = jnp.zeros((1, 4, 1, 2))
SAMPLE = TokenSample(ZEROS, ZEROS, jnp.ones(4, bool), ZEROS)
FIGURES = {*jax.eval_shape(diagnose, SAMPLE), "cos_sim", "cos_shuffled"}
# Two microbatches of 16 rows, of which 8 are looked at.
BATCH = batch(0, 32)
RISING, FALLING = (optax.linear_schedule(*ends, 10) for ends in ((0.0, 1.0), (1.0, 0.0)))


def state_of(made: Setting) -> TrainState:
    """A state in which schedule and scale both matter: 0.3 of the way up, scaled by 2."""
    state = initial_state(made.params, optax.sgd(0.1), made.statistics)
    scale = LossScale(jnp.asarray(2.0), Mean(jnp.zeros(()), jnp.zeros(())))
    return state._replace(step=jnp.asarray(3, jnp.int32), kv_scale=scale)


def probe_of(made: Setting, *, microbatches: int):
    return make_probe(made.objective, kv_weight=RISING, microbatches=microbatches)


@cache
def program(**weights: Any):
    """A setting and its compiled ``batch -> Probed``, two microbatches.

    Cross-entropy falls and KL rises over ten steps unless ``weights`` say otherwise.
    """
    made = setting(names=("big", "other"), kl_weight=1.0)
    weights = {"ce_weight": FALLING, "kl_weight": RISING} | weights
    made = made._replace(objective=replace(made.objective, **weights))
    run = jax.jit(probe_of(made, microbatches=2))
    return made, lambda data=BATCH: run(state_of(made), made.teachers, data)


def every(rows: Batch, nth: int) -> Batch:
    return jax.tree.map(lambda x: x[::nth], rows)


@cache
def flat_gradients() -> dict[str, np.ndarray]:
    """Of cross-entropy, KL and KV, each alone and with weight 1, to the student's parameters."""
    made, rows = setting(names=("big", "other"), kl_weight=1.0), every(BATCH, 4)
    whole, step = (1.0, 1.0), jnp.asarray(3, jnp.int32)
    only_ce = replace(made.objective, kl_weight=None)
    only_kl = replace(made.objective, ce_weight=optax.constant_schedule(0.0))

    def losses(student: Any) -> Any:
        params = made.params | {"student": student}
        known = (params, made.teachers, rows, step, whole, made.statistics)
        (ce, kv), (kl, _) = only_ce(*known)[0], only_kl(*known)[0]
        return {"ce": ce, "kl": kl, "kv": kv}

    found = jax.jit(jax.jacrev(losses))(made.params["student"])
    return {
        name: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
        for name, tree in found.items()
    }


@pytest.mark.parametrize(
    ("weights", "ce", "kl"),
    [
        ({}, 0.7, 0.3),
        ({"ce_weight": optax.constant_schedule(1.0), "kl_weight": None}, 1.0, 0.0),
    ],
    ids=["ramps", "cross-entropy alone"],
)
def test_shares_and_cosines_of_gradients_are_those_of_separate_gradients(weights, ce, kl) -> None:
    _, run = program(**weights)
    found, gradient = run(), flat_gradients()
    of_kv, language = gradient["kv"], ce * gradient["ce"] + kl * gradient["kl"]
    ratio = np.linalg.norm(of_kv) / np.linalg.norm(language)
    cosine = of_kv @ language / np.linalg.norm(of_kv) / np.linalg.norm(language)
    gradients = {name: float(value) for name, value in found.gradients.items()}
    assert gradients == pytest.approx(
        {"kv_gradient_share": 0.3 * 2.0 * ratio, "kv_gradient_cosine": cosine}, rel=CLOSE, abs=CLOSE
    )
    assert abs(cosine) > 100 * CLOSE


def test_a_kv_gradient_of_zero_has_no_share_and_no_direction() -> None:
    _, run = program()
    found = run(BATCH._replace(kv_mask=jnp.zeros_like(BATCH.kv_mask)))
    assert [float(x) for x in found.gradients.values()] == [0.0, 0.0]
    assert all(np.isfinite(row).all() for row in found.layers.values())


def test_figures_are_of_every_mapped_layer_on_a_few_rows_of_the_first_microbatch() -> None:
    made, run = program()
    layers = run().layers
    few = every(BATCH, 4)
    compared = jax.jit(lambda p: made.objective.compared(p, made.teachers, few))(made.params)
    counted = np.asarray(few.kv_mask)
    assert counted.sum() < TOKENS
    for name in ("big", "other"):
        for part in "kv":
            student, target, own = (
                np.asarray(side[part], np.float64)[:, counted] for side in compared[name][0]
            )
            # Lengths are those of the student's own two heads of 8, before the projector.
            assert (student.shape[2:], own.shape[2:]) == ((4, 4), (2, 8))
            lengths = (np.linalg.norm(x, axis=-1).mean(axis=-1) for x in (own, target))
            median = np.median(np.divide(*lengths), axis=1)
            np.testing.assert_allclose(layers[f"{name}/mag_ratio_q50_{part}"], median, rtol=CLOSE)
            s, t = (x - x.mean(axis=1, keepdims=True) for x in (student, target))
            lengths = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
            centred = ((s * t).sum(axis=-1) / lengths).mean(axis=(1, 2))
            found = layers[f"{name}/cos_centered_{part}"]
            np.testing.assert_allclose(found, centred, rtol=CLOSE, atol=CLOSE)


def shape_of(made: Setting) -> Probed:
    """What a probe would return; nothing is computed, so nothing is compiled."""
    probe = probe_of(made, microbatches=1)
    return jax.eval_shape(probe, state_of(made), made.teachers, BATCH)


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_which_figures_there_are(direction) -> None:
    wanted = {f"big/{figure}_{part}" for figure in FIGURES for part in "kv"}
    attention = {"big/attention_cos"}
    three = LayerMap((0, 1, 2), ((0,), (1,), (3,)))
    for layer_map in (three, SIDE_BY_SIDE):
        made = setting(direction=direction, layer_map=layer_map)
        layers = shape_of(made).layers
        reads = direction == "teacher_to_student" or layer_map is three
        assert layers.keys() == wanted | (attention if reads else set())
        assert {row.shape for row in layers.values()} == {(len(layer_map),)}
    several = shape_of(setting(direction=direction, names=("a", "b"))).layers
    assert {name.split("/")[0] for name in several} == {"a", "b"}


def itself() -> Setting:
    """The student as its own teacher, through a projector that changes nothing."""
    made = setting()
    layer_map, width = LayerMap((1, 2), ((1,), (2,))), STUDENT.kv_width
    side = {"d_model": width, "num_heads": STUDENT.num_kv_heads}
    projector = KVDimensionProjector(
        {"self": side}, width, kind="linear", direction="student_to_teacher", student_heads=2
    )
    graph, weights = nnx.split(projector)
    identity = jax.tree.map(
        lambda x: jnp.eye(width) if x.ndim == 2 else jnp.zeros_like(x), nnx.to_pure_dict(weights)
    )
    student = made.objective.student
    comparison = LayerComparison("self", layer_map, remove_key_bias=True)
    objective = replace(
        made.objective,
        projector=graph,
        teachers={"self": TeacherLink(student, comparison, STUDENT)},
    )
    return made._replace(
        objective=objective,
        params=made.params | {"projector": identity},
        teachers={"self": made.params["student"]},
    )


def test_a_student_that_is_its_teacher_is_found_to_be_it() -> None:
    made, rows = itself(), batch()
    look = jax.jit(
        lambda params, teachers: figures(
            [examine(made.objective, params, teachers, rows, tokens=TOKENS)]
        )
    )
    layers = look(made.params, made.teachers)
    ones = ("cos_sim", "cos_centered", "retrieval", "retrieval_centered", "cka", "mag_ratio_q10")
    names = [f"self/{figure}_{part}" for figure in ones for part in "kv"]
    for name in (*names, "self/attention_cos"):
        np.testing.assert_allclose(layers[name], np.ones(2), rtol=CLOSE, err_msg=name)
    # With another student nothing of this is left.
    other = jax.tree.map(lambda x: x[..., ::-1], made.params["student"])
    layers = look(made.params | {"student": other}, made.teachers)
    for name in (*names, "self/attention_cos"):
        assert np.abs(np.asarray(layers[name]) - 1).min() > 0.05, name
