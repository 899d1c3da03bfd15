"""Geometry on the unit sphere, and masked means as (sum, count)."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that it can be added over batches and hosts."""

    sum: Float[Array, "..."]
    count: Float[Array, "..."]
