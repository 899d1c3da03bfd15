"""Mixtures of experts: every token by its experts, on one device and on a mesh.

Parity with transformers is in ``test_parity``.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import layouts
from tests.models.test_decoder import SPEC, build
from tests.tolerances import TOL

ROUTED = replace(SPEC, num_experts=5, experts_per_token=2, mlp_bias=False)
TOKENS = jnp.asarray(np.random.default_rng(4).integers(0, 40, (8, 10)), jnp.int32)


def passed(model) -> tuple[jax.Array, jax.Array]:
    """Hidden states, and the gradient of their mean square with respect to the embedding."""
    graph, params = nnx.split(model)
    valid = jnp.ones(TOKENS.shape, bool)
    positions = token_positions(valid)

    @jax.jit
    def loss(params):
        model = nnx.merge(graph, params)
        hidden, _ = model(TOKENS, positions, attention_mask(positions, positions, valid))
        return (hidden**2).mean() + (hidden @ jnp.linspace(0, 1, hidden.shape[-1])).mean(), hidden

    gradient, hidden = jax.grad(loss, has_aux=True)(params)
    return hidden, gradient["embed"]["embedding"][...]


def by_token(model, x_D: np.ndarray) -> np.ndarray:
    """What the first layer's experts give one token, in float64."""
    mlp = jax.tree.map(
        lambda x: np.asarray(x[0], np.float64), nnx.to_pure_dict(nnx.state(model.blocks.mlp))
    )
    scores = x_D @ mlp["router"]["kernel"]
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    picked = np.argsort(-weights)[: ROUTED.experts_per_token]
    if model.spec.experts_normalised:
        weights = weights / weights[picked].sum()
    total = np.zeros_like(x_D)
    for expert in picked:
        gate, up, down = (mlp[name]["kernel"][expert] for name in ("gate", "up", "down"))
        inner = x_D @ gate
        total += weights[expert] * ((inner / (1 + np.exp(-inner)) * (x_D @ up)) @ down)
    return total


@pytest.mark.parametrize("normalised", [False, True])
def test_each_token_gets_the_weighted_sum_of_its_experts(normalised) -> None:
    model = build(spec=replace(ROUTED, experts_normalised=normalised))
    x = np.random.default_rng(5).normal(size=(2, 7, ROUTED.hidden_size)).astype(np.float32)
    graph, layers = nnx.split(model.blocks)
    first = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], layers))
    found, units = first.mlp(jnp.asarray(x))
    assert units is None
    want = np.array([[by_token(model, token) for token in row] for row in x.astype(np.float64)])
    np.testing.assert_allclose(found, want, atol=TOL["float32"])


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_a_mesh_computes_the_same(shape) -> None:
    want = passed(build(spec=ROUTED))
    found = passed(build(spec=ROUTED, layouts=layouts(make_mesh(*shape))))
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOL["float32"])
