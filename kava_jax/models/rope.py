"""Rotary position embedding in the half-split layout that Hugging Face checkpoints use.

Every scaling matches transformers 5.x on one row without a cache. ``dynamic`` and ``longrope``
choose their frequencies by the length of the row. Here that is each row's own length, so a row's
result never depends on its neighbours; transformers uses the longest row of the batch. During
generation it is the prompt plus ``max_new_tokens``, from the first token on. transformers starts
with the prompt's length, changes frequencies when the text outgrows the original length, and keeps
the old keys in its cache. Beyond the original length its cached decoding therefore differs from its
own uncached result for the same text.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kava_jax.models.spec import (
    DecoderSpec,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)

Rotation = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
"""Cosines and sines of every position's angles, with an axis to broadcast over heads."""


def rope_frequencies(spec: DecoderSpec, lengths_B: Int[Array, "B"]) -> Float[Array, "#B h"]:
    """Angular frequency of each rotated pair, in radians per position: float32 [B or 1, H / 2].

    ``theta ** (-2 i / H)``, then the model's scaling. A scaling that depends on the length gives a
    row of frequencies for each of ``lengths_B``; the others give one row for all.
    Source: RoFormer (arXiv 2104.09864) section 3.2.2; scalings: transformers'
    ``modeling_rope_utils``.
    """
    # In float64, rounded once at the end: an angle is position times frequency, so the error of a
    # frequency grows along the row.
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    plain = spec.rope_theta**-exponent
    match spec.rope_scaling:
        case None:
            scaled = plain
        case LinearRopeScaling(factor):
            scaled = plain / factor
        case Llama3RopeScaling() as scaling:
            scaled = _llama3(plain, scaling)
        case YarnRopeScaling() as scaling:
            scaled = _yarn(plain, scaling, spec)
        case DynamicRopeScaling(factor):
            return _dynamic(plain, exponent, factor, spec, lengths_B)
        case LongRopeScaling() as scaling:
            short, long = (
                jnp.asarray(plain / np.array(divisors), jnp.float32)
                for divisors in (scaling.short_factor, scaling.long_factor)
            )
            # Lengths are known only when the program runs, so both tables are in it and each row
            # takes one.
            beyond_B1 = (lengths_B > scaling.original_max_position_embeddings)[:, None]
            return jnp.where(beyond_B1, long[None], short[None])
    return jnp.asarray(scaled, jnp.float32)[None]


def _llama3(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    """Divide low frequencies by ``factor``, keep high ones, blend smoothly in between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def _yarn(frequencies: np.ndarray, scaling: YarnRopeScaling, spec: DecoderSpec) -> np.ndarray:
    """Like llama3, but the blend is linear in the pair's index (arXiv 2309.00071, 3.2)."""
    dim, context = spec.head_dim, scaling.original_max_position_embeddings

    def pair_of(turns: float) -> float:
        """The (fractional) index of the pair that makes ``turns`` turns in the original length."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The last pair has index H / 2 - 1, but transformers clips to H - 1. We must match it.
    low, high = max(low, 0), min(high, dim - 1)
    # As transformers does, so that the blend does not divide by zero.
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies * (1.0 - divided + divided / scaling.factor)


def _dynamic(
    frequencies: np.ndarray,
    exponent: np.ndarray,
    factor: float,
    spec: DecoderSpec,
    lengths_B: Int[Array, "B"],
) -> Float[Array, "B h"]:
    """Base beyond max: ``theta * (factor * length / max - (factor - 1)) ** (H / (H - 2))``."""
    longest = spec.max_position_embeddings
    times_B = jnp.maximum(lengths_B, longest).astype(jnp.float32) / longest
    stretch_B = factor * times_B - (factor - 1)
    # The base grows by stretch ** (H / (H - 2)). A frequency is base ** -exponent, so it changes by
    # this power of the stretch.
    power = -exponent * spec.head_dim / (spec.head_dim - 2)
    plain, power = jnp.asarray(frequencies, jnp.float32), jnp.asarray(power, jnp.float32)
    return plain[None] * stretch_B[:, None] ** power[None]


def attention_factor(spec: DecoderSpec) -> float:
    """The factor by which yarn and longrope scale rotated keys and queries; otherwise 1."""
    scaling = spec.rope_scaling
    if not isinstance(scaling, YarnRopeScaling | LongRopeScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    assert isinstance(scaling, YarnRopeScaling)

    def scale(by: float) -> float:
        # YaRN's sqrt(1/t) (arXiv 2309.00071), fitted by its authors. It scales queries and keys, so
        # the scores grow by its square.
        return 0.1 * by * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def rope_rotation(
    spec: DecoderSpec, positions_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"] | None = None
) -> Rotation:
    """Float32 cosines and sines of every position's angles.

    ``lengths_B`` is the final length of each row; None means its current length, the last position
    plus one.
    """
    if lengths_B is None:
        lengths_B = positions_BT.max(axis=1) + 1
    frequencies_Bh = rope_frequencies(spec, lengths_B)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_Bh[:, None, None, :]
    factor = attention_factor(spec)
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(x_BTNH: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotate each pair (i, i + H/2) by its position's angle; float32 inside, input dtype out."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def rotate_layers(keys: Float[Array, "L B T K H"], rotation: Rotation) -> Float[Array, "L B T K H"]:
    """Keys of all layers after RoPE, in float32."""
    return jax.vmap(lambda layer: rotate(layer.astype(jnp.float32), rotation))(keys)
