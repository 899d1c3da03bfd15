"""Shares, entropy and prototypes of the router against numpy; the gate against its optimum."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kava_jax.alignment.router import Gate, Router, empty_prototypes, entropy, remember, served
from kava_jax.geometry import Mean
from tests.tolerances import TOL

CLOSE = TOL["float32"]
B, T, D, M = 2, 3, 4, 3
WEIGHTS = (0.5, 0.0, 2.0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


HIDDEN = normal(0, B, T, D)
GATE = {"kernel": normal(1, D, M), "bias": normal(2, M)}
PROTOTYPES = Mean(jnp.asarray(normal(3, M, D)), jnp.array([3.0, 1.0, 2.0]))


def router(kind: str, weights: tuple[float, ...] = WEIGHTS) -> Router:
    return Router(kind, weights, nnx.split(Gate(D, len(weights)))[0] if kind == "learned" else None)


@cache
def program(kind: str, weights: tuple[float, ...] = WEIGHTS):
    """``(hidden, gate, prototypes) -> (shares, gradients of a random sum of them)``."""
    factors = normal(4, B, T, len(weights))

    def total(hidden, gate, prototypes):
        shares = router(kind, weights).shares(hidden, gate, prototypes)
        return (shares * factors).sum() + entropy(shares).sum(), shares

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))

    def shares_and_gradients(hidden=HIDDEN, gate=GATE, prototypes=PROTOTYPES):
        gradients, shares = run(hidden, gate, prototypes)
        return shares, gradients

    return shares_and_gradients


def unit64(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def weighted(logits: np.ndarray, weights: tuple[float, ...] = WEIGHTS) -> np.ndarray:
    """Softmax with each teacher's exponential times its weight."""
    terms = np.exp(logits - logits.max(axis=-1, keepdims=True)) * np.array(weights)
    return terms / terms.sum(axis=-1, keepdims=True)


def test_fixed_shares_are_the_weights_as_they_are() -> None:
    shares, gradients = program("fixed")()
    np.testing.assert_array_equal(shares, np.broadcast_to(np.float32(WEIGHTS), (B, T, M)))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_similarity_shares_follow_the_cosines_with_the_prototypes() -> None:
    shares, gradients = program("similarity")()
    cosines = unit64(HIDDEN) @ unit64(PROTOTYPES.sum).T
    np.testing.assert_allclose(shares, weighted(cosines / 0.1), rtol=CLOSE, atol=CLOSE)
    assert not np.asarray(shares)[..., 1].any()
    assert not gradients[0].any()


