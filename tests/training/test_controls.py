"""Controls and parts through the whole objective, against numpy on the caches it compares."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerances import TOL
from tests.training.small import batch, setting, total_loss

BATCH = batch()
WHOLE = (1.0, 1.0)


@cache
def measured(**options):
    """Loss, metrics and gradients of the student of a setting."""
    made = setting(beta=0.0, kv_weight=1.0, ce_weight=0.0, **options)
    run = jax.jit(jax.value_and_grad(total_loss(made), has_aux=True))
    step = jnp.zeros((), jnp.int32)
    (loss, metrics), grads = run(made.params, made.teachers, BATCH, step, WHOLE)
    found = jax.jit(made.objective.compared)(made.params, made.teachers, BATCH)["big"][0]
    return float(loss), metrics, grads["student"], found


def cosine_loss(student, target, mask) -> float:
    """Mean over the tokens of the mask, layers and heads of 1 - cosine."""
    s, t = (np.asarray(x, np.float64) for x in (student, target))
    norms = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
    loss = 1 - (s * t).sum(axis=-1) / norms
    return float(loss.mean(axis=(0, 3))[mask].mean())


def test_the_shuffled_target_is_the_previous_rows_and_what_is_reported_is_the_true_one():
    loss, metrics, _, caches = measured(control="shuffled")
    true_metrics = measured()[1]
    mask, wanted = np.asarray(BATCH.kv_mask), []
    for part in ("k", "v"):
        student, target = (np.asarray(side[part]) for side in caches[:2])
        with_target = mask & np.roll(mask, 1, axis=0)
        assert with_target.sum() < mask.sum()  # rows of different lengths
        wanted.append(cosine_loss(student, np.roll(target, 1, axis=1), with_target))
        got = metrics[f"big/kv_{part}"]
        np.testing.assert_allclose(float(got.sum / got.count), wanted[-1], atol=TOL["float32"])
        assert metrics[f"big/cos_{part}"] == true_metrics[f"big/cos_{part}"]
    np.testing.assert_allclose(loss, np.mean(wanted), atol=TOL["float32"])


def test_the_constant_target_is_the_mean_of_all_counted_tokens():
    _, metrics, _, caches = measured(control="constant")
    mask = np.asarray(BATCH.kv_mask)
    for part in ("k", "v"):
        student, target = (np.asarray(side[part], np.float64) for side in caches[:2])
        mean = target[:, mask].mean(axis=1)
        wanted = cosine_loss(student, np.broadcast_to(mean[:, None, None], student.shape), mask)
        got = metrics[f"big/kv_{part}"]
        np.testing.assert_allclose(float(got.sum / got.count), wanted, atol=TOL["float32"])


@pytest.mark.parametrize(("parts", "part"), [("keys", "k"), ("values", "v")])
def test_one_part_alone_is_its_own_loss(parts, part):
    loss, metrics, grads, _ = measured(parts=parts)
    both = measured()[1]
    for name in ("k", "v"):  # the other one is still measured
        assert metrics[f"big/kv_{name}"] == both[f"big/kv_{name}"]
    got = metrics[f"big/kv_{part}"]
    # One teacher of weight 1, so the loss is that part's.
    np.testing.assert_allclose(loss, float(got.sum / got.count), rtol=TOL["rearranged"])
    # Nothing reads the last layer's cache but the comparison.
    last = {name: grads["blocks"]["attention"][name]["kernel"][-1] for name in ("k", "v")}
    other = {"k": "v", "v": "k"}[part]
    assert np.abs(last[part]).max() > 0
    assert np.abs(last[other]).max() == 0
