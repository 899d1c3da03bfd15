"""Geometry on the unit sphere, and masked means as (sum, count).

The last axis is always the vector; everything is float32 inside, whatever comes in. Vectors are
divided by their largest entry before anything is squared. So cosines, angles and magnitudes of
vectors of length 1e30 or 1e-30 are as exact as at length 1, in value and in gradient. NaNs are not
hidden: a vector that counts and holds one gives NaN.

``compare``, which ``cosine`` is made of, keeps nothing of the size of its inputs for the backward
pass.

Left out on purpose: losses (``losses``), what is done with these numbers (``diagnostics``), and
forward-mode derivatives of ``compare`` and ``cosine``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

# Vectors with no entry above this are zero vectors: their direction would have gradients near the
# end of float32, and below 1.2e-38 XLA flushes to zero anyway.
SMALLEST = 1e-36


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that it can be added over batches and hosts."""

    sum: Float[Array, "..."]
    count: Float[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)

    @property
    def value(self) -> Float[Array, "..."]:
        """Sum / count, and 0 where nothing was counted."""
        counted = self.count > 0
        # The inner select makes the division defined where nothing counts. With the outer one alone
        # the gradient there would be 0 * infinity, which is NaN.
        return jnp.where(counted, self.sum / jnp.where(counted, self.count, 1.0), 0.0)


