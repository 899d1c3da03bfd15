"""The reference frame in which the keys (or values) of both sides are compared.

Keys share a large offset (Qwen2's key bias), and some dimensions are far louder than others: raw
cosines measure those. A frame moves the origin to the mean and may divide every dimension by its
standard deviation, per layer and head, each side by its own statistics: those of the batch, or
running ones that the caller keeps with ``merge`` and ``decay``.

Left out on purpose: keeping running moments (the train step), and taking the key bias out of keys.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kava_jax.errors import KavaError
from kava_jax.geometry import masked_mean

# A spread below this share of the mean is float32 rounding of a dimension that does not move.
RESOLUTION = 1e-6


class Moments(NamedTuple):
    """Statistics of vectors per layer and head, float32; addable by ``merge``.

    count  tokens, not always whole: old ones may have decayed
    mean   of each dimension; 0 where the count is 0
    m2     sum of squared deviations from the mean, so that m2 / count is the variance
    """

    count: Float[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    mean: Float[Array, "*A P K H"]
    m2: Float[Array, "*A P K H"]


def empty(layers: int, heads: int, head_dim: int) -> Moments:
    """Moments of no token yet; ``merge`` with others gives the others."""
    zeros = jnp.zeros((layers, heads, head_dim), jnp.float32)
    return Moments(jnp.zeros((), jnp.float32), zeros, zeros)


def measure(x: Float[Array, "P B T K H"], mask_BT: Shaped[Array, "B T"]) -> Moments:
    """Moments of the tokens whose mask is not zero; the others may hold NaN.

    The mean first, then what it missed by rounding, then squares about it: sums of squares would
    lose a small spread beside a large mean, and a dimension that does not move would seem to.
    """
    keep = (mask_BT != 0)[None, :, :, None, None]
    mean = masked_mean(x, keep, (1, 2)).value
    mean = mean + masked_mean(x.astype(jnp.float32) - mean[:, None, None], keep, (1, 2)).value
    # Zeros before squaring: a NaN that does not count would be NaN in the gradient.
    deviation = jnp.where(keep, x.astype(jnp.float32) - mean[:, None, None], 0.0)
    count = jnp.sum(keep, dtype=jnp.int32).astype(jnp.float32)
    return Moments(count, mean, jnp.sum(deviation**2, axis=(1, 2)))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of tokens together; either may be empty.

    Source: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm.
    """
    return merge_stacked(jax.tree.map(lambda *pair: jnp.stack(pair), a, b))


def merge_stacked(moments: Moments) -> Moments:
    """Moments of all parts together, from parts stacked along a leading axis (microbatches).

    ``mean = sum(n_i mean_i) / n`` and ``m2 = sum(m2_i) + sum(n_i (mean_i - mean)^2)``: Chan's
    formula for any number of parts.
    """
    total = moments.count.sum()
    weight = (moments.count / jnp.where(total > 0, total, 1.0))[:, None, None, None]
    # Relative to the first part: means that hardly differ keep their last digits.
    first = moments.mean[:1]
    mean = first + (weight * (moments.mean - first)).sum(axis=0, keepdims=True)
    between = (weight * (moments.mean - mean) ** 2).sum(axis=0) * total
    return Moments(total, mean[0], moments.m2.sum(axis=0) + between)


def decay(moments: Moments, factor: float | int | Float[Array, ""]) -> Moments:
    """The same mean and variance with less weight in the next ``merge``: a memory that forgets."""
    return moments._replace(count=moments.count * factor, m2=moments.m2 * factor)


@dataclass(frozen=True)
class Frame:
    """How vectors are laid out and from where they are seen, before they are compared.

    center       "none": the origin stays. "batch": the batch's own mean is subtracted; gradients
                 pass through it, as in batch norm. "running": the mean of the running moments, a
                 constant; before there are any, the batch's own as a constant
    standardize  every dimension is divided by its standard deviation, from the same statistics (of
                 the batch where center is "none"); one that does not move stays as it is
    per_head     one vector per head; False: one per token, all heads side by side
    """

    center: Literal["none", "batch", "running"] = "none"
    standardize: bool = False
    per_head: bool = True

    def __call__(
        self,
        x: Float[Array, "P B T K H"],
        mask_BT: Shaped[Array, "B T"],
        running: Moments | None = None,
    ) -> Float[Array, "P B T J D"]:
        """One side's vectors in this frame: [P, B, T, K, H], or [P, B, T, 1, K * H]; float32.

        Tokens whose mask is 0 come out as zeros and may hold NaN.

        Raises:
            KavaError: center is "running" and no running moments are given.
        """
        keep = (mask_BT != 0)[None, :, :, None, None]
        x = jnp.where(keep, x.astype(jnp.float32), 0.0)
        if self.center != "none" or self.standardize:
            moments = self._moments(x, mask_BT, running)
            if self.center != "none":
                x = x - moments.mean[:, None, None]
            if self.standardize:
                x = x / _std(moments)[:, None, None]
            x = jnp.where(keep, x, 0.0)
        return x if self.per_head else x.reshape(*x.shape[:3], 1, -1)

    def _moments(self, x: Array, mask_BT: Array, running: Moments | None) -> Moments:
        own = measure(x, mask_BT)
        if self.center != "running":
            return own
        if running is None:
            raise KavaError("loss.center=running without running moments; pass them, or use batch")
        known = running.count > 0
        chosen = jax.tree.map(lambda theirs, ours: jnp.where(known, theirs, ours), running, own)
        return jax.lax.stop_gradient(chosen)


def _std(moments: Moments) -> Float[Array, "P K H"]:
    """Standard deviation of each dimension; 1 where it does not move."""
    variance = moments.m2 / jnp.where(moments.count > 0, moments.count, 1.0)
    moves = variance > (RESOLUTION * moments.mean) ** 2
    return jnp.sqrt(jnp.where(moves, variance, 1.0))
