"""A mixture of experts in place of a layer's MLP, for teachers that are read and not trained.

A router picks a few experts for every token. Tokens are sorted by expert and laid into blocks, each
of one expert, which a loop computes: no token is dropped, and none is computed by an expert that
was not picked. On a mesh every device sorts its own rows' tokens. The experts' weights are gathered
over fsdp as any layer's are, and split over tensor by their units.

Left out on purpose: balancing losses, capacities, and devices that hold some experts alone; and
``jax.lax.ragged_dot``, which the compilers of GPUs and CPUs turn into a product of every token with
every expert.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kava_jax.models.layers import Dtypes, Projection
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.sharding import RULES, Layouts

# Tokens of one expert that are computed together. Larger blocks use a chip better, smaller ones
# waste less on an expert's last block.
BLOCK = 128


class Experts(nnx.Module):
    """``sum_e w_e down_e(silu(gate_e(x)) * up_e(x))`` over the experts picked for a token.

    ``w`` are the softmax of the router's logits over all experts, of the picked ones; in some
    families they are divided by their sum.
    """

    def __init__(
        self, spec: DecoderSpec, *, dtypes: Dtypes, rngs: nnx.Rngs, layouts: Layouts | None
    ):
        """Build the router and the experts' stacked projections."""
        experts, model = {"experts": spec.num_experts}, {"embed": spec.hidden_size}
        inner = {"ffw": spec.intermediate_size}
        std = spec.initializer_range
        project = partial(Projection, bias=False, std=std, dtypes=dtypes, rngs=rngs)
        self.router = project(model, experts)
        self.gate = project(experts | model, inner)
        self.up = project(experts | model, inner)
        self.down = project(experts | inner, model)
        self.picked, self.normalised = spec.experts_per_token, spec.experts_normalised
        self.layouts, self.dtype = layouts, dtypes.compute

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        """Route every token, compute its experts, add them up; there are no units to keep."""
        logits_BTE = self.router(x_BTD).astype(jnp.float32)
        weights_BTk, ids_BTk = jax.lax.top_k(jax.nn.softmax(logits_BTE), self.picked)
        if self.normalised:
            weights_BTk = weights_BTk / weights_BTk.sum(axis=-1, keepdims=True)
        kernels = tuple(
            part.kernel[...].astype(self.dtype) for part in (self.gate, self.up, self.down)
        )
        inputs = (x_BTD, weights_BTk.astype(self.dtype), ids_BTk, *kernels)
        if self.layouts is None:
            return _computed(*inputs), None
        mesh, rows, ffw = self.layouts.rows.mesh, self.layouts.rows.spec, RULES["ffw"]

        def local(*parts: Array) -> Array:
            # Each device of the tensor axis has a part of every expert's units.
            return jax.lax.psum(_computed(*parts), ffw)

        inward, outward = PartitionSpec(None, None, ffw), PartitionSpec(None, ffw, None)
        split = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, rows, inward, inward, outward),
            out_specs=rows,
            check_vma=False,  # the sum makes all devices of the tensor axis agree
        )
        return split(*inputs), None


def _computed(
    x_BTD: Float[Array, "B T D"],
    weights_BTk: Float[Array, "B T k"],
    ids_BTk: Int[Array, "B T k"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
) -> Float[Array, "B T D"]:
    """What the picked experts give, block by block, brought back to the order of tokens."""
    *rows, width = x_BTD.shape
    (count, picked), experts = (ids_BTk.size, ids_BTk.shape[-1]), gate_EDF.shape[0]
    order = jnp.argsort(ids_BTk.reshape(-1), stable=True)
    expert = ids_BTk.reshape(-1)[order]
    sizes_E = jnp.bincount(expert, length=experts)
    # Every expert begins a block of its own, so at most one block of each is not full.
    ends_E = jnp.cumsum(-(-sizes_E // BLOCK))
    blocks = count // BLOCK + min(experts, count)
    within = jnp.arange(count) - (jnp.cumsum(sizes_E) - sizes_E)[expert]
    place = jnp.concatenate([jnp.zeros(1, ends_E.dtype), ends_E])[expert] * BLOCK + within
    laid = jnp.zeros((blocks * BLOCK, width), x_BTD.dtype)
    laid = laid.at[place].set(x_BTD.reshape(-1, width)[order // picked])
    # Blocks that no token needs come last, and are some expert's.
    of_block = jnp.searchsorted(ends_E, jnp.arange(blocks), side="right").clip(max=experts - 1)

    def computed(block: tuple[Array, Array]) -> Array:
        x, e = block
        return (jax.nn.silu(x @ gate_EDF[e]) * (x @ up_EDF[e])) @ down_EFD[e]

    given = jax.lax.map(computed, (laid.reshape(blocks, BLOCK, width), of_block))
    given = given.reshape(-1, width)[place] * weights_BTk.reshape(-1)[order][:, None]
    # Back to the order of tokens, each with its k experts side by side.
    back = jnp.zeros_like(given).at[order].set(given)
    return back.reshape(*rows, picked, width).sum(axis=-2)
