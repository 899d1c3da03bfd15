"""Targets that teach nothing, to tell what alignment does from what any pull on the cache does.

``shuffled``   token t's target is that of token t in the row before
``constant``   every token's target is the mean over the batch's counted tokens, per layer and head
``random``     the target is read off a teacher with random weights (chosen where it is loaded)

They replace the teacher's vectors before they meet a projector. Only the KV loss sees them: the
alignment that is reported stays that with the teacher's true ones.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from kava_jax.geometry import masked_mean

Control = Literal["none", "shuffled", "constant", "random"]


def controlled(
    control: Control, vectors: Any, mask_BT: Bool[Array, "B T"]
) -> tuple[Any, Bool[Array, "B T"]]:
    """The teacher's vectors (a tree of L B T K H) as the control has them, and who has a target.

    Under ``shuffled`` a token past the end of the other row has none. ``none`` and ``random``
    leave both as they are.
    """
    # A roll by 1 brings the previous row's target. ``cos_shuffled`` rolls by -1, so with three rows
    # or more that baseline is not the pair that is trained.
    if control == "shuffled":
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), vectors), mask_BT & jnp.roll(
            mask_BT, 1, axis=0
        )
    if control == "constant":
        return jax.tree.map(lambda x: _mean(x, mask_BT), vectors), mask_BT
    return vectors, mask_BT


def _mean(x_LBTKH: Array, mask_BT: Array) -> Array:
    """Every token's vector replaced by the mean of those that count."""
    counted = mask_BT[None, :, :, None, None]
    mean = masked_mean(x_LBTKH, counted, (1, 2)).value[:, None, None]
    return jnp.broadcast_to(mean, x_LBTKH.shape).astype(x_LBTKH.dtype)
