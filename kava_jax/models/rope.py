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
from collections.abc import Sequence

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
    Rope,
    RopeScaling,
    YarnRopeScaling,
)

Rotation = tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
"""Cosines and sines of every position's angles, with an axis to broadcast over heads."""
Rotations = tuple[Float[Array, "_ B T 1 h"], Float[Array, "_ B T 1 h"]]
"""Of several layers, or the one of them all."""


def rope_frequencies(rope: Rope, lengths_B: Int[Array, "B"]) -> Float[Array, "#B h"]:
    """Angular frequency of each rotated pair, in radians per position: float32 [B or 1, dim / 2].

    ``theta ** (-2 i / H)``, then the model's scaling. A scaling that depends on the length gives a
    row of frequencies for each of ``lengths_B``; the others give one row for all.
    Source: RoFormer (arXiv 2104.09864) section 3.2.2; scalings: transformers'
    ``modeling_rope_utils``.
    """
    # In float64, rounded once at the end: an angle is position times frequency, so the error of a
    # frequency grows along the row.
    exponent = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    plain = rope.theta**-exponent
    match rope.scaling:
        case None:
            scaled = plain
        case LinearRopeScaling(factor):
            scaled = plain / factor
        case Llama3RopeScaling() as scaling:
            scaled = _llama3(plain, scaling)
        case YarnRopeScaling() as scaling:
            scaled = _yarn(plain, scaling, rope)
        case DynamicRopeScaling(factor):
            # The base grows by ``stretch ** (dim / (dim - 2))``. A frequency is base ** -exponent,
            # so it changes by this power of the stretch.
            power = jnp.asarray(-exponent * rope.dim / (rope.dim - 2), jnp.float32)
            times_B = jnp.maximum(lengths_B, rope.longest).astype(jnp.float32) / rope.longest
            stretch_B = factor * times_B - (factor - 1)
            return jnp.asarray(plain, jnp.float32)[None] * stretch_B[:, None] ** power[None]
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


def _yarn(frequencies: np.ndarray, scaling: YarnRopeScaling, rope: Rope) -> np.ndarray:
    """Like llama3, but the blend is linear in the pair's index (arXiv 2309.00071, 3.2)."""
    dim, context = rope.dim, scaling.original_max_position_embeddings

    def pair_of(turns: float) -> float:
        """The (fractional) index of the pair that makes ``turns`` turns in the original length."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

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


def attention_factor(scaling: RopeScaling | None) -> float:
    """The factor by which yarn and longrope scale rotated keys and queries; otherwise 1."""
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


def rope_rotations(
    spec: DecoderSpec, positions_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"] | None = None
) -> Rotations:
    """Float32 cosines and sines of every position's angles, for each of ``spec.ropes``.

    ``lengths_B`` is the final length of each row; None means its current length, the last position
    plus one.
    """
    if lengths_B is None:
        lengths_B = positions_BT.max(axis=1) + 1
    positions_BT11 = positions_BT[:, :, None, None].astype(jnp.float32)

    def of(rope: Rope | None) -> Rotation:
        if rope is None:  # by an angle of 0, which changes no bit
            shape = (*positions_BT.shape, 1, (spec.rotary_dim or spec.head_dim) // 2)
            return jnp.ones(shape), jnp.zeros(shape)
        angles = positions_BT11 * rope_frequencies(rope, lengths_B)[:, None, None, :]
        factor = attention_factor(rope.scaling)
        return factor * jnp.cos(angles), factor * jnp.sin(angles)

    return jax.tree.map(lambda *parts: jnp.stack(parts), *map(of, spec.ropes))


def layer_rotations(
    spec: DecoderSpec, positions_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"] | None = None
) -> Rotations:
    """Those of every layer, as ``rotate_layers`` takes them; a single one where all are alike."""
    own = rope_rotations(spec, positions_BT, lengths_B)
    which = np.array([spec.ropes.index(rope) for rope in spec.layer_ropes])
    return own if len(spec.ropes) == 1 else jax.tree.map(lambda part: part[which], own)


def rotate(x_BTNH: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotate each pair (i, i + dim/2) by its position's angle; float32 inside, input dtype out.

    Numbers of a head beyond ``dim`` stay.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*turned, rest], axis=-1).astype(x_BTNH.dtype)


def rotate_layers(
    keys: Float[Array, "L B T K H"], rotations: Rotations
) -> Float[Array, "L B T K H"]:
    """Keys of several layers after RoPE, in float32; there is one rotation for each, or for all."""
    one = rotations[0].shape[0] == 1
    each = jax.tree.map(lambda part: part[0], rotations) if one else rotations
    turn = jax.vmap(rotate, in_axes=(0, None if one else 0))
    return turn(keys.astype(jnp.float32), each)


def of_layers(rotations: Rotations, layers: Sequence[int]) -> Rotations:
    """The rotations of some of the layers."""
    if rotations[0].shape[0] == 1:
        return rotations
    return jax.tree.map(lambda part: part[np.array(layers)], rotations)
