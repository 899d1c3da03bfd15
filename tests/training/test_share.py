"""The step that measures its KV weight, against gradients taken apart and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.geometry import Mean
from kava_jax.training.share import LossScale, share_is_due
from kava_jax.training.step import loss_tokens, make_train_step, split_rows
from tests.tolerances import TOL
from tests.training.small import Setting, batch, jitted, setting, start

CLOSE = TOL["float32"]
BATCH, SHARE, RATE = batch(), 0.2, 0.1
# The scheduled weight at step 3; the scale at first, and how its mean began.
FACTOR, SCALE, LOG_RATIO, COUNT = 0.3, 2.0, -1.5, 2.0
RAMP = optax.linear_schedule(0.0, 1.0, 10)


@pytest.fixture(scope="module")
def made() -> Setting:
    return setting(kl_weight=0.5)


def stepped(made: Setting, microbatches: int, data=BATCH, mean=(LOG_RATIO, COUNT)):
    """One step from step 3 by plain descent: the new state and the metrics."""
    optimizer = optax.sgd(RATE)
    state = start(made, optimizer)
    scale = LossScale(jnp.asarray(SCALE), Mean(*map(jnp.asarray, mean)))
    state = state._replace(step=jnp.asarray(3, jnp.int32), kv_scale=scale)
    step = make_train_step(
        made.objective, optimizer, kv_weight=RAMP, microbatches=microbatches, share=SHARE
    )
    return jitted(step)(state, made.teachers, data)


def gradients(made: Setting, rows, shares=(1.0, 1.0)):
    """Of the language loss and of the KV loss, each taken alone, and their values."""
    known = (made.teachers, rows, jnp.asarray(3, jnp.int32), shares, made.statistics)

    def losses(params):
        return made.objective(params, *known)[0]

    return jax.jit(jax.jacrev(losses))(made.params), jax.jit(losses)(made.params)


def length(tree) -> float:
    flat = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    return float(np.linalg.norm(np.concatenate(flat)))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_first_microbatch_sets_the_weight_of_the_whole_step(made, microbatches) -> None:
    state, metrics = stepped(made, microbatches)
    first = jax.tree.map(lambda x: x[0], split_rows(BATCH, microbatches))
    shares = [
        float(part / whole)
        for part, whole in zip(loss_tokens(first), loss_tokens(BATCH), strict=True)
    ]
    (language, kv), _ = gradients(made, first, tuple(shares))
    ratio = FACTOR * length(kv["student"]) / length(language["student"])
    # The geometric mean of this ratio and of those before it, which fade.
    total, count = 0.5 * LOG_RATIO - np.log(ratio), 0.5 * COUNT + 1
    weight = FACTOR * SHARE * np.exp(total / count)
    scale = [float(x) for x in jax.tree.leaves(state.kv_scale)]
    assert scale == pytest.approx([weight / FACTOR, total, count], rel=CLOSE)
    assert float(metrics["kv_weight"].value) == pytest.approx(weight, rel=CLOSE)
    # All microbatches get that weight: the step is the one of the whole batch.
    (language, kv), values = gradients(made, BATCH)
    assert float(metrics["loss"].value) == pytest.approx(
        float(values[0] + weight * values[1]), rel=CLOSE
    )
    jax.tree.map(
        lambda new, old, a, b: np.testing.assert_allclose(
            new, old - RATE * (a + weight * b), atol=TOL["after_one_step"]
        ),
        state.params,
        made.params,
        language,
        kv,
    )
    assert int(metrics["tokens"].sum) == int(np.asarray(BATCH.valid).sum())


def test_the_first_measurement_gives_the_share_itself(made) -> None:
    state, _ = stepped(made, 1, mean=(0.0, 0.0))
    (language, kv), _ = gradients(made, BATCH)
    weighted = FACTOR * float(state.kv_scale.value) * length(kv["student"])
    assert weighted / length(language["student"]) == pytest.approx(SHARE, rel=CLOSE)


def test_gradients_of_zero_or_nan_measure_nothing(made) -> None:
    silent = BATCH._replace(kv_mask=jnp.zeros_like(BATCH.kv_mask))
    known = [SCALE, LOG_RATIO, COUNT]
    state, metrics = stepped(made, 2, silent)
    assert [float(x) for x in jax.tree.leaves(state.kv_scale)] == known
    assert int(metrics["skipped"].sum) == 0
    spoilt = made._replace(teachers=jax.tree.map(lambda x: x * np.nan, made.teachers))
    state, metrics = stepped(spoilt, 2)
    assert [float(x) for x in jax.tree.leaves(state.kv_scale)] == known
    assert int(metrics["skipped"].sum) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, made.params)


def test_when_a_share_is_due() -> None:
    def due(every: int | None) -> list[int]:
        return [number for number in range(26) if share_is_due(number, every)]

    assert due(None) == []
    assert due(1) == list(range(26))
    assert due(10) == [0, 1, 2, 4, 8, 10, 20]
    assert due(16) == [0, 1, 2, 4, 8, 16]
    assert due(20) == [0, 1, 2, 4, 8, 16, 20]
