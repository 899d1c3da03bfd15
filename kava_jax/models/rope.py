"""Rotary position embedding in the half-split layout that Hugging Face checkpoints use."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kava_jax.models.spec import DecoderSpec, Llama3RopeScaling


def rope_frequencies(spec: DecoderSpec) -> np.ndarray:
    """Angular frequency of each rotated pair, in radians per position: float32 [H / 2].

    ``theta ** (-2 i / H)``, then rescaled when the model asks for llama3 scaling.
    Source: RoFormer (arXiv 2104.09864) section 3.2.2; Llama 3.1's scaling as in transformers.
    """
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    frequencies = spec.rope_theta**-exponent
    if spec.rope_scaling is not None:
        frequencies = _llama3(frequencies, spec.rope_scaling)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    """Divide low frequencies by ``factor``, keep high ones, blend smoothly in between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rope_rotation(
    positions: Int[Array, "B T"], frequencies: np.ndarray
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """Cosine and sine of every position's angles, in float32, ready to broadcast over heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]],
) -> Float[Array, "B T N H"]:
    """Rotate each pair (i, i + H/2) by its position's angle; float32 inside, input dtype out."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
