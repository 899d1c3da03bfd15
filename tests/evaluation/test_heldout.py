"""Held-out figures: means over tokens, whatever the batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.data.batches import collate, eval_batches
from kava_jax.evaluation.heldout import make_held_out
from tests.tolerances import TOL
from tests.training.small import SINKS, one_device, rows, setting, total_loss


def figures(made, batches, held_out=None):
    held_out = held_out or make_held_out(made.objective, one_device())
    makers = [lambda batch=batch: batch for batch in batches]
    return held_out(made.params, made.teachers, made.statistics, makers)


def test_uneven_batches_equal_one_big_one() -> None:
    made = setting(dropout=0.5, ce_weight=0.3, kl_weight=0.5)
    held_out = make_held_out(made.objective, one_device())
    whole = jax.tree.map(jnp.asarray, collate(rows(8), 12, 0, SINKS))
    # Three batches of 3, 3 and 2 rows (and a filler), each as long as its own longest row.
    parts = [
        jax.tree.map(jnp.asarray, batch)
        for batch in eval_batches(rows(8), 3, max_length=12, bucket=1, sink_tokens=SINKS)
    ]
    assert [part.tokens.shape for part in parts] == [(3, 12), (3, 12), (3, 5)]
    one, layers = figures(made, [whole], held_out)
    many, more = figures(made, parts, held_out)
    assert one.keys() == many.keys()
    assert one.keys() >= {"eval_loss", "eval_cos_sim", "eval_alignment_gap", "eval_cos_centered"}
    assert not one.keys() & {"eval_kv", "eval_dir_loss", "eval_mag_loss", "eval_ce"}
    for name in ("loss", "cos_sim", "cos_k", "cos_v", "mag_ratio", "kl"):
        assert many[f"eval_{name}"] == pytest.approx(
            one[f"eval_{name}"], rel=TOL["float32"], abs=TOL["float32"]
        )
    # And not the mean of the batches' means.
    alone = [figures(made, [part], held_out).values["eval_loss"] for part in parts]
    assert abs(np.mean(alone) - one["eval_loss"]) > 1e-3
    # Without dropout and without the training's weights.
    share = (1.0, 1.0)
    zero = jnp.zeros((), jnp.int32)
    objective = jax.jit(lambda params: total_loss(made)(params, made.teachers, whole, zero, share))
    _, metrics = objective(made.params)
    assert one["eval_loss"] == pytest.approx(float(metrics["ce"].value), rel=TOL["float32"])
    assert figures(made, [whole], held_out) == (one, layers)
    # Fewer tokens than the sample holds: the sample is all of them, however they are batched.
    assert layers.keys() == more.keys() >= {"big/cka_k", "big/retrieval_v", "big/attention_cos"}
    for name, row in layers.items():
        assert len(row) == 2
        # Which example is the next one depends on the batch; retrieval near a tie on rounding.
        if not any(part in name for part in ("retrieval", "shuffled")):
            assert more[name] == pytest.approx(row, rel=1e-3, abs=1e-4), name


def test_one_row_has_no_gap() -> None:
    made = setting()
    batch = jax.tree.map(jnp.asarray, collate(rows(1), 12, 0, SINKS))
    found = figures(made, [batch]).values
    assert math.isfinite(found["eval_cos_sim"])
    assert math.isnan(found["eval_alignment_gap"])
