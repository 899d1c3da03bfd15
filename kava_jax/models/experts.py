"""A mixture of experts in place of a layer's MLP, for teachers that are read and not trained.

A router picks a few experts for every token. Tokens are sorted by expert, and each expert's tokens
are one group of a grouped product (``jax.lax.ragged_dot``): no token is dropped, and none is
computed by an expert that was not picked. On a mesh every device sorts its own rows' tokens. The
experts' weights are gathered over fsdp as any layer's are, and split over tensor by their units.

Left out on purpose: balancing losses, capacities, and devices that hold some experts alone.
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
    """What the picked experts give, sorted by expert and brought back."""
    *rows, width = x_BTD.shape
    picked = ids_BTk.shape[-1]
    order = jnp.argsort(ids_BTk.reshape(-1), stable=True)
    sizes_E = jnp.bincount(ids_BTk.reshape(-1), length=gate_EDF.shape[0])
    sorted_x = x_BTD.reshape(-1, width)[order // picked]

    def grouped(x: Array, kernels: Array) -> Array:
        return jax.lax.ragged_dot(x, kernels, sizes_E)

    units = jax.nn.silu(grouped(sorted_x, gate_EDF)) * grouped(sorted_x, up_EDF)
    given = grouped(units, down_EFD) * weights_BTk.reshape(-1)[order][:, None]
    # Back to the order of tokens, each with its k experts side by side.
    back = jnp.zeros_like(given).at[order].set(given)
    return back.reshape(*rows, picked, width).sum(axis=-2)
