"""Losses on logits, token by token, without ever holding the logits of a whole batch.

[B, T, V] in float32 would be the largest array of the step by far, so the LM heads run over chunks
of tokens, and each chunk's logits are computed anew in the backward pass.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Decoder

# Logits of one chunk, per shard of the batch: 2**25 float32 are 128 MiB.
CHUNK_LOGITS = 2**25

ChunkLoss = Callable[[dict[str, Array], Array], Array]


def losses_of_next_token(
    batch: Batch,
    models: Mapping[str, tuple[Decoder, Float[Array, "B T D"]]],
    loss_of_chunk: ChunkLoss,
    *,
    batch_shards: int,
) -> Float[Array, "B U"]:
    """Loss of predicting token t + 1 at t, [B, T - 1].

    Args:
        batch: its tokens are the labels; ``batch.loss_mask[:, 1:]`` says which of them count.
        models: by name, a decoder with a head and its last hidden states.
        loss_of_chunk: from every model's logits [B, t, V] and the labels [B, t] to losses [B, t].
        batch_shards: over how many devices the batch is split; chunks are that much larger.
    """
    rows, length = batch.tokens.shape
    vocabulary = max(model.spec.vocab_size for model, _ in models.values())
    budget = CHUNK_LOGITS * batch_shards // (rows * vocabulary)
    chunks = math.ceil((length - 1) / max(1, budget))

    def losses(inputs: tuple[dict[str, Array], Array]) -> Array:
        hiddens, labels = inputs
        logits = {name: models[name][0].logits(hidden) for name, hidden in hiddens.items()}
        return loss_of_chunk(logits, labels)

    hiddens = {name: hidden[:, :-1] for name, (_, hidden) in models.items()}
    inputs = (hiddens, batch.tokens[:, 1:])
    if chunks == 1:
        return losses(inputs)
    split = jax.tree.map(lambda x: _split(x, chunks), inputs)
    parts = jnp.moveaxis(jax.lax.map(jax.checkpoint(losses), split), 0, 1)
    return parts.reshape(rows, -1)[:, : length - 1]


def _split(x: Array, chunks: int) -> Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...], zero-padded at the end."""
    size = math.ceil(x.shape[1] / chunks)
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, size * chunks - x.shape[1])
    padded = jnp.pad(x, pad).reshape(x.shape[0], chunks, size, *x.shape[2:])
    return jnp.moveaxis(padded, 1, 0)
