"""The reference frame against numpy in float64: offsets, moments, gradients, holes, devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.alignment.frame import Frame, Moments, decay, empty, measure, merge, merge_stacked
from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from tests.tolerances import TOL

CLOSE = TOL["float32"]
P, B, T, K, H = 2, 8, 6, 2, 3
OFFSET, SPREAD = 605.0, 22.0
MASK = np.random.default_rng(5).random((B, T)) < 0.7
STILL = (1, 0, 2)  # layer, head, dimension that never moves
MOVES = np.ones((P, K, H), bool)
MOVES[STILL] = False
FRAMES = [
    (center, standardize)
    for center in ("none", "batch", "running")
    for standardize in (False, True)
]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def vectors(seed: int = 0) -> np.ndarray:
    """Float32 numbers, kept as float64: a large shared offset beside the content."""
    shared = OFFSET * np.sign(normal(7, P, 1, 1, K, H)) * (1 + np.arange(H) / 10)
    x = shared + SPREAD * normal(seed, P, B, T, K, H)
    x[STILL[0], :, :, STILL[1], STILL[2]] = 605.3
    return x.astype(np.float32).astype(np.float64)


def counted(x: np.ndarray, mask: np.ndarray = MASK) -> np.ndarray:
    """Counted tokens as one axis: [P, n, K, H]."""
    return x[:, mask != 0]


def moments64(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Of [P, n, K, H]."""
    return x.shape[1], x.mean(1), x.var(1) * x.shape[1]


def std64(tokens: np.ndarray) -> np.ndarray:
    return np.where(MOVES, tokens.std(1), 1.0)


def frame64(x, statistics, center: str, standardize: bool) -> np.ndarray:
    tokens = counted(statistics)
    y = x - (0 if center == "none" else tokens.mean(1)[:, None, None])
    y = y / std64(tokens)[:, None, None] if standardize else y
    return np.where(MASK[None, :, :, None, None], y, 0)


def assert_moments(got: Moments, want) -> None:
    """Against (count, mean, m2); a dimension that never moves is left out of m2."""
    np.testing.assert_allclose(got.count, want[0], rtol=CLOSE)
    np.testing.assert_allclose(got.mean, want[1], rtol=CLOSE)
    np.testing.assert_allclose(got.m2[MOVES], want[2][MOVES], rtol=CLOSE)


