"""Share and cosine of two trees of gradients against flat vectors in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.diagnostics import gradient_share
from tests.tolerances import TOL

CLOSE = TOL["float32"]


def gradient_trees(seed: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        "layer": {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)},
        "out": rng.normal(size=7),
    }


def of_trees(kv, ce) -> tuple[float, float]:
    as_float32 = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (kv, ce))
    share, cosine = jax.jit(gradient_share)(*as_float32)
    return float(share), float(cosine)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_gradient_share_and_cosine_are_those_of_flat_vectors(scale: float) -> None:
    kv, ce = gradient_trees(0), gradient_trees(1)
    kv = jax.tree.map(lambda x: 0.3 * x, kv)
    flat_kv, flat_ce = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (kv, ce)
    )
    share, cosine = of_trees(*(jax.tree.map(lambda x: scale * x, tree) for tree in (kv, ce)))
    lengths = [np.linalg.norm(x) for x in (flat_kv, flat_ce)]
    np.testing.assert_allclose(share, lengths[0] / lengths[1], rtol=CLOSE)
    np.testing.assert_allclose(cosine, flat_kv @ flat_ce / np.prod(lengths), atol=CLOSE)
    opposite = of_trees(ce, jax.tree.map(lambda x: -2 * x, ce))
    np.testing.assert_allclose(opposite, (0.5, -1.0), rtol=CLOSE)


def test_gradients_of_zero_have_no_share() -> None:
    some = gradient_trees(0)
    zero = jax.tree.map(np.zeros_like, some)
    assert of_trees(some, zero) == (0.0, 0.0)
    assert of_trees(zero, some) == (0.0, 0.0)
    assert of_trees(zero, zero) == (0.0, 0.0)
