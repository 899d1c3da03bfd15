"""The reference frame against numpy in float64: offsets, means, gradients, holes, devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.alignment.frame import TokenMean, decay, empty, framed, measure, merge, merge_stacked
from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from tests.tolerances import TOL

CLOSE = TOL["float32"]
P, B, T, K, H = 2, 8, 6, 2, 3
OFFSET, SPREAD = 605.0, 22.0
MASK = np.random.default_rng(5).random((B, T)) < 0.7
CENTERS = ("none", "batch", "running")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def vectors(seed: int = 0) -> np.ndarray:
    """Float32 numbers, kept as float64: a large shared offset beside the content."""
    shared = OFFSET * np.sign(normal(7, P, 1, 1, K, H)) * (1 + np.arange(H) / 10)
    x = shared + SPREAD * normal(seed, P, B, T, K, H)
    return x.astype(np.float32).astype(np.float64)


def counted(x: np.ndarray, mask: np.ndarray = MASK) -> np.ndarray:
    """Counted tokens as one axis: [P, n, K, H]."""
    return x[:, mask != 0]


def mean64(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Of [P, n, K, H]."""
    return x.shape[1], x.mean(1)


def frame64(x, statistics, center: str) -> np.ndarray:
    y = x - (0 if center == "none" else counted(statistics).mean(1)[:, None, None])
    return np.where(MASK[None, :, :, None, None], y, 0)


def assert_mean(got: TokenMean, want) -> None:
    """Against (count, mean)."""
    np.testing.assert_allclose(got.count, want[0], rtol=CLOSE)
    np.testing.assert_allclose(got.mean, want[1], rtol=CLOSE)


