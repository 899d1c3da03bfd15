"""The parts of a decoder: projection, RMS norm, attention, gated MLP, and the block of them all.

Every parameter carries the logical names of its axes as metadata (``axes=...``). ``parallel``
decides which mesh axis each name is split over. Parameters are stored in ``param_dtype`` and used
in ``dtype``. Norms and softmax are computed in float32. So are the gradients of biases and scales:
they are sums over all tokens, and a long bfloat16 sum stops growing.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kava_jax.cache import HandedOver, KVCache
from kava_jax.models.attend import Attend, attend
from kava_jax.models.rope import Rotation, rotate
from kava_jax.models.spec import DecoderSpec

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
        self.bias = (
            nnx.Param(jnp.zeros(tuple(outputs.values()), dtypes.param), axes=tuple(outputs))
            if bias
            else None
        )
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
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis; statistics in float32."""

    def __init__(self, width: int, axis: str, *, eps: float, dtypes: Dtypes):
        """Start with a scale of ones along the logical ``axis``."""
        self.scale = nnx.Param(jnp.ones((width,), dtypes.param), axes=(axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise, cast back to the input's dtype, then scale (the order of Hugging Face)."""
        wide = x.astype(jnp.float32)
        scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return _times(scaled.astype(x.dtype), self.scale[...])


@jax.custom_vjp
def _times(x: Float[Array, "*B D"], scale: Float[Array, "D"]) -> Float[Array, "*B D"]:
    """``x * scale`` in x's dtype; the gradient of ``scale`` is summed over tokens in float32.

    The gradient is written by hand because autodiff of a float32 product would store a float32 copy
    of ``x``.
    """
    return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)


def _times_forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _times(x, scale), (x, scale)


def _times_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, scale = saved
    of_scale = slope.astype(jnp.float32) * x.astype(jnp.float32)
    return _times(slope, scale), of_scale.sum(axis=tuple(range(x.ndim - 1))).astype(scale.dtype)


_times.defvjp(_times_forward, _times_backward)


class Activations(NamedTuple):
    """What one layer computes and a caller may keep: keys (three stages), values, queries, outputs.

    ``attention_outputs`` are what attention adds to the residual stream, after its output
    projection; ``block_outputs`` are that stream after the whole layer.

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

        def norm() -> RMSNorm | None:
            if not spec.qk_norm:
                return None
            return RMSNorm(spec.head_dim, "head_dim", eps=spec.norm_eps, dtypes=dtypes)

        self.k = project(model, kv_heads, bias=spec.qkv_bias)
        self.v = project(model, kv_heads, bias=spec.qkv_bias)
        self.q = project(model, heads, bias=spec.qkv_bias)
        self.q_norm = norm()
        self.k_norm = norm()
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
        how: Attend = attend,
    ) -> tuple[Float[Array, "B T D"], Activations]:
        """Attend over ``past`` (post-RoPE, one layer) followed by the tokens of ``x``.

        What was handed over takes the place of the tokens' own keys and values. ``how(q, k, v,
        mask)`` computes the attention: ``attend``, or a ``partial`` of it.
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
    """``down(silu(gate(x)) * up(x))``."""

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
        self.gate = project(model, inner)
        self.up = project(model, inner)
        self.down = project(inner, model)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Gate, multiply, project back."""
        return self.down(self.units(x_BTD))

    def units(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """The inner units, which ``down`` reads."""
        return jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD)


class Block(nnx.Module):
    """One pre-norm decoder layer; with ``whole=False`` only what makes keys, values and queries.

    The latter is the *tail* of a cut teacher, its last layer.
    """

    def __init__(self, spec: DecoderSpec, *, dtypes: Dtypes, rngs: nnx.Rngs, whole: bool = True):
        """Build attention, MLP and their norms."""
        width, eps = spec.hidden_size, spec.norm_eps
        self.attention_norm = RMSNorm(width, "embed", eps=eps, dtypes=dtypes)
        self.attention = Attention(spec, dtypes=dtypes, rngs=rngs, output=whole)
        if whole:
            self.mlp_norm = RMSNorm(width, "embed", eps=eps, dtypes=dtypes)
            self.mlp = MLP(spec, dtypes=dtypes, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotation: Rotation,
        mask_BTS: Bool[Array, "B 1 T S"],
        past: KVCache | HandedOver | None,
        how: Attend = attend,
    ) -> tuple[Float[Array, "B T D"], Activations]:
        """Residual attention, then residual MLP; also returns what may be kept of them."""
        y_BTD, new = self.attention(self.attention_norm(x_BTD), rotation, mask_BTS, past, how)
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD, new._replace(attention_outputs=y_BTD, block_outputs=x_BTD)

    def without_attending(self, x_BTD: Float[Array, "B T D"], rotation: Rotation) -> Activations:
        """Keys, values and queries alone. ``jit`` removes those that nothing uses."""
        normed = self.attention_norm(x_BTD)
        new = self.attention.keys_values(normed, rotation)
        return new._replace(q=self.attention.queries(normed, rotation))
