"""Geometry on the unit sphere, and masked means as (sum, count).

The last axis is always the vector; everything is float32 inside, whatever comes in. Vectors are
divided by their largest entry before anything is squared, so cosines, angles and magnitudes of
1e30 and 1e-30 are as good as those of 1, in value and in gradient. NaNs are not hidden: a vector
that counts and holds one gives NaN.

``compare``, on which ``cosine`` stands, is written so that a whole cache costs little more than
reading it and writing its gradient.

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
# Squared lengths whose vectors need no rescaling: no product of their entries that matters leaves
# float32.
ORDINARY = (1e-24, 1e30)


class Compared(NamedTuple):
    """Cosine of the angle between two vectors, in [-1, 1], and their lengths."""

    cos: Float[Array, "*B"]
    length_a: Float[Array, "*B"]
    length_b: Float[Array, "*B"]


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that it can be added over batches and hosts."""

    sum: Float[Array, "..."]
    count: Float[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)

    @property
    def value(self) -> Float[Array, "..."]:
        """Sum / count, and 0 where nothing was counted."""
        counted = self.count > 0
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
    return Mean(jnp.sum(jnp.where(keep, values, 0.0), axis=axis), count)


def _rescale(
    x: Float[Array, "*B H"],
) -> tuple[Float[Array, "*B H"], Float[Array, "*B 1"], Shaped[Array, "*B 1"]]:
    """x times a scale that puts its largest |entry| at 8, that scale, and where x is not zero.

    The scale carries no gradient and need not: what is built on it does not depend on it. It is 8
    over the largest entry, not 1, whose quotient XLA flushes to zero near the end of float32.
    """
    x = x.astype(jnp.float32)
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    alive = ~(peak <= SMALLEST)  # written so that NaN is alive, and stays visible
    scale = 8.0 / jnp.where(alive, peak, 1.0)
    return x * jnp.where(alive, scale, 0.0), scale, alive


def _safe_norm(scaled: Float[Array, "*B H"], alive: Shaped[Array, "*B 1"]) -> Float[Array, "*B 1"]:
    """Length of a rescaled vector, and 1 with a zero gradient for zero vectors."""
    return jnp.sqrt(jnp.where(alive, jnp.sum(scaled * scaled, axis=-1, keepdims=True), 1.0))


