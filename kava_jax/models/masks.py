"""Token positions and attention masks, computed from which tokens are real (not padding)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def token_positions(valid_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of every token, counting real tokens only; works with left and right padding."""
    # Without the maximum, padding in front would have position -1.
    return jnp.maximum(jnp.cumsum(valid_BT.astype(jnp.int32), axis=1) - 1, 0)


def attention_mask(
    query_positions_BT: Int[Array, "B T"],
    key_positions_BS: Int[Array, "B S"],
    key_valid_BS: Bool[Array, "B S"],
    windows: tuple[int | None, ...] = (None,),
) -> Bool[Array, "B W T S"]:
    """Causal masks: a query sees real keys at its own position or before, within the window.

    There is one mask for each of ``windows`` (``DecoderSpec.windows``); None is no limit. The last
    T of the S keys belong to the queries' own tokens. Padding has the same position as the real
    token before it, so the mask needs ``key_valid_BS`` as well as positions.
    """
    # Padding in front of a row sees no key at all. XLA's attention masks with a large finite
    # number, so the result there is a mean of values and not NaN.
    distance = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    visible = (distance >= 0) & key_valid_BS[:, None, :]
    near = [visible if size is None else visible & (distance < size) for size in windows]
    return jnp.stack(near, axis=1)