def test_learned_shares_follow_the_gate_and_teach_the_gate_alone() -> None:
    shares, (of_hidden, of_gate) = program("learned")()
    logits = unit64(HIDDEN) * D**0.5 @ GATE["kernel"].astype(np.float64) + GATE["bias"]
    want = weighted(logits)
    np.testing.assert_allclose(shares, want, rtol=CLOSE, atol=CLOSE)
    assert not of_hidden.any()
    # Slope of sum(f p) - sum(p log p) in logit i: p_i (g_i - sum_j p_j g_j), g = f - log p - 1.
    safe = np.where(want > 0, want, 1.0)
    slope = normal(4, B, T, M) - np.log(safe) - 1.0
    of_logits = want * (slope - (want * slope).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(of_gate["bias"], of_logits.sum((0, 1)), rtol=CLOSE, atol=CLOSE)
    of_kernel = np.einsum("btd,btm->dm", unit64(HIDDEN) * D**0.5, of_logits)
    np.testing.assert_allclose(of_gate["kernel"], of_kernel, rtol=CLOSE, atol=CLOSE)
    assert not of_gate["kernel"][:, 1].any()  # the teacher of weight 0
    assert np.abs(of_kernel[:, 0]).min() > 1000 * CLOSE


def test_a_teacher_that_is_all_but_certain_leaves_finite_gradients() -> None:
    gate = {"kernel": np.zeros((D, M), np.float32), "bias": np.float32([300.0, 0.0, -300.0])}
    shares, gradients = program("learned", (1.0, 1.0, 1.0))(gate=gate)
    np.testing.assert_array_equal(shares, np.broadcast_to(np.float32([1, 0, 0]), (B, T, M)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", ["similarity", "learned"])
def test_before_anything_is_learnt_the_shares_are_the_weights_over_their_sum(kind: str) -> None:
    gate = nnx.to_pure_dict(nnx.split(Gate(D, M))[1])
    shares, _ = program(kind)(gate=gate, prototypes=empty_prototypes(M, D))
    np.testing.assert_allclose(shares, np.broadcast_to([0.2, 0.0, 0.8], (B, T, M)), rtol=CLOSE)


def test_a_hidden_state_of_zeros_or_of_any_length_is_only_a_direction() -> None:
    for kind in ("similarity", "learned"):
        run = program(kind)
        long, _ = run(hidden=HIDDEN * np.float32(1e6))
        np.testing.assert_allclose(long, run()[0], rtol=CLOSE, atol=CLOSE)
    nowhere, _ = program("similarity")(hidden=np.zeros_like(HIDDEN))
    np.testing.assert_allclose(nowhere, np.broadcast_to([0.2, 0.0, 0.8], (B, T, M)), rtol=CLOSE)


def test_entropy_and_its_slope_with_zeros() -> None:
    shares = np.float32([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]])
    values, gradient = jax.jit(lambda p: (entropy(p), jax.grad(lambda x: entropy(x).sum())(p)))(
        shares
    )
    p = shares.astype(np.float64)
    logs = np.log(np.where(p > 0, p, 1.0))
    np.testing.assert_allclose(values, -(p * logs).sum(axis=-1), rtol=CLOSE)
    assert float(values[0, 0]) == pytest.approx(np.log(2), rel=CLOSE)
    assert float(values[0, 1]) == 0.0
    np.testing.assert_allclose(gradient, np.where(p > 0, -logs - 1.0, 0.0), rtol=CLOSE)


def served_by_hand(hidden, losses, mask) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = np.zeros((M, D)), np.zeros(M)
    for b, t in np.argwhere(mask):
        best = [m for m in range(M) if losses[b, t, m] == min(losses[b, t])]
        for m in best:
            counts[m] += 1 / len(best)
            sums[m] += unit64(hidden[b, t]) / len(best)
    return sums, counts


def test_every_token_goes_to_the_teacher_that_serves_it_best() -> None:
    mask = np.array([[True, True, False], [True, True, True]])
    losses = np.random.default_rng(5).permutation(B * T * M).reshape(B, T, M).astype(np.float32)
    losses[0, 1] = 3.0, 1.0, 1.0  # two serve it equally well
    losses[1, 2] = 2.0, 2.0, 2.0  # all three do
    found = jax.jit(served)(HIDDEN, losses, mask)
    sums, counts = served_by_hand(HIDDEN, losses, mask)
    np.testing.assert_allclose(found.sum, sums, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(found.count, counts, rtol=CLOSE)
    assert float(found.count.sum()) == pytest.approx(5, rel=CLOSE)
    losses[0, 2] = np.nan  # what is not counted may hold anything
    hidden = np.where(mask[..., None], HIDDEN, np.nan)
    for one, other in zip(jax.jit(served)(hidden, losses, mask), found, strict=True):
        np.testing.assert_array_equal(one, other)
    nothing = jax.jit(served)(HIDDEN, losses, np.zeros((B, T), bool))
    assert not any(leaf.any() for leaf in nothing)


def test_prototypes_forget_a_hundredth_and_add_what_is_new() -> None:
    new = Mean(jnp.asarray(normal(6, M, D)), jnp.array([0.0, 5.0, 1.0]))
    found = jax.jit(remember)(PROTOTYPES, new)
    for old, seen, both in zip(PROTOTYPES, new, found, strict=True):
        want = 0.99 * np.asarray(old, np.float64) + np.asarray(seen, np.float64)
        np.testing.assert_allclose(both, want, rtol=CLOSE, atol=CLOSE)
    first = remember(empty_prototypes(M, D), new)
    jax.tree.map(np.testing.assert_array_equal, first, new)


@cache
def training(entropy_weight: float):
    """``(hidden, losses) -> shares`` of a gate trained for 400 steps on losses that stay."""
    made = router("learned", (1.0,) * M)
    optimizer = optax.adam(0.05)

    def objective(gate, hidden, losses):
        shares = made.shares(hidden, gate, None)
        return (shares * losses).sum(-1).mean() - entropy_weight * entropy(shares).mean()

    def step(carry, _, hidden, losses):
        gate, state = carry
        updates, state = optimizer.update(jax.grad(objective)(gate, hidden, losses), state)
        return (optax.apply_updates(gate, updates), state), None

    @jax.jit
    def trained(hidden, losses):
        gate = jax.tree.map(jnp.zeros_like, GATE)
        start = (gate, optimizer.init(gate))
        (gate, _), _ = jax.lax.scan(
            lambda carry, x: step(carry, x, hidden, losses), start, None, length=400
        )
        return made.shares(hidden, gate, None)

    return trained


def test_the_gate_learns_whom_to_ask_token_by_token() -> None:
    losses = np.full((B, T, M), 1.0, np.float32)
    losses[..., 2] = 0.5
    everywhere = training(0.0)(HIDDEN, losses)
    assert everywhere[..., 2].min() > 0.95
    chosen = (HIDDEN @ normal(12, D, M)).argmax(axis=-1)
    losses = 1.0 - 0.5 * np.eye(M, dtype=np.float32)[chosen]
    assert len(set(chosen.flat)) == M
    np.testing.assert_array_equal(training(0.0)(HIDDEN, losses).argmax(axis=-1), chosen)


def test_the_reward_for_entropy_sets_how_far_the_gate_goes() -> None:
    losses = np.broadcast_to(np.float32([0.3, 0.9, 0.6]), (B, T, M))
    # The lowest point of sum(p L) - w H(p) is p proportional to exp(-L / w).
    for weight in (0.5, 10.0):
        want = weighted(-losses.astype(np.float64) / weight, (1.0,) * M)
        np.testing.assert_allclose(training(weight)(HIDDEN, losses), want, rtol=TOL["parity"])
    assert np.abs(want - 1 / M).max() < 0.03
