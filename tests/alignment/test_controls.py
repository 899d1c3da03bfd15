"""Targets that teach nothing, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.alignment.controls import controlled
from kava_jax.cache import KVCache
from tests.tolerances import TOL


def made() -> tuple[KVCache, jax.Array]:
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 3, 5, 2, 4)).astype(np.float32)) for _ in range(2))
    return KVCache(k, v), jnp.arange(5)[None] < jnp.array([5, 3, 2])[:, None]


@pytest.mark.parametrize("control", ["none", "random"])
def test_nothing_changes(control):
    cache, mask = made()
    same, same_mask = controlled(control, cache, mask)
    assert same is cache
    assert same_mask is mask


def test_shuffled_gives_each_row_the_target_of_the_row_before_it():
    cache, mask = made()
    rolled, both = controlled("shuffled", cache, mask)
    for b in range(3):
        np.testing.assert_array_equal(rolled.k[:, b], cache.k[:, b - 1])
        np.testing.assert_array_equal(rolled.v[:, b], cache.v[:, b - 1])
        np.testing.assert_array_equal(both[b], mask[b] & mask[b - 1])


def test_constant_is_the_mean_of_what_counts():
    cache, mask = made()
    cache = cache._replace(k=jnp.where(mask[None, :, :, None, None], cache.k, jnp.nan))
    constant, same_mask = controlled("constant", cache, mask)
    assert same_mask is mask
    for got, given in zip(constant, cache, strict=True):
        wanted = np.asarray(given)[:, np.asarray(mask)].astype(np.float64).mean(axis=1)
        for b in range(3):
            for t in range(5):
                np.testing.assert_allclose(got[:, b, t], wanted, atol=TOL["float32"])
