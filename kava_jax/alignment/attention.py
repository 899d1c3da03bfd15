"""What two caches do when the same queries read them: where attention looks, and what it brings.

Queries and keys are those after RoPE. Everything is float32, and one layer's [B, N, T, S] exists at
a time, in the gradient too.

Left out on purpose: whose queries read, and bringing both caches into their space (``training``).
The caller stops the gradient of whatever is a constant (usually the target and its queries).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.geometry import Mean, cosine, masked_mean
from kava_jax.models.attend import capped

# Accelerators round the factors of a float32 product to TF32 or bf16 unless they are told not to.
HIGHEST = jax.lax.Precision.HIGHEST


class Attended(NamedTuple):
    """Two caches and the queries that read both.

    Query head n reads KV head ``n // (N // K)``, with weights ``softmax(q . k / sqrt(H))`` over the
    keys that the layer's mask shows the token. Keys that no counted query sees, and queries that do
    not count, may hold NaN.
    """

    queries: Float[Array, "P B T N H"]
    student: KVCache
    """Keys after RoPE and with biases, as the target's."""
    target: KVCache
    masks: Bool[Array, "B W T S"]
    mask_of: Sequence[int] | None = None
    """By layer, which of the masks; None: the first."""
    cap: float | None = None
    """The model's cap of scores."""


def attention_kl(read: Attended, counted_BT: Shaped[Array, "B T"]) -> Float[Array, "B T"]:
    """``KL(target's attention || student's)`` of every query token: mean over layers and heads.

    0 where ``counted_BT`` is 0 or nothing is visible.

    Raises:
        KavaError: N is not a multiple of K.
    """

    def layer(mask: Array, q: Array, student_k: Array, target_k: Array) -> Array:
        log_s, log_t = (_log_attention(q, k, mask, read.cap) for k in (student_k, target_k))
        return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1).mean(axis=(1, 2))

    divergence_PBT = _by_layer(layer, read, counted_BT, (read.student.k, read.target.k))
    return jnp.where(counted_BT != 0, divergence_PBT.mean(axis=0), 0.0)


def attention_output_cosine(read: Attended, counted_BT: Shaped[Array, "B T"]) -> Mean:
    """Cosine of what attention brings from each cache: mean over heads and counted tokens, [P].

    What a query head brings are its weights times the values; a query that sees nothing brings
    zeros, cosine 0. Errors as ``attention_kl``.
    """

    def layer(mask: Array, q: Array, student: KVCache, target: KVCache) -> Mean:
        brought = (_attend(q, kv, mask, read.cap) for kv in (student, target))
        return masked_mean(cosine(*brought), (counted_BT != 0)[:, None, None, :])

    return _by_layer(layer, read, counted_BT, (read.student, read.target))


def _by_layer(of_layer: Callable[..., Any], read: Attended, counted_BT: Array, sides: Any) -> Any:
    """``of_layer`` over the leading axis, one after the other, recomputed in the backward pass.

    It is given the layer's mask [B, 1, T, S], its queries, and its part of both ``sides``.
    """
    heads, kv_heads = read.queries.shape[-2], read.student.k.shape[-2]
    if heads % kv_heads:
        raise KavaError(
            f"{heads} query heads do not share {kv_heads} KV heads evenly; compare the caches in "
            "the space of the model whose queries read them"
        )
    counted = counted_BT != 0
    seen_BS = jnp.any(read.masks & counted[:, None, :, None], axis=(1, 2))

    def zeroed(x: Array, keep: Array) -> Array:
        return jnp.where(keep[None, :, :, None, None], x.astype(jnp.float32), 0.0)

    # Queries that do not count would bring a NaN into the keys' gradient, and keys that no counted
    # query sees into the queries'.
    queries = zeroed(read.queries, counted)
    sides = jax.tree.map(lambda x: zeroed(x, seen_BS), sides)
    own = jnp.array(read.mask_of) if read.mask_of is not None and any(read.mask_of) else None

    def one(layer: Any) -> Any:
        number, q, parts = layer
        return of_layer(read.masks[:, 0 if number is None else number, None], q, *parts)

    # Inside a loop XLA cannot merge the second computation with the first one, so the barriers that
    # ``prevent_cse`` adds would only cost time.
    return jax.lax.map(jax.checkpoint(one, prevent_cse=False), (own, queries, sides))


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
