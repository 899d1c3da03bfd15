"""Every adapter's forward pass against numpy in float64, and its dropout by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.alignment.adapters import Adapter, initial_kernel
from tests.tolerances import TOL

SOURCE, TARGET = 24, 10


def elastic(init: str, *, mlp_ratio: float, dropout: float) -> Adapter:
    widths = (SOURCE, TARGET)
    return Adapter("elastic", widths, init, nnx.Rngs(0), mlp_ratio=mlp_ratio, dropout=dropout)


def noisy(module: nnx.Module, seed: int = 0) -> dict:
    """Put noise on every weight (no bias stays 0) and return them in float64."""
    rng = np.random.default_rng(seed)
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    state = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), state)
    nnx.update(module, state)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), state)


def vectors(width: int, *lead: int) -> np.ndarray:
    return np.random.default_rng(1).normal(1.0, 2.0, (*lead, width)).astype(np.float32)


def test_linear_is_numpys_affine_map() -> None:
    adapter = Adapter("linear", (SOURCE, TARGET), "xavier", nnx.Rngs(0), mlp_ratio=1.0, dropout=0.1)
    weights, x = noisy(adapter), vectors(SOURCE, 3, 4)
    want = x.astype(np.float64) @ weights["out"]["kernel"] + weights["out"]["bias"]
    np.testing.assert_allclose(adapter(jnp.asarray(x), None), want, atol=TOL["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_is_the_vectors_in_float32_without_parameters(dtype: str) -> None:
    widths = (SOURCE, SOURCE)
    adapter = Adapter("identity", widths, "xavier", nnx.Rngs(0), mlp_ratio=1.0, dropout=0.5)
    x = jnp.asarray(vectors(SOURCE, 3, 4), dtype)
    for key in (None, jax.random.key(0)):
        assert adapter(x, key).dtype == jnp.float32
        np.testing.assert_array_equal(adapter(x, key), np.asarray(x, np.float32))
    assert jax.tree.leaves(nnx.state(adapter)) == []


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_elastic_is_layer_norm_linear_silu_linear(ratio: float) -> None:
    adapter = elastic("kaiming", mlp_ratio=ratio, dropout=0.4)
    w, x = noisy(adapter), vectors(SOURCE, 2, 3, 4)
    assert w["inner"]["kernel"].shape == (24, int(24 * ratio))
    wide = x.astype(np.float64)
    variance = wide.var(axis=-1, keepdims=True)
    normed = (wide - wide.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-5)
    hidden = (normed * w["scale"] + w["shift"]) @ w["inner"]["kernel"] + w["inner"]["bias"]
    want = (hidden / (1 + np.exp(-hidden))) @ w["out"]["kernel"] + w["out"]["bias"]
    # Several times the width of one formula: two matrix products in a row.
    np.testing.assert_allclose(adapter(jnp.asarray(x), None), want, atol=TOL["float32"])


def test_elastic_survives_vectors_that_are_all_offset() -> None:
    adapter = elastic("xavier", mlp_ratio=1.0, dropout=0.0)
    w, x = noisy(adapter), 300.0 + vectors(SOURCE, 64)
    x[0] = 0.0
    wide = x.astype(np.float64)
    variance = wide.var(axis=-1, keepdims=True)
    normed = (wide - wide.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-5)
    hidden = (normed * w["scale"] + w["shift"]) @ w["inner"]["kernel"] + w["inner"]["bias"]
    want = (hidden / (1 + np.exp(-hidden))) @ w["out"]["kernel"] + w["out"]["bias"]
    np.testing.assert_allclose(adapter(jnp.asarray(x), None), want, atol=TOL["offset_norm"])


def test_dropout_needs_a_key_and_keeps_the_mean() -> None:
    adapter = elastic("xavier", mlp_ratio=1.0, dropout=0.25)
    x = jnp.asarray(vectors(SOURCE, 1))
    plain = adapter(x, None)
    np.testing.assert_array_equal(plain, adapter(x, None))
    first, second = (adapter(x, jax.random.key(i)) for i in (1, 2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, plain)
    np.testing.assert_array_equal(first, adapter(x, jax.random.key(1)))
    many = adapter(jnp.broadcast_to(x, (20_000, SOURCE)), jax.random.key(3))
    error = many.std(axis=0) / np.sqrt(20_000)
    assert np.all(np.abs(many.mean(axis=0) - plain[0]) < 5 * error)


def test_dropout_zeroes_the_asked_share_of_hidden_units() -> None:
    adapter = elastic("xavier", mlp_ratio=1.0, dropout=0.25)
    # With one hidden unit wired through, the output shows whether that unit was kept.
    out = np.zeros((24, 10), np.float32)
    out[5, 0] = 1.0
    adapter.out.kernel[...] = jnp.asarray(out)
    x = jnp.broadcast_to(jnp.asarray(vectors(SOURCE, 1)), (20_000, SOURCE))
    plain, dropped = adapter(x, None)[0, 0], adapter(x, jax.random.key(0))[:, 0]
    kept = np.asarray(dropped) != 0
    np.testing.assert_allclose(dropped[kept], plain / 0.75, rtol=TOL["float32"])
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 20_000)


def test_bf16_in_float32_out_with_float32_weights() -> None:
    for adapter in (
        Adapter("linear", (SOURCE, TARGET), "xavier", nnx.Rngs(0), mlp_ratio=1.0, dropout=0.1),
        elastic("xavier", mlp_ratio=1.0, dropout=0.1),
    ):
        x = jnp.asarray(vectors(SOURCE, 2, 3))
        got = adapter(x.astype(jnp.bfloat16), jax.random.key(0))
        assert got.dtype == jnp.float32
        assert got.shape == (2, 3, TARGET)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(adapter))} == {jnp.dtype("f4")}


@pytest.mark.parametrize(
    ("method", "std", "limit"),
    [
        ("xavier", np.sqrt(2 / (300 + 200)), np.sqrt(6 / (300 + 200))),
        ("kaiming", np.sqrt(2 / 300), np.inf),
        ("normal", 0.02, np.inf),
    ],
)
def test_initial_kernels_have_their_formulas_spread(method, std: float, limit: float) -> None:
    kernel = np.asarray(initial_kernel(method, jax.random.key(0), (300, 200)))
    assert abs(kernel.std() / std - 1) < 5 / np.sqrt(2 * kernel.size)
    assert np.abs(kernel).max() <= limit