def to_jax(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


@functools.cache
def jitted(frame: Frame):
    """(x, mask, running, weights) -> the framed vectors and the gradient of their weighted sum."""

    def weighted(x, mask, running, weights):
        y = frame(x, mask, running)
        return (y.reshape(weights.shape) * weights).sum(), y

    return jax.jit(jax.grad(weighted, has_aux=True))


WEIGHTS = normal(3, P, B, T, K, H)
NOTHING = empty(P, K, H)
measured = jax.jit(measure)


def run(frame: Frame, x: np.ndarray, running: Moments = NOTHING, mask: np.ndarray = MASK):
    gradient, y = jitted(frame)(to_jax(x), jnp.asarray(mask), running, to_jax(WEIGHTS))
    return y, gradient


@pytest.mark.parametrize(("center", "standardize"), FRAMES)
def test_vectors_equal_numpy_under_a_large_offset(center: str, standardize: bool) -> None:
    x, memory = vectors(), vectors(1)
    y, _ = run(Frame(center, standardize), x, measured(to_jax(memory), jnp.asarray(MASK)))
    assert y.dtype == jnp.float32
    want = frame64(x, memory if center == "running" else x, center, standardize)
    # What is left of float32 numbers near 605, in units of the spread: 2**-15 / 22 a rounding.
    unit = 1.0 if standardize else SPREAD
    np.testing.assert_allclose(y / unit, want / unit, rtol=CLOSE, atol=CLOSE)
    side_by_side, _ = run(
        Frame(center, standardize, per_head=False), x, measured(to_jax(memory), jnp.asarray(MASK))
    )
    assert side_by_side.shape == (P, B, T, 1, K * H)
    np.testing.assert_array_equal(side_by_side.reshape(y.shape), y)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("center", ["none", "batch"])
def test_gradients_pass_through_the_batch_own_statistics(center: str, standardize: bool) -> None:
    x, step = vectors(), normal(4, P, B, T, K, H) * MOVES[:, None, None]
    _, gradient = run(Frame(center, standardize), x)
    ahead, behind = (
        frame64(x + h * step, x + h * step, center, standardize) for h in (1e-3, -1e-3)
    )
    slope = (WEIGHTS * (ahead - behind)).sum() / 2e-3
    np.testing.assert_allclose((gradient * step).sum(), slope, rtol=CLOSE)


@pytest.mark.parametrize("standardize", [False, True])
def test_running_statistics_are_constants(standardize: bool) -> None:
    x, mask = vectors(), jnp.asarray(MASK)
    frame = Frame("running", standardize)
    y, gradient = run(frame, x, measured(to_jax(x), mask))
    batch, through = run(Frame("batch", standardize), x)
    unit = 1.0 if standardize else SPREAD
    np.testing.assert_allclose(y / unit, batch / unit, atol=CLOSE)
    scale = std64(counted(x)) if standardize else np.ones((P, K, H))
    want = np.where(MASK[None, :, :, None, None], WEIGHTS / scale[:, None, None], 0)
    np.testing.assert_allclose(gradient, want, rtol=CLOSE, atol=CLOSE)
    assert not np.allclose(through, want, rtol=0.01, atol=CLOSE)
    # Before anything was counted: the batch's own, as constants too.
    first, its_gradient = run(frame, x)
    np.testing.assert_allclose(first / unit, batch / unit, atol=CLOSE)
    np.testing.assert_allclose(its_gradient, want, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(("center", "standardize"), FRAMES)
def test_tokens_that_do_not_count_change_nothing(center: str, standardize: bool) -> None:
    frame, x = Frame(center, standardize), vectors()
    hole = ~MASK[None, :, :, None, None]
    for bad in (np.nan, np.inf):
        spoilt = np.where(hole, bad, x)
        for got, want in zip(run(frame, spoilt), run(frame, x), strict=True):
            np.testing.assert_array_equal(got, want)
            assert jnp.isfinite(got).all()
            assert not np.asarray(got)[np.broadcast_to(hole, got.shape)].any()
        of_spoilt, of_clean = (measured(to_jax(y), jnp.asarray(MASK)) for y in (spoilt, x))
        jax.tree.map(np.testing.assert_array_equal, of_spoilt, of_clean)


@pytest.mark.parametrize(("center", "standardize"), FRAMES)
def test_a_token_alone_no_token_and_zeros_are_finite(center: str, standardize: bool) -> None:
    alone, nobody = np.zeros((B, T), bool), np.zeros((B, T), bool)
    alone[1, 2] = True
    for x, mask in ((vectors(), alone), (vectors(), nobody), (0 * vectors(), MASK)):
        for found in run(Frame(center, standardize), x, mask=mask):
            assert jnp.isfinite(found).all()
    y, _ = run(Frame(center, standardize), vectors(), mask=alone)
    want = vectors()[:, 1, 2] if center == "none" else np.zeros((P, K, H))
    np.testing.assert_allclose(y[:, 1, 2], want)


def test_parts_add_up_to_the_whole() -> None:
    x = vectors()
    halves = [measured(to_jax(x), jnp.asarray(MASK & rows[:, None])) for rows in part_rows(2)]
    assert_moments(measured(to_jax(x), jnp.asarray(MASK)), moments64(counted(x)))
    assert_moments(jax.jit(merge)(*halves), moments64(counted(x)))
    parts = [measured(to_jax(x), jnp.asarray(MASK & rows[:, None])) for rows in part_rows(5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), NOTHING, *parts, NOTHING)
    assert_moments(jax.jit(merge_stacked)(stacked), moments64(counted(x)))


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
    squares = np.average((tokens - mean[:, None]) ** 2, axis=1, weights=weights)
    assert_moments(memory, (weights.sum(), mean, squares * weights.sum()))


def test_a_memory_of_one_batch_does_not_drift() -> None:
    one = measured(to_jax(vectors()), jnp.asarray(MASK))
    many = jax.jit(
        lambda one: jax.lax.fori_loop(0, 200, lambda _, memory: merge(decay(memory, 0.9), one), one)
    )(one)
    np.testing.assert_array_equal(many.mean, one.mean)
    np.testing.assert_allclose(many.count, 10 * one.count, rtol=CLOSE)
    np.testing.assert_allclose(many.m2[MOVES], 10 * one.m2[MOVES], rtol=CLOSE)


def test_dimensions_that_do_not_move_are_not_blown_up() -> None:
    x = np.broadcast_to(1000 * normal(8, P, 1, 1, K, H), (P, B, T, K, H)).astype(np.float32)
    everyone = np.ones((B, T), bool)
    as_it_is, _ = run(Frame("none", standardize=True), x, mask=everyone)
    np.testing.assert_array_equal(as_it_is, x)
    centred, _ = run(Frame("batch", standardize=True), x, mask=everyone)
    np.testing.assert_allclose(centred, 0, atol=1000 * CLOSE)


@pytest.mark.parametrize("center", ["batch", "running"])
def test_rows_may_lie_on_eight_devices(center: str) -> None:
    frame, mesh = Frame(center, standardize=True), make_mesh()

    def both(rows, mask):
        x = jnp.moveaxis(rows, 0, 1)
        gradient, y = jitted(frame)(x, mask, NOTHING, to_jax(WEIGHTS))
        return y, gradient, measure(x, mask)

    arguments = (np.moveaxis(vectors(), 1, 0).astype(np.float32), MASK)
    want, split = (jax.jit(both)(*place) for place in (arguments, put_batch(arguments, mesh)))
    assert len(split[0].sharding.device_set) == 8
    for got, expected in zip(split[:2], want[:2], strict=True):
        np.testing.assert_allclose(got, expected, rtol=CLOSE, atol=CLOSE)
    assert_moments(split[2], moments64(counted(vectors())))


def test_running_moments_are_asked_for() -> None:
    x, mask = to_jax(vectors()), jnp.asarray(MASK)
    with pytest.raises(KavaError, match=r"loss\.center=running"):
        Frame("running")(x, mask)
    assert Frame("batch")(x, mask).shape == x.shape
    assert hash(Frame("batch")) == hash(Frame("batch", False, True))