def masked_mean(
    values: Float[Array, "..."],
    mask: Shaped[Array, "..."] | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> Mean:
    """Mean of the values whose mask is not zero, over ``axis`` (all axes by default).

    The mask broadcasts to the values by numpy's rules; without one everything counts. Values that
    do not count may be NaN or infinite: they change neither the mean nor its gradient to ``values``
    (whoever computed them from NaNs must also keep those out: ``0 * NaN`` is NaN in a gradient).
    """
    values = values.astype(jnp.float32)
    keep = jnp.broadcast_to(True if mask is None else mask != 0, values.shape)
    # Counted as integers: a float32 sum of ones can stop growing at 2**24.
    count = jnp.sum(keep, axis=axis, dtype=jnp.int32).astype(jnp.float32)
    # A select, because a product with the mask would turn a NaN that does not count into a NaN.
    return Mean(jnp.sum(jnp.where(keep, values, 0.0), axis=axis), count)


def _scaled_norm(
    x: Float[Array, "*B H"],
) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """A scale, |x * scale| and |x|; for zero vectors 0, 1 and 0, without a gradient.

    The scale puts the largest |entry| at 8 before anything is squared. It carries no gradient and
    needs none, because what is made of it does not depend on it. It is 8 over the entry, not 1,
    whose quotient XLA flushes to zero near the end of float32.
    """
    x = x.astype(jnp.float32)
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    alive = ~(peak <= SMALLEST)  # written so that NaN is alive, and stays visible
    scale = 8.0 / jnp.where(alive, peak, 1.0)
    scale_or_zero = jnp.where(alive, scale, 0.0)
    squares = jnp.sum((x * scale_or_zero) ** 2, axis=-1, keepdims=True)
    # The slope of a root is infinite at 0, so zero vectors take the root of 1 instead.
    norm = jnp.sqrt(jnp.where(alive, squares, 1.0))
    return scale_or_zero, norm, jnp.where(alive, norm / scale, 0.0)


def unit(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """x / |x| in float32; zero vectors stay zero, with a zero gradient."""
    scale, norm, _ = _scaled_norm(x)
    # In this order: scale / norm is 1 / |x|, which XLA flushes to zero for |x| above 8.5e37.
    return x.astype(jnp.float32) * scale / norm


def magnitude(x: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """|x| in float32; the gradient at the zero vector is zero."""
    return _scaled_norm(x)[2][..., 0]


def cosine(a: Float[Array, "*B H"], b: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """Cosine of the angle between a and b, in [-1, 1]; 0 where either is the zero vector."""
    return compare(a, b)[0]


@jax.custom_vjp
def compare(
    a: Float[Array, "*B H"], b: Float[Array, "*B H"], keep: Bool[Array, "*B"] | None = None
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """``cosine(a, b)``, ``magnitude(a)`` and ``magnitude(b)`` in one go.

    Vectors that ``keep`` leaves out may hold NaN: they give 0, 1 and 1, and get no gradient. So
    they need not be zeroed first, which would copy both sides.
    """
    return _compare_forward(a, b, keep)[0]


def _compare_forward(a: Array, b: Array, keep: Array | None) -> tuple[Any, Any]:
    (scale_a, norm_a, length_a), (scale_b, norm_b, length_b) = _scaled_norm(a), _scaled_norm(b)
    product = jnp.sum(_times(a, scale_a) * _times(b, scale_b), axis=-1, keepdims=True)
    cos = product / norm_a / norm_b
    # Rounding can reach 1 + 1e-7. Only the value is clipped; the gradient stays the cosine's own.
    found = [x[..., 0] for x in (jnp.clip(cos, -1.0, 1.0), length_a, length_b)]
    if keep is not None:
        found = [jnp.where(keep, x, other) for x, other in zip(found, (0.0, 1.0, 1.0), strict=True)]
    # a and b are saved as they came, because they exist anyway. All else is one number per vector.
    return tuple(found), (a, b, keep, scale_a / norm_a, scale_b / norm_b, cos)


def _compare_backward(saved: Any, slopes: tuple[Array, Array, Array]) -> tuple[Any, ...]:
    """With directions u, v: ``slope_cos / |a| * (v - cos * u) + slope_length * u``; b likewise."""
    a, b, keep, inverse_a, inverse_b, cos = saved
    u, v = _times(a, inverse_a), _times(b, inverse_b)
    of_cos, of_a, of_b = (slope[..., None] for slope in slopes)
    gradients = (
        (of_cos * inverse_a * (v - cos * u) + of_a * u).astype(a.dtype),
        (of_cos * inverse_b * (u - cos * v) + of_b * v).astype(b.dtype),
    )
    # A slope of zero is not enough: a left-out vector may hold NaN, and 0 * NaN is NaN.
    if keep is not None:
        gradients = (jnp.where(keep[..., None], gradient, 0) for gradient in gradients)
    return *gradients, None


def _times(x: Array, scale: Array) -> Array:
    """Vectors in float32 times a number each, computed again wherever they are needed.

    Without the barrier, as with automatic differentiation, the CPU's compiler computes them once
    and keeps them: half the inputs' bytes instead of 3 %. The H100's compiler does not.
    """
    return x.astype(jnp.float32) * jax.lax.optimization_barrier(scale)


compare.defvjp(_compare_forward, _compare_backward)


def angular_distance(a: Float[Array, "*B H"], b: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """Angle between a and b in radians, 0 to pi; pi/2 where either is the zero vector.

    ``2 * atan2(|u - v|, |u + v|)`` on unit vectors (Kahan): accurate near 0 and pi, where the arc
    cosine loses half its digits and its gradient is infinite. At exactly 0 and pi it is 0 here.
    """
    u, v = unit(a), unit(b)
    apart, together = magnitude(u - v), magnitude(u + v)
    # Two zero vectors: atan2(0, 0) has no gradient, while atan2(1, 1) gives the same pi / 2 that a
    # single zero vector gets.
    undefined = (apart == 0) & (together == 0)
    return 2.0 * jnp.arctan2(jnp.where(undefined, 1.0, apart), jnp.where(undefined, 1.0, together))


def geodesic_rotate(
    x: Float[Array, "*B H"], towards: Float[Array, "*B H"], angle: float | Float[Array, "..."]
) -> Float[Array, "*B H"]:
    """X turned by ``angle`` radians along the great circle through ``towards``, its length kept.

    The angle is one number or broadcasts to the leading axes; past ``towards`` it simply goes on.
    ``|x| * (cos(angle) * u + sin(angle) * w)``, where u is x's direction and w the direction of
    what is left of ``towards`` without its part along u. Where the two are parallel, or one is
    zero, there is no such circle and x comes back unchanged.
    """
    x = x.astype(jnp.float32)
    u, v = unit(x), unit(towards)
    # From v - u, not v: exact when the two nearly agree. Twice, because once leaves a part along u.
    across = _reject(v - u, u)
    # What is left below 1e-6 is rounding (float32 resolves 1e-7 of a unit vector), not a direction.
    defined = magnitude(across)[..., None] > 1e-6
    # Zeros where there is no direction: the unused branch of the last select needs a finite
    # gradient.
    w = _reject(unit(jnp.where(defined, across, 0.0)), u)
    turn = jnp.broadcast_to(jnp.asarray(angle, jnp.float32), x.shape[:-1])[..., None]
    turned = magnitude(x)[..., None] * (jnp.cos(turn) * u + jnp.sin(turn) * unit(w))
    return jnp.where(defined, turned, x)


def _reject(x: Float[Array, "*B H"], u: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """X without its part along the unit vector u."""
    return x - jnp.sum(x * u, axis=-1, keepdims=True) * u


def center(
    x: Float[Array, "*B H"], mask: Shaped[Array, "..."] | None, axis: int | tuple[int, ...]
) -> Float[Array, "*B H"]:
    """X minus its masked mean over ``axis``; entries that do not count become 0.

    The mask broadcasts to x, so it has x's rank (size 1 on the vector axis).
    """
    mean = jnp.expand_dims(masked_mean(x, mask, axis).value, axis)
    centred = x.astype(jnp.float32) - mean
    return centred if mask is None else jnp.where(mask != 0, centred, 0.0)
