"""The parts of a decoder: projection, RMS norm, attention, gated MLP, and the block of them all.

Every parameter carries the logical names of its axes as metadata (``axes=...``). ``parallel``
decides which mesh axis each name is split over. Parameters are stored in ``param_dtype`` and used
in ``dtype``. Norms and softmax are computed in float32. So are the gradients of biases and scales:
they are sums over all tokens, and a long bfloat16 sum stops growing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kava_jax.cache import HandedOver, KVCache
from kava_jax.models.attend import Attend
from kava_jax.models.rope import Rotation, rotate
from kava_jax.models.spec import DecoderSpec, NormPlaces

KeySpace = Literal["pre_bias", "pre_rope", "post_rope"]
Output = Literal["attention_outputs", "block_outputs"]


class Dtypes(NamedTuple):
    """The dtype of stored parameters and the dtype of the layers' computation."""

    param: jnp.dtype
    compute: jnp.dtype


class Projection(nnx.Module):
    """Linear map from ``inputs`` axes to ``outputs`` axes, e.g. [D] -> [N, H] or [N, H] -> [D]."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        std: float,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        """Name the axes and their sizes; ``std`` is that of the initial kernel."""
        shape = (*inputs.values(), *outputs.values())
        kernel = std * jax.random.normal(rngs.params(), shape, dtypes.param)
        self.kernel = nnx.Param(kernel, axes=(*inputs, *outputs))
        zeros = jnp.zeros(tuple(outputs.values()), dtypes.param)
        self.bias = nnx.Param(zeros, axes=tuple(outputs)) if bias else None
        self.contracted = len(inputs)
        self.dtype = dtypes.compute

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contract the last input axes of ``x`` with the kernel and add the bias."""
        return self.biased(self.product(x))

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The contraction alone, without the bias."""
        return jnp.tensordot(x, self.kernel[...].astype(self.dtype), axes=self.contracted)

    def biased(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """``y`` plus the bias, added in float32; ``y`` itself if there is no bias."""
        if self.bias is None:
            return y
        bias = self.bias[...].astype(jnp.float32)
        # The bias is broadcast in float32, because autodiff sums its gradient over tokens in that
        # dtype.
        wide = y.astype(jnp.float32) + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return wide.astype(self.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axes; statistics in float32."""

    def __init__(self, axes: dict[str, int], *, spec: DecoderSpec, dtypes: Dtypes):
        """Start with a factor of one along the logical axes, whose sizes are given."""
        start = jnp.zeros if spec.norm_style == "offset" else jnp.ones
        self.scale = nnx.Param(start(tuple(axes.values()), dtypes.param), axes=tuple(axes))
        self.eps, self.style = spec.norm_eps, spec.norm_style

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalise and scale, in the order of the family's class in Hugging Face."""
        wide, scale = x.astype(jnp.float32), self.scale[...]
        mean = jnp.mean(wide * wide, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
        normed = wide * jax.lax.rsqrt(mean + self.eps)
        if self.style == "plain":
            return _times(normed.astype(x.dtype), scale)
        factor = scale.astype(jnp.float32) + (1.0 if self.style == "offset" else 0.0)
        return (normed * factor.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)).astype(x.dtype)