def unit(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """x / |x| in float32; zero vectors stay zero, with a zero gradient."""
    scaled, _, alive = _rescale(x)
    return scaled / _safe_norm(scaled, alive)


def magnitude(x: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """|x| in float32; the gradient at the zero vector is zero."""
    scaled, scale, alive = _rescale(x)
    return jnp.where(alive, _safe_norm(scaled, alive) / scale, 0.0)[..., 0]


def cosine(a: Float[Array, "*B H"], b: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """Cosine of the angle between a and b, in [-1, 1]; 0 where either is the zero vector."""
    return compare(a, b).cos


def compare(
    a: Float[Array, "*B H"], b: Float[Array, "*B H"], keep: Bool[Array, "*B"] | None = None
) -> Compared:
    """``cosine(a, b)``, ``magnitude(a)`` and ``magnitude(b)`` in one go.

    Vectors that ``keep`` leaves out may hold NaN: they give 0, 1 and 1, and get no gradient. So
    they need not be zeroed first, which would copy both sides; and the backward pass starts from
    the vectors themselves and a few numbers per vector, so that nothing of their size is kept.

    Rescaling costs a pass over each side, so sums of plain squares are taken first; only where a
    vector that counts is not ``ORDINARY``, all are done again with rescaling.
    """
    return _compare(a, b, keep)


@jax.custom_vjp
def _compare(a: Array, b: Array, keep: Array | None) -> Compared:
    return _compare_forward(a, b, keep)[0]


def _compare_forward(a: Array, b: Array, keep: Array | None) -> tuple[Compared, Any]:
    x, y = a.astype(jnp.float32), b.astype(jnp.float32)
    squares_x, squares_y, product = (_dot(*pair) for pair in ((x, x), (y, y), (x, y)))
    least, most = ORDINARY
    ordinary = (jnp.minimum(squares_x, squares_y) >= least) & (
        jnp.maximum(squares_x, squares_y) <= most
    )

    def plain() -> tuple[Any, Any, Array]:
        of_x, of_y = jnp.sqrt(squares_x), jnp.sqrt(squares_y)
        return (of_x, of_y), (1.0 / of_x, 1.0 / of_y), product / of_x / of_y

    def careful() -> tuple[Any, Any, Array]:
        (of_x, inverse_x), (of_y, inverse_y) = _lengths(x), _lengths(y)
        return (of_x, of_y), (inverse_x, inverse_y), _dot(x * inverse_x, y * inverse_y)

    everywhere = jnp.all(ordinary if keep is None else ordinary | ~keep[..., None])
    lengths, inverses, cos = jax.lax.cond(everywhere, plain, careful)
    # Rounding can reach 1 + 1e-7. Only the value is clipped; the gradient stays the cosine's own.
    found = jnp.clip(cos, -1.0, 1.0), *lengths
    found = Compared(*(x[..., 0] for x in found))
    if keep is not None:
        empty = Compared(*map(jnp.float32, (0.0, 1.0, 1.0)))
        found = jax.tree.map(lambda x, other: jnp.where(keep, x, other), found, empty)
    return found, (a, b, keep, inverses, cos)


def _compare_backward(saved: Any, slopes: Compared) -> tuple[Array, Array, None]:
    """With directions u, v: ``slope_cos / |a| * (v - cos * u) + slope_length * u``; b likewise."""
    a, b, keep, inverses, cos = saved
    of_cos, *of_lengths = (slope[..., None] for slope in slopes)
    crossing = [of_cos * inverse for inverse in inverses]
    along = [own - cos * other for own, other in zip(of_lengths, crossing, strict=True)]
    # Numbers per vector stay that: without the barrier XLA would compute them anew for every entry,
    # and store the directions of the forward pass for this one.
    inverses, crossing, along = jax.lax.optimization_barrier((inverses, crossing, along))
    u, v = (x.astype(jnp.float32) * inverse for x, inverse in zip((a, b), inverses, strict=True))
    gradients = crossing[0] * v + along[0] * u, crossing[1] * u + along[1] * v
    if keep is not None:
        gradients = (jnp.where(keep[..., None], gradient, 0.0) for gradient in gradients)
    of_a, of_b = gradients
    return of_a.astype(a.dtype), of_b.astype(b.dtype), None


_compare.defvjp(_compare_forward, _compare_backward)


def _lengths(x: Float[Array, "*B H"]) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """|x| and 1 / |x|; both are 0 for zero vectors, the second also above 8e37."""
    scaled, scale, alive = _rescale(x)
    norm = _safe_norm(scaled, alive)
    return jnp.where(alive, norm / scale, 0.0), jnp.where(alive, scale / norm, 0.0)


def _dot(x: Float[Array, "*B H"], y: Float[Array, "*B H"]) -> Float[Array, "*B 1"]:
    return jnp.sum(x * y, axis=-1, keepdims=True)


def angular_distance(a: Float[Array, "*B H"], b: Float[Array, "*B H"]) -> Float[Array, "*B"]:
    """Angle between a and b in radians, 0 to pi; pi/2 where either is the zero vector.

    ``2 * atan2(|u - v|, |u + v|)`` on unit vectors (Kahan): accurate near 0 and pi, where the arc
    cosine loses half its digits and its gradient is infinite. At exactly 0 and pi it is 0 here.
    """
    u, v = unit(a), unit(b)
    apart, together = magnitude(u - v), magnitude(u + v)
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
    defined = magnitude(across)[..., None] > 1e-6
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
