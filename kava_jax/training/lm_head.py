"""Losses per token on logits, without storing the logits of a whole batch.

Float32 logits [B, T, V] would be by far the largest array of the step, so the LM heads run over
chunks of tokens. Tokens without a loss (prompts, padding) are sorted to the end and never reach a
head. Each token's weight is known before its logits are computed, so one pass gives both the loss
and its gradient. No logits are stored, and none are computed twice.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kava_jax.parallel.sharding import Layouts

# A chunk may have at least this many logits per shard of the batch: 2**25 float32 are 128 MiB.
CHUNK_LOGITS = 2**25
# Use at least this many chunks. The chunk where the counted tokens end also computes some uncounted
# ones, and smaller chunks waste less there.
CHUNKS = 4
# Longer chunks are rounded up to a multiple of this, which matrix units handle best.
CHUNK_UNIT = 128

LossOfLogits = Callable[[dict[str, Array], Array], Array]


class Head(NamedTuple):
    """One model's logits: ``hidden @ table.T``, multiplied in the dtype of ``hidden``."""

    hidden: Float[Array, "B U D"]
    table: Float[Array, "V D"]


class _Sorted(NamedTuple):
    """Token indices of each shard [S, N], counted tokens first."""

    order: Int[Array, "S N"]
    needed: Int[Array, ""]
    """The largest number of counted tokens of any shard."""
    size: int
    """Tokens per chunk; it divides N."""

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
    """``sum(weights * losses)`` over counted tokens, and the losses (0 for uncounted tokens).

    Only the sum has gradients, in ``learner`` and ``weights_BUK``. The returned losses have none.

    Args:
        learner: the student; ``loss_of_logits`` gets its logits as ``student``.
        others: other models for the loss to compare with, by name.
        labels_BU: the ids to predict.
        counted_BU: which tokens have losses.
        weights_BUK: the weight of each of a token's K losses.
        loss_of_logits: from every model's logits [S, n, V] and labels [S, n] to losses [S, n, K].
        shards: the number of devices that the rows are split over.
        layouts: shardings on the mesh.
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
    """Losses of all tokens, and the gradient of their weighted sum with respect to the learner."""

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
        # Padding of the last chunk repeats token 0; its loss must not count.
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
        # The second condition is always true before the first one fails. It gives the loop a static
        # bound, which plan.program reads to count the FLOPs.
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
    # Back to the original order of tokens. Chunks that never ran left zeros.
    back = jnp.argsort(tokens.order[:, : student.shape[1]], axis=1)
    losses = _take(losses, back).reshape(weights_BUK.shape)
    if not with_gradient:
        return losses, None
    of_hidden = _take(gradient[0], back).reshape(learner.hidden.shape)
    of_table = gradient[1].sum(axis=0).astype(learner.table.dtype)
    return losses, Head(of_hidden, of_table)


def _sorted(counted_SN: Array, vocabulary: int, width: int) -> _Sorted:
    """Sort counted tokens first and choose the chunk size.

    A chunk has at least ``width`` tokens, if the batch is long enough. Each chunk adds to the
    gradient of the whole table [V, width]; with fewer tokens, reading and writing that array would
    cost more than the chunk's matrix products. A chunk of ``width`` tokens has V * width logits, as
    many as the gradient has entries.
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
