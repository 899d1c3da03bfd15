"""What two caches do when the same queries read them: where attention looks, and what it brings.

Queries and keys are those after RoPE. Everything is float32, and one layer's [B, N, T, S] exists at
a time, in the gradient too.

Left out on purpose: whose queries read, and bringing both caches into their space (``training``).
The caller stops the gradient of whatever is a constant (usually the target and its queries).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.geometry import Mean, cosine, masked_mean
from kava_jax.models.attend import capped

# Accelerators round the factors of a float32 product to TF32 or bf16 unless they are told not to.
HIGHEST = jax.lax.Precision.HIGHEST


def attention_kl(
    q: Float[Array, "P B T N H"],
    student_k: Float[Array, "P B S K H"],
    target_k: Float[Array, "P B S K H"],
    masks_BWTS: Bool[Array, "B W T S"],
    counted_BT: Shaped[Array, "B T"],
    of_layers: Sequence[int] | None = None,
    cap: float | None = None,
) -> Float[Array, "B T"]:
    """``KL(target's attention || student's)`` of every query token: mean over layers and heads.

    Each distribution is ``softmax(q . k / sqrt(H))`` over the keys that the layer's mask shows the
    token; ``of_layers`` says which of the masks that is (None: the first), and ``cap`` is the
    model's cap of scores.
    Query head n reads KV head ``n // (N // K)``. 0 where ``counted_BT`` is 0 or nothing is visible.
    Keys that no counted query sees, and queries that do not count, may hold NaN.

    Raises:
        KavaError: N is not a multiple of K.
    """
    _check_heads(q, student_k)

    def layer(mask: Array, q: Array, student_k: Array, target_k: Array) -> Array:
        log_s, log_t = (_log_attention(q, k, mask, cap) for k in (student_k, target_k))
        return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1).mean(axis=(1, 2))

    student_k, target_k = (_seen(x, masks_BWTS, counted_BT) for x in (student_k, target_k))
    masks = (masks_BWTS, of_layers)
    divergence_PBT = _by_layer(layer, *masks, _counted(q, counted_BT), student_k, target_k)
    return jnp.where(counted_BT != 0, divergence_PBT.mean(axis=0), 0.0)


def attention_output_cosine(
    q: Float[Array, "P B T N H"],
    student: KVCache,
    target: KVCache,
    masks_BWTS: Bool[Array, "B W T S"],
    counted_BT: Shaped[Array, "B T"],
    of_layers: Sequence[int] | None = None,
    cap: float | None = None,
) -> Mean:
    """Cosine of what attention brings from each cache: mean over heads and counted tokens, [P].

    ``softmax(q . k_s / sqrt(H)) v_s`` with ``softmax(q . k_t / sqrt(H)) v_t``, one vector per query
    head. Heads, mask, NaNs and errors as ``attention_kl``; a query that sees nothing brings zeros,
    cosine 0.
    """
    _check_heads(q, student.k)

    def layer(mask: Array, q: Array, student_kv: KVCache, target_kv: KVCache) -> Mean:
        brought = (_attend(q, kv, mask, cap) for kv in (student_kv, target_kv))
        counted = (counted_BT != 0)[:, None, None, :]
        return masked_mean(cosine(*brought), counted)

    student, target = (
        jax.tree.map(lambda x: _seen(x, masks_BWTS, counted_BT), side) for side in (student, target)
    )
    return _by_layer(layer, masks_BWTS, of_layers, _counted(q, counted_BT), student, target)


def _check_heads(q: Float[Array, "P B T N H"], k: Float[Array, "P B S K H"]) -> None:
    if q.shape[-2] % k.shape[-2]:
        raise KavaError(
            f"{q.shape[-2]} query heads do not share {k.shape[-2]} KV heads evenly; compare the "
            "caches in the space of the model whose queries read them"
        )


def _by_layer(
    of_layer: Callable[..., Any],
    masks_BWTS: Bool[Array, "B W T S"],
    of_layers: Sequence[int] | None,
    *xs: Any,
) -> Any:
    """``of_layer`` over the leading axis, one after the other, recomputed in the backward pass.

    It is given the layer's mask [B, 1, T, S] and its part of ``xs``.
    """
    own = jnp.array(of_layers) if of_layers is not None and any(of_layers) else None

    def one(layer: Any) -> Any:
        number, parts = layer
        return of_layer(masks_BWTS[:, 0 if number is None else number, None], *parts)

    # Inside a loop XLA cannot merge the second computation with the first one, so the barriers that
    # ``prevent_cse`` adds would only cost time.
    return jax.lax.map(jax.checkpoint(one, prevent_cse=False), (own, xs))


def _counted(q: Float[Array, "P B T N H"], counted_BT: Array) -> Float[Array, "P B T N H"]:
    """Queries in float32, zero where they do not count: a NaN would reach the keys' gradient."""
    return jnp.where((counted_BT != 0)[None, :, :, None, None], q.astype(jnp.float32), 0.0)


def _seen(
    x: Float[Array, "P B S K H"], masks_BWTS: Bool[Array, "B W T S"], counted_BT: Array
) -> Float[Array, "P B S K H"]:
    """Keys or values in float32, zero where no counted query sees them, for the same reason."""
    seen_BS = jnp.any(masks_BWTS & (counted_BT != 0)[:, None, :, None], axis=(1, 2))
    return jnp.where(seen_BS[None, :, :, None, None], x.astype(jnp.float32), 0.0)


def _log_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B 1 T S"],
    cap: float | None,
) -> Float[Array, "B K G T S"]:
    """Logarithm of the attention weights, query heads by the KV head they read."""
    batch, tokens, heads, head_dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    # Query heads that share a KV head lie side by side, as in Hugging Face's models.
    q_BTKGH = q_BTNH.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision=HIGHEST)
    # -1e30, not -inf: a token that sees nothing, and 0 * log 0 in the divergence, stay finite.
    scores = capped(scores / head_dim**0.5, cap)
    visible = jnp.where(mask_BTS[:, :, None], scores, -1e30)
    return jax.nn.log_softmax(visible, axis=-1)


def _attend(
    q_BTNH: Float[Array, "B T N H"],
    kv: KVCache,
    mask_BTS: Bool[Array, "B 1 T S"],
    cap: float | None,
) -> Float[Array, "B K G T H"]:
    """What each query head brings from one layer's cache."""
    attention = jnp.exp(_log_attention(q_BTNH, kv.k, mask_BTS, cap))
    # A query that sees nothing has equal scores, so softmax gives it the mean of all values.
    weights = jnp.where(mask_BTS[:, :, None], attention, 0.0)
    return jnp.einsum("BKGTS,BSKH->BKGTH", weights, kv.v, precision=HIGHEST)
