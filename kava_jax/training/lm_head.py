"""Losses per token on logits, without storing the logits of a whole batch.

Float32 logits [B, T, V] would be by far the largest array of the step, so the LM heads run over
chunks of tokens. Tokens without a loss (prompts, padding) are sorted to the end and never reach a
head. Each token's weight is known before its logits are computed, so one pass gives both the loss
and its gradient. No logits are stored, and none are computed twice.

The gradient is written out. Automatic differentiation of the same chunks under ``jax.checkpoint``
computes the logits twice. At the sizes of a training step it took 1.2 to 1.6 times as long on a
(busy) CPU, and an H100's compiler plans 1.8 to 2.0 times the temporaries for it
(docs/results/lm_head.json).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

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

# One model's hidden states [B, U, D] and table [V, D]; both D and V are its own. Its logits are
# ``hidden @ table.T``, multiplied in the dtype of ``hidden``.
Head = tuple[Array, Array]
LossOfLogits = Callable[[dict[str, Array], Array], Array]


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
    table_learns: bool = True,
) -> tuple[Float[Array, ""], Float[Array, "B U K"]]:
    """``sum(weights * losses)`` over counted tokens, and the losses (0 for uncounted tokens).

    Only the sum has a gradient, in ``learner`` alone. The returned losses have none.

    Args:
        learner: the student; ``loss_of_logits`` gets its logits as ``student``.
        others: other models for the loss to compare with, by name.
        labels_BU: the ids to predict.
        counted_BU: which tokens have losses.
        weights_BUK: the weight of each of a token's K losses.
        loss_of_logits: from every model's logits [S, n, V] and labels [S, n] to losses [S, n, K].
        shards: the number of devices that the rows are split over.
        layouts: shardings on the mesh.
        table_learns: whether the learner's table has a gradient; its hidden states always have.
    """
    # Rows are regrouped by shard below, which takes a number that divides them. The rows of a small
    # batch may not be a multiple of the devices.
    even = math.gcd(shards, labels_BU.shape[0])
    constants = jax.lax.stop_gradient((learner, weights_BUK, dict(others)))
    static = (loss_of_logits, even, layouts, table_learns)
    losses, gradient = _run(*static, *constants, labels_BU, counted_BU)
    return _sloped(learner, (weights_BUK * losses).sum(), gradient), losses


@jax.custom_vjp
def _sloped(learner: Head, value: Array, gradient: tuple[Array, Array | None]) -> Array:
    """``value`` with the gradient that was computed beside it, in ``learner`` alone."""
    # Where the gradient is not asked for, the compiler drops it from the loop.
    return value


def _scaled(gradient: tuple[Array, Array | None], slope: Array) -> Any:
    return jax.tree.map(lambda g: (slope * g).astype(g.dtype), gradient), None, None


_sloped.defvjp(lambda learner, value, gradient: (value, gradient), _scaled)


def _run(
    loss_of_logits: LossOfLogits,
    shards: int,
    layouts: Layouts | None,
    table_learns: bool,
    learner: Head,
    weights_BUK: Array,
    others: Mapping[str, Head],
    labels_BU: Array,
    counted_BU: Array,
) -> tuple[Array, tuple[Array, Array | None]]:
    """Losses of all tokens, and the gradient of their weighted sum with respect to the learner."""

    def by_shard(x: Array) -> Array:
        return _lying(x.reshape(shards, -1, *x.shape[2:]), layouts and layouts.rows)

    heads = {"student": learner, **others}
    hiddens = {name: by_shard(hidden) for name, (hidden, _) in heads.items()}
    tables = {
        name: _lying(table.astype(hidden.dtype), layouts and layouts.head)
        for name, (hidden, table) in heads.items()
    }
    labels, weights, counted = map(by_shard, (labels_BU, weights_BUK, counted_BU))
    length, width = hiddens["student"].shape[1:]
    size = _chunk_size(length, max(table.shape[0] for table in tables.values()), width)
    # Token indices of each shard [S, N], counted tokens first.
    order = jnp.argsort(~counted, axis=1, stable=True)
    padded = jnp.pad(order, [(0, 0), (0, -length % size)])
    # All shards run one program, so the shard with the most counted tokens sets the chunks of all.
    needed = counted.sum(axis=1).max()

    def chunk(state: tuple[Any, ...]) -> tuple[Any, ...]:
        number, losses, of_hidden, of_table = state
        start = number * size
        places = jax.lax.dynamic_slice_in_dim(padded, start, size, axis=1)
        taken = {name: _take(hidden, places) for name, hidden in hiddens.items()}
        logits = {
            name: jnp.einsum(
                "snd,vd->snv", taken[name], tables[name], preferred_element_type=jnp.float32
            )
            for name in taken
        }
        # Padding of the last chunk repeats token 0; its loss must not count.
        inside = start + jnp.arange(size) < length
        kept = _take(counted, places) & inside[None, :]

        def weighted(own: Array) -> tuple[Array, Array]:
            found = loss_of_logits(logits | {"student": own}, _take(labels, places))
            found = jnp.where(kept[..., None], found, 0.0)
            return (_take(weights, places) * found).sum(), found

        slopes, found = jax.grad(weighted, has_aux=True)(logits["student"])
        slopes = slopes.astype(taken["student"].dtype)
        new = jnp.einsum("snv,vd->snd", slopes, tables["student"])
        # This one sums over all chunks, so it is kept in float32. The hidden states' gradient is
        # written once per token, in their own dtype.
        if table_learns:
            of_table += jnp.einsum(
                "snv,snd->svd", slopes, taken["student"], preferred_element_type=jnp.float32
            )
        return number + 1, _written(losses, found, start), _written(of_hidden, new, start), of_table

    def unfinished(state: tuple[Any, ...]) -> Array:
        # The second condition is always true before the first one fails. It gives the loop a static
        # bound, which plan.program reads to count the FLOPs.
        return (state[0] * size < needed) & (state[0] < padded.shape[1] // size)

    # How many chunks are needed depends on the data. A scan would always run all of them.
    _, losses, of_hidden, of_table = jax.lax.while_loop(
        unfinished,
        chunk,
        (
            jnp.zeros((), jnp.int32),
            jnp.zeros((*padded.shape, weights.shape[-1])),
            jnp.zeros((*padded.shape, width), learner[0].dtype),
            _lying(jnp.zeros((shards, *learner[1].shape)), layouts and layouts.head_gradients)
            if table_learns
            else None,
        ),
    )
    # Back to the original order of tokens. Chunks that never ran left zeros.
    back = jnp.argsort(order, axis=1)
    gradient = (
        _take(of_hidden, back).reshape(learner[0].shape),
        # Shards add up only here: within the loop every chunk would send a whole table.
        of_table.sum(axis=0).astype(learner[1].dtype) if table_learns else None,
    )
    return _take(losses, back).reshape(weights_BUK.shape), gradient


def _chunk_size(length: int, vocabulary: int, width: int) -> int:
    """Tokens per chunk.

    A chunk has at least ``width`` tokens, if the batch is long enough. Each chunk adds to the
    gradient of the whole table [V, width]; with fewer tokens, reading and writing that array would
    cost more than the chunk's matrix products. A chunk of ``width`` tokens has V * width logits, as
    many as the gradient has entries.
    """
    size = min(max(1, width, CHUNK_LOGITS // vocabulary), math.ceil(length / CHUNKS))
    return size + -size % CHUNK_UNIT if size > CHUNK_UNIT else size


def _take(x: Array, places_SN: Array) -> Array:
    index = places_SN.reshape(*places_SN.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _written(x: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis=1)


def _lying(x: Array, sharding: Any) -> Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