@jax.custom_vjp
def _times(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x * scale`` in x's dtype; the gradient of ``scale`` is summed over tokens in float32.

    The gradient is written by hand because autodiff of a float32 product would store a float32 copy
    of ``x``.
    """
    return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)


def _times_forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _times(x, scale), (x, scale)


def _times_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, scale = saved
    of_scale = slope.astype(jnp.float32) * x.astype(jnp.float32)
    tokens = tuple(range(x.ndim - scale.ndim))
    return _times(slope, scale), of_scale.sum(axis=tokens).astype(scale.dtype)


_times.defvjp(_times_forward, _times_backward)


class Activations(NamedTuple):
    """What one layer computes and a caller may keep: keys (three stages), values, queries, outputs.

    ``attention_outputs`` are what attention adds to the residual stream, after its output
    projection; ``block_outputs`` are that stream after the whole layer, and ``units`` the inner
    units of the MLP.

    ``pre_bias`` keys are the projection's output before its bias is added. In bfloat16 a large bias
    costs precision, because rounding follows the magnitude of the sum. If there is no bias, or a
    key norm follows the projection, they equal the ``pre_rope`` keys.
    """

    pre_bias: Float[Array, "B T K H"]
    pre_rope: Float[Array, "B T K H"]
    post_rope: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    q: Float[Array, "B T N H"] | None = None
    attention_outputs: Float[Array, "B T D"] | None = None
    block_outputs: Float[Array, "B T D"] | None = None
    units: Float[Array, "B T F"] | None = None

    def cache(self, key_space: KeySpace) -> KVCache:
        """The keys of one stage, with the values."""
        return KVCache(getattr(self, key_space), self.v)


class Attention(nnx.Module):
    """Grouped-query attention.

    With ``output=False`` there is no output projection. Keys, values and queries can be computed,
    but not the attention itself: the last layer of a cut teacher needs no more.
    """

    def __init__(self, spec: DecoderSpec, *, dtypes: Dtypes, rngs: nnx.Rngs, output: bool = True):
        """Build the projections, with the model's initializer range as ``std``."""
        model = {"embed": spec.hidden_size}
        kv_heads = {"kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
        heads = {"heads": spec.num_heads, "head_dim": spec.head_dim}
        project = partial(Projection, std=spec.initializer_range, dtypes=dtypes, rngs=rngs)

        def norm(heads: dict[str, int]) -> RMSNorm | None:
            if not spec.qk_norm:
                return None
            axes = heads if spec.qk_norm_over_heads else {"head_dim": spec.head_dim}
            return RMSNorm(axes, spec=spec, dtypes=dtypes)

        self.k = project(model, kv_heads, bias=spec.qkv_bias)
        self.v = project(model, kv_heads, bias=spec.qkv_bias)
        self.q = project(model, heads, bias=spec.qkv_bias)
        self.q_norm = norm(heads)
        self.k_norm = norm(kv_heads)
        if output:
            self.o = project(heads, model, bias=spec.output_bias)

    def keys_values(self, x_BTD: Float[Array, "B T D"], rotation: Rotation) -> Activations:
        """Project ``x`` to values, and to keys at every stage."""
        bare_BTKH = self.k.product(x_BTD)
        k_BTKH = self.k.biased(bare_BTKH)
        if self.k_norm is not None:
            k_BTKH = bare_BTKH = self.k_norm(k_BTKH)
        return Activations(bare_BTKH, k_BTKH, rotate(k_BTKH, rotation), self.v(x_BTD))

    def queries(self, x_BTD: Float[Array, "B T D"], rotation: Rotation) -> Float[Array, "B T N H"]:
        """Project ``x`` to post-RoPE queries (bias and query norm included)."""
        q_BTNH = self.q(x_BTD)
        if self.q_norm is not None:
            q_BTNH = self.q_norm(q_BTNH)
        return rotate(q_BTNH, rotation)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotation: Rotation,
        mask_BTS: Bool[Array, "B 1 T S"],
        past: KVCache | HandedOver | None,
        how: Attend,
    ) -> tuple[Float[Array, "B T D"], Activations]:
        """Attend over ``past`` (post-RoPE, one layer) followed by the tokens of ``x``.

        What was handed over takes the place of the tokens' own keys and values. ``how(q, k, v,
        mask)`` computes the attention: a ``partial`` of ``attend``.
        """
        new, q_BTNH = self.keys_values(x_BTD, rotation), self.queries(x_BTD, rotation)
        # Keys in the past are rotated already; only the new ones were rotated above.
        read = KVCache(new.post_rope, new.v)
        if isinstance(past, HandedOver):
            theirs, where_BT11 = past.cache, past.where[..., None, None]
            read = jax.tree.map(
                lambda other, own: jnp.where(where_BT11, other.astype(own.dtype), own), theirs, read
            )
        elif past is not None:
            read = jax.tree.map(lambda old, own: jnp.concatenate([old, own], axis=1), past, read)
        return self.o(how(q_BTNH, *read, mask_BTS)), new._replace(q=q_BTNH)


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(self, spec: DecoderSpec, *, dtypes: Dtypes, rngs: nnx.Rngs):
        """Build the three projections."""
        model, inner = {"embed": spec.hidden_size}, {"ffw": spec.intermediate_size}
        project = partial(
            Projection,
            bias=spec.mlp_bias,
            std=spec.initializer_range,
            dtypes=dtypes,
            rngs=rngs,
        )
        # The only GELU that any family has is the one by tanh.
        self.activation = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}[spec.activation]
        self.gate = project(model, inner)
        self.up = project(model, inner)
        self.down = project(inner, model)

    def __call__(
        self, x_BTD: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T F"]]:
        """The output, and the units that it was made of."""
        units_BTF = self.activation(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(units_BTF), units_BTF


class Block(nnx.Module):
    """One decoder layer; without an ``mlp`` only what makes keys, values and queries.

    The latter is the *tail* of a cut teacher, its last layer. Norms are where the spec says.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        mlp: Callable[..., Any] | None,
        *,
        dtypes: Dtypes,
        rngs: nnx.Rngs,
    ):
        """Build attention, norms, and an ``mlp``: the class ``MLP`` or what stands in for it."""

        def norm(*places: NormPlaces) -> RMSNorm | None:
            if spec.norm_places not in places:
                return None
            return RMSNorm({"embed": spec.hidden_size}, spec=spec, dtypes=dtypes)

        self.residual_scale = spec.residual_scale
        self.attention_norm = norm("before", "both")
        self.attention = Attention(spec, dtypes=dtypes, rngs=rngs, output=mlp is not None)
        if mlp is not None:
            self.attention_out_norm = norm("after", "both")
            self.mlp_norm = norm("before", "both")
            self.mlp = mlp(spec, dtypes=dtypes, rngs=rngs)
            self.mlp_out_norm = norm("after", "both")

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotation: Rotation,
        mask_BTS: Bool[Array, "B 1 T S"],
        past: KVCache | HandedOver | None,
        how: Attend,
    ) -> tuple[Float[Array, "B T D"], Activations]:
        """Residual attention, then residual MLP; also returns what may be kept of them."""
        normed = _normed(self.attention_norm, x_BTD)
        y_BTD, new = self.attention(normed, rotation, mask_BTS, past, how)
        # Scaled before they are added to the residual stream.
        y_BTD = _normed(self.attention_out_norm, y_BTD) * self.residual_scale
        x_BTD = x_BTD + y_BTD
        z_BTD, units = self.mlp(_normed(self.mlp_norm, x_BTD))
        x_BTD = x_BTD + _normed(self.mlp_out_norm, z_BTD) * self.residual_scale
        return x_BTD, new._replace(attention_outputs=y_BTD, block_outputs=x_BTD, units=units)

    def without_attending(self, x_BTD: Float[Array, "B T D"], rotation: Rotation) -> Activations:
        """Keys, values and queries alone. ``jit`` removes those that nothing uses."""
        normed = _normed(self.attention_norm, x_BTD)
        new = self.attention.keys_values(normed, rotation)
        return new._replace(q=self.attention.queries(normed, rotation))


def _normed(norm: RMSNorm | None, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x_BTD if norm is None else norm(x_BTD)
