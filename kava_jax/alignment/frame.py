"""The reference frame in which the keys (or values) of both sides are compared.

Keys share a large offset (Qwen2's key bias), and raw cosines measure that. A frame moves the origin
to the mean, per layer and head, each side to its own: that of the batch, or a running one that the
caller keeps with ``merge`` and ``decay``.

Left out on purpose: keeping running means (the train step), and taking the key bias out of keys.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kava_jax.errors import KavaError
from kava_jax.geometry import masked_mean

Center = Literal["none", "batch", "running"]


class TokenMean(NamedTuple):
    """The mean vector per layer and head, float32; addable by ``merge``.

    count  tokens, not always whole: old ones may have decayed
    mean   of each dimension; 0 where the count is 0
    """

    count: Float[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    mean: Float[Array, "*A P K H"]


def empty(layers: int, heads: int, head_dim: int) -> TokenMean:
    """The mean of no token yet; ``merge`` with another gives the other."""
    zeros = jnp.zeros((layers, heads, head_dim), jnp.float32)
    return TokenMean(jnp.zeros((), jnp.float32), zeros)


def measure(x: Float[Array, "P B T K H"], mask_BT: Shaped[Array, "B T"]) -> TokenMean:
    """The mean of the tokens whose mask is not zero; the others may hold NaN.

    Its second pass adds what the first one missed by rounding.
    """
    keep = (mask_BT != 0)[None, :, :, None, None]
    mean = masked_mean(x, keep, (1, 2)).value
    # A key bias can be far longer than the rest of a key (norms of 605 and 921 in Qwen2.5-7B). What
    # the first mean loses by rounding then counts for the rest.
    mean = mean + masked_mean(x.astype(jnp.float32) - mean[:, None, None], keep, (1, 2)).value
    return TokenMean(jnp.sum(keep, dtype=jnp.int32).astype(jnp.float32), mean)


def merge(a: TokenMean, b: TokenMean) -> TokenMean:
    """The mean of both sets of tokens together; either may be empty."""
    return merge_stacked(jax.tree.map(lambda *pair: jnp.stack(pair), a, b))


def merge_stacked(parts: TokenMean) -> TokenMean:
    """``sum(n_i mean_i) / n`` of parts stacked along a leading axis (microbatches)."""
    total = parts.count.sum()
    weight = (parts.count / jnp.where(total > 0, total, 1.0))[:, None, None, None]
    # Relative to the first part: means that hardly differ keep their last digits.
    first = parts.mean[:1]
    return TokenMean(total, first[0] + (weight * (parts.mean - first)).sum(axis=0))


def decay(mean: TokenMean, factor: float | int | Float[Array, ""]) -> TokenMean:
    """The same mean with less weight in the next ``merge``: a memory that forgets."""
    return mean._replace(count=mean.count * factor)


def framed(
    x: Float[Array, "P B T K H"],
    mask_BT: Shaped[Array, "B T"],
    center: Center,
    running: TokenMean | None = None,
) -> Float[Array, "P B T K H"]:
    """One side's vectors as they are compared, float32; zeros where the mask is 0, even for NaN.

    Args:
        x: keys or values.
        mask_BT: not zero where a token counts.
        center: "none": the origin stays. "batch": the batch's own mean is subtracted; gradients
            pass through it, as in batch norm. "running": the running mean is, a constant; before
            there is any, the batch's own as a constant.
        running: the running mean.

    Raises:
        KavaError: center is "running" and no running mean is given.
    """
    keep = (mask_BT != 0)[None, :, :, None, None]
    x = jnp.where(keep, x.astype(jnp.float32), 0.0)
    if center == "none":
        return x
    origin = measure(x, mask_BT).mean
    if center == "running":
        if running is None:
            raise KavaError("loss.center=running without a running mean; pass it, or use batch")
        origin = jax.lax.stop_gradient(jnp.where(running.count > 0, running.mean, origin))
    # A second time, because the subtraction has moved the zeros.
    return jnp.where(keep, x - origin[:, None, None], 0.0)
