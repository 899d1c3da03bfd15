"""Held-out figures: means over tokens, whatever the batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.data.batches import collate, eval_batches
from kava_jax.evaluation.heldout import held_out, make_measure
from kava_jax.training.objective import Share
from tests.tolerances import TOL
from tests.training.small import SINKS, rows, setting


def test_uneven_batches_equal_one_big_one() -> None:
    made = setting(dropout=0.5, ce_weight=0.3, kl_weight=0.5)
    measure = make_measure(made.objective)
    whole = jax.tree.map(jnp.asarray, collate(rows(8), 12, 0, SINKS))
    # Three batches of 3, 3 and 2 rows (and a filler), each as long as its own longest row.
    parts = [
        jax.tree.map(jnp.asarray, batch)
        for batch in eval_batches(rows(8), 3, max_length=12, bucket=1, sink_tokens=SINKS)
    ]
    assert [part.tokens.shape for part in parts] == [(3, 12), (3, 12), (3, 5)]
    one = held_out(measure, made.params, made.teachers, [whole])
    many = held_out(measure, made.params, made.teachers, parts)
    assert one.keys() == many.keys()
    assert one.keys() >= {"eval_loss", "eval_cos_sim", "eval_alignment_gap", "eval_cos_centered"}
    assert not one.keys() & {"eval_kv", "eval_dir_loss", "eval_mag_loss", "eval_ce"}
    for name in ("loss", "cos_sim", "cos_k", "cos_v", "mag_ratio", "kl"):
        assert many[f"eval_{name}"] == pytest.approx(
            one[f"eval_{name}"], rel=TOL["float32"], abs=TOL["float32"]
        )
    # And not the mean of the batches' means.
    alone = [held_out(measure, made.params, made.teachers, [part])["eval_loss"] for part in parts]
    assert abs(np.mean(alone) - one["eval_loss"]) > 1e-3
    # Without dropout and without the training's weights.
    share = Share(jnp.ones(()), jnp.ones(()))
    zero = jnp.zeros((), jnp.int32)
    objective = jax.jit(lambda params: made.objective(params, made.teachers, whole, zero, share))
    _, metrics = objective(made.params)
    assert one["eval_loss"] == pytest.approx(float(metrics["ce"].value), rel=TOL["float32"])
    assert held_out(measure, made.params, made.teachers, [whole]) == one


def test_one_row_has_no_gap() -> None:
    made = setting()
    batch = jax.tree.map(jnp.asarray, collate(rows(1), 12, 0, SINKS))
    found = held_out(make_measure(made.objective), made.params, made.teachers, [batch])
    assert math.isfinite(found["eval_cos_sim"])
    assert math.isnan(found["eval_alignment_gap"])
