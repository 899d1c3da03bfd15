"""Losses on logits, token by token, without ever holding the logits of a whole batch.

[B, T, V] in float32 would be the largest array of the step by far, so the LM heads run over chunks
of tokens. Tokens that weigh nothing (prompts, padding) are sorted to the end and never reach a
head. What a token weighs is known before its logits are, so its gradient is computed in the same
pass: nothing is kept of the logits, and nothing is computed twice.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kava_jax.parallel.sharding import Layouts

# Logits that a chunk may always have, per shard of the batch: 2**25 float32 are 128 MiB.
CHUNK_LOGITS = 2**25
# At least so many chunks, so that few tokens without weight share one with the last that have some.
CHUNKS = 4
# Long chunks are multiples of this, which is what matrix units like.
CHUNK_UNIT = 128

LossOfLogits = Callable[[dict[str, Array], Array], Array]


class Head(NamedTuple):
    """One model's way to logits: ``hidden @ table.T``, multiplied in the hidden states' dtype."""

    hidden: Float[Array, "B U D"]
    table: Float[Array, "V D"]


class _Sorted(NamedTuple):
    """Tokens of each shard [S, N], those that weigh something first."""

    order: Int[Array, "S N"]
    needed: Int[Array, ""]
    """The most that any shard has."""
    size: int
    """Tokens of a chunk, which divides N."""

    @property
    def chunks(self) -> int:
        return self.order.shape[1] // self.size


def weighted_losses(
    learner: Head,
    others: Mapping[str, Head],
    labels_BU: Int[Array, "B U"],
    counted_BU: Bool[Array, "B U"],
    weights_BUK: Float[Array, "B U K"],
    loss_of_logits: LossOfLogits,
    *,
    shards: int = 1,
    layouts: Layouts | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B U K"]]:
    """``sum(weights * losses)`` over counted tokens, and the losses themselves, elsewhere 0.

    The sum is differentiable in the learner and the weights; others are constants, and no gradient
    goes through the losses.

    Args:
        learner: the model that learns; its logits are called ``student``.
        others: further models that the loss compares with, by name.
        labels_BU: the ids to predict.
        counted_BU: which tokens have losses.
        weights_BUK: of every token's K losses.
        loss_of_logits: from every model's logits [S, n, V] and labels [S, n] to losses [S, n, K].
        shards: over how many devices the rows are split.
        layouts: where arrays lie on the mesh.
    """
    shards = math.gcd(shards, labels_BU.shape[0])
    run = partial(_run, loss_of_logits, shards, layouts)

    @jax.custom_vjp
    def total(learner: Head, weights: Array, *constants: Any) -> tuple[Array, Array]:
        losses, _ = run(learner, weights, *constants, with_gradient=False)
        return (weights * losses).sum(), losses

    def forward(learner: Head, weights: Array, *constants: Any) -> Any:
        losses, gradient = run(learner, weights, *constants, with_gradient=True)
        return ((weights * losses).sum(), losses), (gradient, losses)

    def backward(saved: Any, cotangents: tuple[Array, Array]) -> Any:
        (gradient, losses), (scale, _) = saved, cotangents
        scaled = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradient)
        return scaled, scale * losses, None, None, None

    total.defvjp(forward, backward)
    value, losses = total(learner, weights_BUK, dict(others), labels_BU, counted_BU)
    return value, jax.lax.stop_gradient(losses)


def _run(
    loss_of_logits: LossOfLogits,
    shards: int,
    layouts: Layouts | None,
    learner: Head,
    weights_BUK: Array,
    others: Mapping[str, Head],
    labels_BU: Array,
    counted_BU: Array,
    with_gradient: bool,
) -> tuple[Array, Head | None]:
    """Losses of all tokens, and the gradient of their weighted sum in the learner."""

    def by_shard(x: Array) -> Array:
        return _lying(x.reshape(shards, -1, *x.shape[2:]), layouts and layouts.rows)

    heads = {"student": learner, **others}
    hiddens = {name: by_shard(head.hidden) for name, head in heads.items()}
    tables = {
        name: _lying(head.table.astype(head.hidden.dtype), layouts and layouts.head)
        for name, head in heads.items()
    }
    labels, weights, counted = map(by_shard, (labels_BU, weights_BUK, counted_BU))
    student = hiddens["student"]
    tokens = _sorted(counted, max(table.shape[0] for table in tables.values()), student.shape[-1])

    def chunk(state: tuple[Any, ...]) -> tuple[Any, ...]:
        number, losses, *gradient = state
        start = number * tokens.size
        places = jax.lax.dynamic_slice_in_dim(tokens.order, start, tokens.size, axis=1)
        taken = {name: _take(hidden, places) for name, hidden in hiddens.items()}
        logits = {name: _logits(taken[name], tables[name]) for name in taken}
        # A place beyond the last token repeats one, and counts for nothing.
        inside = start + jnp.arange(tokens.size) < student.shape[1]
        kept = _take(counted, places) & inside[None, :]

        def weighted(own: Array) -> tuple[Array, Array]:
            found = loss_of_logits(logits | {"student": own}, _take(labels, places))
            found = jnp.where(kept[..., None], found, 0.0)
            return (_take(weights, places) * found).sum(), found

        if not with_gradient:
            found = weighted(logits["student"])[1]
        else:
            slopes, found = jax.grad(weighted, has_aux=True)(logits["student"])
            slopes = slopes.astype(student.dtype)
            of_hidden = jnp.einsum("snv,vd->snd", slopes, tables["student"])
            of_table = jnp.einsum(
                "snv,snd->svd", slopes, taken["student"], preferred_element_type=jnp.float32
            )
            gradient = [_written(gradient[0], of_hidden, start), gradient[1] + of_table]
        return number + 1, _written(losses, found, start), *gradient

    def unfinished(state: tuple[Any, ...]) -> Array:
        # The second limit never bites: it says to whoever reads the program how long it may get.
        return (state[0] * tokens.size < tokens.needed) & (state[0] < tokens.chunks)

    room = tokens.order.shape
    state = (jnp.zeros((), jnp.int32), jnp.zeros((*room, weights.shape[-1])))
    if with_gradient:
        of_table = jnp.zeros((shards, *tables["student"].shape))
        state += (
            jnp.zeros((*room, student.shape[-1]), student.dtype),
            _lying(of_table, layouts and layouts.head_gradients),
        )
    _, losses, *gradient = jax.lax.while_loop(unfinished, chunk, state)
    # Where each token's chunk wrote; what was never reached stays 0.
    back = jnp.argsort(tokens.order[:, : student.shape[1]], axis=1)
    losses = _take(losses, back).reshape(weights_BUK.shape)
    if not with_gradient:
        return losses, None
    of_hidden = _take(gradient[0], back).reshape(learner.hidden.shape)
    of_table = gradient[1].sum(axis=0).astype(learner.table.dtype)
    return losses, Head(of_hidden, of_table)


def _sorted(counted_SN: Array, vocabulary: int, width: int) -> _Sorted:
    """Tokens that count first, in chunks.

    A chunk has as many tokens as the learner is wide, or more: each adds to the gradient of the
    whole table, which with fewer would cost more than its products. Its logits are then no larger
    than that gradient.
    """
    length = counted_SN.shape[1]
    size = min(max(1, width, CHUNK_LOGITS // vocabulary), math.ceil(length / CHUNKS))
    if size > CHUNK_UNIT:
        size += -size % CHUNK_UNIT
    order = jnp.argsort(~counted_SN, axis=1, stable=True)
    order = jnp.pad(order, [(0, 0), (0, -length % size)])
    return _Sorted(order, counted_SN.sum(axis=1).max(), size)


def _logits(hidden: Array, table: Array) -> Array:
    return jnp.einsum("snd,vd->snv", hidden, table, preferred_element_type=jnp.float32)


def _take(x: Array, places_SN: Array) -> Array:
    index = places_SN.reshape(*places_SN.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _written(x: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis=1)


def _lying(x: Array, sharding: Any) -> Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