def to_jax(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


@functools.cache
def jitted(center: str):
    """(x, mask, running, weights) -> the framed vectors and the gradient of their weighted sum."""

    def weighted(x, mask, running, weights):
        y = framed(x, mask, center, running)
        return (y.reshape(weights.shape) * weights).sum(), y

    return jax.jit(jax.grad(weighted, has_aux=True))


WEIGHTS = normal(3, P, B, T, K, H)
NOTHING = empty(P, K, H)
measured = jax.jit(measure)


def run(center: str, x: np.ndarray, running: TokenMean = NOTHING, mask: np.ndarray = MASK):
    gradient, y = jitted(center)(to_jax(x), jnp.asarray(mask), running, to_jax(WEIGHTS))
    return y, gradient


@pytest.mark.parametrize("center", CENTERS)
def test_vectors_equal_numpy_under_a_large_offset(center: str) -> None:
    x, memory = vectors(), vectors(1)
    y, _ = run(center, x, measured(to_jax(memory), jnp.asarray(MASK)))
    assert y.dtype == jnp.float32
    want = frame64(x, memory if center == "running" else x, center)
    # What is left of float32 numbers near 605, in units of the spread: 2**-15 / 22 a rounding.
    np.testing.assert_allclose(y / SPREAD, want / SPREAD, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("center", ["none", "batch"])
def test_gradients_pass_through_the_batch_own_statistics(center: str) -> None:
    x, step = vectors(), normal(4, P, B, T, K, H)
    _, gradient = run(center, x)
    ahead, behind = (frame64(x + h * step, x + h * step, center) for h in (1e-3, -1e-3))
    slope = (WEIGHTS * (ahead - behind)).sum() / 2e-3
    np.testing.assert_allclose((gradient * step).sum(), slope, rtol=CLOSE)


def test_running_statistics_are_constants() -> None:
    x, mask = vectors(), jnp.asarray(MASK)
    y, gradient = run("running", x, measured(to_jax(x), mask))
    batch, through = run("batch", x)
    np.testing.assert_allclose(y / SPREAD, batch / SPREAD, atol=CLOSE)
    want = np.where(MASK[None, :, :, None, None], WEIGHTS, 0)
    np.testing.assert_allclose(gradient, want, rtol=CLOSE, atol=CLOSE)
    assert not np.allclose(through, want, rtol=0.01, atol=CLOSE)
    # Before anything was counted: the batch's own, as constants too.
    first, its_gradient = run("running", x)
    np.testing.assert_allclose(first / SPREAD, batch / SPREAD, atol=CLOSE)
    np.testing.assert_allclose(its_gradient, want, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("center", CENTERS)
def test_tokens_that_do_not_count_change_nothing(center: str) -> None:
    x = vectors()
    hole = ~MASK[None, :, :, None, None]
    for bad in (np.nan, np.inf):
        spoilt = np.where(hole, bad, x)
        for got, want in zip(run(center, spoilt), run(center, x), strict=True):
            np.testing.assert_array_equal(got, want)
            assert jnp.isfinite(got).all()
            assert not np.asarray(got)[np.broadcast_to(hole, got.shape)].any()
        of_spoilt, of_clean = (measured(to_jax(y), jnp.asarray(MASK)) for y in (spoilt, x))
        jax.tree.map(np.testing.assert_array_equal, of_spoilt, of_clean)


@pytest.mark.parametrize("center", CENTERS)
def test_a_token_alone_no_token_and_zeros_are_finite(center: str) -> None:
    alone, nobody = np.zeros((B, T), bool), np.zeros((B, T), bool)
    alone[1, 2] = True
    for x, mask in ((vectors(), alone), (vectors(), nobody), (0 * vectors(), MASK)):
        for found in run(center, x, mask=mask):
            assert jnp.isfinite(found).all()
    y, _ = run(center, vectors(), mask=alone)
    want = vectors()[:, 1, 2] if center == "none" else np.zeros((P, K, H))
    np.testing.assert_allclose(y[:, 1, 2], want)


def test_parts_add_up_to_the_whole() -> None:
    x = vectors()
    halves = [measured(to_jax(x), jnp.asarray(MASK & rows[:, None])) for rows in part_rows(2)]
    assert_mean(measured(to_jax(x), jnp.asarray(MASK)), mean64(counted(x)))
    assert_mean(jax.jit(merge)(*halves), mean64(counted(x)))
    parts = [measured(to_jax(x), jnp.asarray(MASK & rows[:, None])) for rows in part_rows(5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), NOTHING, *parts, NOTHING)
    assert_mean(jax.jit(merge_stacked)(stacked), mean64(counted(x)))


def part_rows(parts: int) -> list[np.ndarray]:
    """Rows of uneven parts."""
    borders = [0, *sorted(np.random.default_rng(parts).permutation(B - 1)[: parts - 1] + 1), B]
    return [
        (np.arange(B) >= low) & (np.arange(B) < high) for low, high in itertools.pairwise(borders)
    ]


def test_nothing_changes_nothing() -> None:
    some = measured(to_jax(vectors()), jnp.asarray(MASK))
    none = measured(to_jax(np.full((P, B, T, K, H), np.nan)), jnp.zeros((B, T), bool))
    jax.tree.map(np.testing.assert_array_equal, none, NOTHING)
    for both in (merge(some, NOTHING), merge(NOTHING, some), merge(decay(some, 0), some)):
        jax.tree.map(np.testing.assert_array_equal, both, some)
    jax.tree.map(np.testing.assert_array_equal, merge(NOTHING, NOTHING), NOTHING)


def test_a_memory_that_forgets_is_a_weighted_mean() -> None:
    keep, memory = 0.9, NOTHING
    step = jax.jit(lambda memory, x: merge(decay(memory, keep), measure(x, jnp.asarray(MASK))))
    batches = [vectors(seed) + 5 * seed for seed in range(6)]
    for x in batches:
        memory = step(memory, to_jax(x))
    tokens = np.concatenate([counted(x) for x in batches], axis=1)
    weights = np.repeat(keep ** np.arange(5, -1, -1), MASK.sum())
    mean = np.average(tokens, axis=1, weights=weights)
    assert_mean(memory, (weights.sum(), mean))


def test_a_memory_of_one_batch_does_not_drift() -> None:
    one = measured(to_jax(vectors()), jnp.asarray(MASK))
    many = jax.jit(
        lambda one: jax.lax.fori_loop(0, 200, lambda _, memory: merge(decay(memory, 0.9), one), one)
    )(one)
    np.testing.assert_array_equal(many.mean, one.mean)
    np.testing.assert_allclose(many.count, 10 * one.count, rtol=CLOSE)


@pytest.mark.parametrize("center", ["batch", "running"])
def test_rows_may_lie_on_eight_devices(center: str) -> None:
    mesh = make_mesh()

    def both(rows, mask):
        x = jnp.moveaxis(rows, 0, 1)
        gradient, y = jitted(center)(x, mask, NOTHING, to_jax(WEIGHTS))
        return y, gradient, measure(x, mask)

    arguments = (np.moveaxis(vectors(), 1, 0).astype(np.float32), MASK)
    want, split = (jax.jit(both)(*place) for place in (arguments, put_batch(arguments, mesh)))
    assert len(split[0].sharding.device_set) == 8
    for got, expected in zip(split[:2], want[:2], strict=True):
        np.testing.assert_allclose(got, expected, rtol=CLOSE, atol=CLOSE)
    assert_mean(split[2], mean64(counted(vectors())))


def test_a_running_mean_is_asked_for() -> None:
    x, mask = to_jax(vectors()), jnp.asarray(MASK)
    with pytest.raises(KavaError, match=r"loss\.center=running"):
        framed(x, mask, "running")
    assert framed(x, mask, "batch").shape == x.shape
