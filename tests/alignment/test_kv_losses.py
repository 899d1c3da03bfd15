"""The menu of KV losses against numpy in float64: values, slopes, masks, memory, devices."""

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from kava_jax import losses
from kava_jax.alignment.kv_losses import MSE, AnyKVLoss, SmoothL1
from kava_jax.errors import KavaError
from kava_jax.geometry import masked_mean
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from tests.tolerances import TOL

CLOSE = TOL["float32"]
P, B, T, K, H = 2, 3, 5, 2, 4
# A full row, one with holes, one with a single counted token.
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0]])
KV_LOSSES = {loss.model_fields["kind"].default: loss for loss in get_args(AnyKVLoss)}
SHARED = {
    "mercator": losses.MercatorKVLoss(beta=0.01),
    "hybrid": losses.HybridKVLoss(),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def sides(rows: int = B) -> list[np.ndarray]:
    """Two caches that share something, the target three times as long and with an offset."""
    s, t = normal(0, P, rows, T, K, H), normal(1, P, rows, T, K, H)
    return [x.astype(np.float32).astype(np.float64) for x in (s, 3 * t + 2 * s + 1)]


WEIGHTS = normal(2, B, T)


@functools.cache
def compiled(kind: str):
    """Jitted (s, t, mask, weights) -> losses of tokens and the gradients of their weighted sum."""
    loss = KV_LOSSES[kind]()

    def weighted(s, t, mask, weights):
        values = loss(s, t, mask)
        return (values * weights).sum(), values

    return jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))


def run(kind: str, s, t, mask=MASK, weights=WEIGHTS):
    gradients, values = compiled(kind)(
        *(jnp.asarray(x, jnp.float32) for x in (s, t)), jnp.asarray(mask), jnp.asarray(weights)
    )
    return values, gradients


