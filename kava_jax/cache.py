"""What attention writes, and the dimension key of the whole project.

Dimension key (suffix of local names, one letter per axis):

    B batch        T tokens       S tokens attended to (S >= T when there is a past)
    L layers       P mapped layers (rows of the layer map)
    N query heads  K KV heads     G = N / K     H head dim
    D model width  F feed-forward width         V vocabulary rows
    suffix ``t`` / ``s``: teacher / student
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class KVCache(NamedTuple):
    """Keys and values of all layers, layer axis first.

    A NamedTuple, because it is a pytree that passes through ``jit``, ``scan`` and runtime shape
    checks unchanged. Whether keys are pre-RoPE or post-RoPE is decided by whoever asked for them.
    """

    k: Float[Array, "L B T K H"]
    v: Float[Array, "L B T K H"]


class HandedOver(NamedTuple):
    """A cache that takes the place of a model's own keys and values at some of its tokens."""

    cache: KVCache
    """For every token, with keys after the model's RoPE."""
    where: Bool[Array, "L B T"]
    """The tokens whose own keys and values are never read; the same in every layer."""