def cos64(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def of_vectors(kind: str, s: np.ndarray, t: np.ndarray) -> float:
    d = np.abs(s - t)
    mercator = 1 - cos64(s, t) + 0.01 * np.log(np.linalg.norm(s) / np.linalg.norm(t)) ** 2
    square = np.mean(d**2)
    bent = np.where(d < 1, 0.5 * d**2, d - 0.5).mean()
    return {
        "mercator": mercator,
        "mse": square,
        "smooth_l1": bent,
        "hybrid": 0.8 * mercator + 0.2 * square,
    }[kind]


def reference(kind: str, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    values = np.zeros((B, T))
    for b, p, k in itertools.product(range(B), range(P), range(K)):
        for i in np.flatnonzero(MASK[b]):
            values[b, i] += of_vectors(kind, s[p, b, i, k], t[p, b, i, k]) / (P * K)
    return values


@pytest.mark.parametrize("kind", KV_LOSSES)
def test_values_and_slopes_equal_numpy(kind: str) -> None:
    s, t = sides()
    values, gradients = run(kind, s, t)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference(kind, s, t), rtol=CLOSE, atol=CLOSE)
    # The slope along one random direction of each side.
    for side, gradient in enumerate(gradients):
        step = [np.zeros_like(s), np.zeros_like(t)]
        step[side] = normal(3 + side, *s.shape)
        ahead, behind = (reference(kind, s + h * step[0], t + h * step[1]) for h in (1e-6, -1e-6))
        slope = (WEIGHTS * (ahead - behind)).sum() / 2e-6
        np.testing.assert_allclose((gradient * step[side]).sum(), slope, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("kind", KV_LOSSES)
def test_bfloat16_is_widened_before_anything_is_computed(kind: str) -> None:
    s, t = (jnp.asarray(x, jnp.bfloat16) for x in sides())
    values = jax.jit(KV_LOSSES[kind]())(s, t, jnp.asarray(MASK))
    want = reference(kind, *(np.asarray(x, np.float64) for x in (s, t)))
    np.testing.assert_allclose(values, want, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("kind", SHARED)
def test_the_mean_over_counted_tokens_is_the_loss_of_that_name(kind: str) -> None:
    s, t = (jnp.asarray(x, jnp.bfloat16) for x in sides())
    mask = jnp.asarray(MASK)
    values = jax.jit(KV_LOSSES[kind]())(s, t, mask)
    want, _ = SHARED[kind](s, t, mask)
    np.testing.assert_allclose(masked_mean(values, mask).value, want, rtol=TOL["rearranged"])


def test_smooth_l1_equals_torch_and_survives_huge_distances() -> None:
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    s, t = normal(0, 1, 1, 6, 1, 9) * 3, normal(1, 1, 1, 6, 1, 9)
    want = torch.nn.functional.smooth_l1_loss(torch.tensor(s), torch.tensor(t), beta=1.0)

    def mean(s):
        return SmoothL1()(s, jnp.asarray(t, jnp.float32), jnp.ones((1, 6))).mean()

    np.testing.assert_allclose(mean(jnp.asarray(s, jnp.float32)), want.numpy(), rtol=CLOSE)
    huge = jax.grad(mean)(jnp.full(s.shape, 1e30))
    np.testing.assert_allclose(huge, 1 / 54, rtol=CLOSE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KV_LOSSES)
def test_tokens_that_do_not_count_change_nothing(kind: str, bad: float) -> None:
    s, t = sides()
    values, gradients = run(kind, s, t)
    hole = (MASK == 0)[None, :, :, None, None]
    spoilt = run(kind, *(np.where(hole, bad, x) for x in (s, t)))
    np.testing.assert_array_equal(spoilt[0], values)
    assert (np.asarray(values)[MASK == 0] == 0).all()
    for got, want in zip(spoilt[1], gradients, strict=True):
        np.testing.assert_array_equal(got, want)
        assert not np.asarray(got)[np.broadcast_to(hole, got.shape)].any()


@pytest.mark.parametrize("kind", KV_LOSSES)
def test_zeros_and_batches_without_a_token_are_finite(kind: str) -> None:
    s, t = sides()
    for inputs in ((0 * s, t, MASK), (s, 0 * t, MASK), (0 * s, 0 * t, MASK), (s, t, 0 * MASK)):
        values, gradients = run(kind, *inputs)
        for found in (values, *gradients):
            assert jnp.isfinite(found).all()
    assert not values.any()


@pytest.mark.parametrize("kind", ["mercator", "hybrid"])
def test_beta_weighs_the_lengths_alone(kind: str) -> None:
    s, mask = jnp.asarray(sides()[0], jnp.float32), jnp.asarray(MASK)
    loss = KV_LOSSES[kind](beta=0.5)
    share = {"mercator": 1.0, "hybrid": 0.8}[kind]
    direction = {"mercator": 0.0, "hybrid": 0.2 * float(losses.mse(s, 3 * s, mask).value)}[kind]
    found = masked_mean(loss(s, 3 * s, mask), mask).value
    np.testing.assert_allclose(found, direction + share * 0.5 * np.log(3) ** 2, rtol=CLOSE)


def test_fields_are_checked_and_nothing_else_is_taken() -> None:
    for wrong in ({"beta": -1}, {"beta": float("nan")}, {"alpha": 1}):
        with pytest.raises(ValidationError):
            KV_LOSSES["mercator"](**wrong)


def test_rows_may_lie_on_eight_devices() -> None:
    s, t = (np.moveaxis(x, 1, 0).astype(np.float32) for x in sides(8))
    mask = np.resize(MASK, (8, T))
    weights = normal(2, 8, T).astype(np.float32)

    def run_on(place):
        def by_row(s, t, mask, weights):
            return compiled("hybrid")(jnp.moveaxis(s, 0, 1), jnp.moveaxis(t, 0, 1), mask, weights)

        return jax.jit(by_row)(*place((s, t, mask, weights)))

    gradients, values = run_on(lambda batch: put_batch(batch, make_mesh()))
    assert len(values.sharding.device_set) == 8
    want_gradients, want = run_on(lambda batch: batch)
    for got, expected in zip((values, *gradients), (want, *want_gradients), strict=True):
        np.testing.assert_allclose(got, expected, atol=TOL["across_meshes"])


def test_what_cannot_be_is_said_in_one_line() -> None:
    s, t = jnp.ones((P, B, T, K, H)), jnp.ones((P, B, T, K, H + 1))
    with pytest.raises(KavaError, match="differs from target shape"):
        MSE()(s, t, jnp.asarray(MASK))
