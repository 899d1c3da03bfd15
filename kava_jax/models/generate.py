"""Greedy decoding with a cache: one prefill, then one token per step, all inside one ``jit``.

Left out on purpose: sampling, because every score of this project uses greedy answers.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.masks import attention_mask, token_positions


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "eos_ids", "pad_id"))
def generate(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    prompt_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    past: KVCache | None = None,
) -> Int[Array, "B M"]:
    """Continue left-padded prompts greedily: int32 [B, max_new_tokens].

    A row ends at the first of ``eos_ids``, which stays in the output; ``pad_id`` fills the rest.
    Decoding stops as soon as every row has ended. ``past`` [L, B, T - 1, K, H], with keys after
    RoPE, is the cache of all prompt tokens but the last one, the only one that is then read.

    Raises KavaError for a past of other rows or length, or beyond the model's positions.
    """
    model = nnx.merge(graph, params)
    windows = model.spec.windows
    batch, length = prompt_BT.shape
    positions_BT = token_positions(valid_BT)
    mask = attention_mask(positions_BT, positions_BT, valid_BT, windows)
    lengths_B = valid_BT.sum(axis=1)
    # Cached keys are never rotated again, so every row uses the RoPE of its full length from the
    # start.
    read = partial(model, key_space="post_rope", lengths_B=lengths_B + max_new_tokens)
    if past is None:
        hidden_BTD, cache = read(prompt_BT, positions_BT, mask)
    else:
        if past.k.shape[1:3] != (batch, length - 1):
            raise KavaError(
                f"past: a cache of {past.k.shape[1]} rows of {past.k.shape[2]} tokens for a prompt "
                f"of {batch} rows of {length}; give all tokens of each row but the last"
            )
        if length > (most := model.spec.max_position_embeddings):
            raise KavaError(
                f"past: a prompt of {length} tokens for a model of "
                f"max_position_embeddings={most}; give a shorter one"
            )
        past = jax.tree.map(lambda x: x.astype(model.dtype), past)
        hidden_BTD, new = read(prompt_BT[:, -1:], positions_BT[:, -1:], mask[:, :, -1:], past=past)
        cache = jax.tree.map(lambda old, own: jnp.concatenate([old, own], axis=2), past, new)
    # The state of a while loop has fixed shapes, so the cache gets room for all new tokens now.
    room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0)]
    cache = jax.tree.map(lambda array: jnp.pad(array, room), cache)
    new_M = jnp.arange(max_new_tokens)
    # The cache has T slots for the prompt, then one for each new token. The position of new token i
    # is the prompt's number of real tokens plus i.
    slot_positions_BS = jnp.concatenate([positions_BT, lengths_B[:, None] + new_M[None, :]], axis=1)

    def next_token(hidden_BTD: Array) -> Int[Array, "B"]:
        return jnp.argmax(model.logits(hidden_BTD[:, -1]), axis=-1).astype(jnp.int32)

    def ended(token_B: Int[Array, "B"]) -> Bool[Array, "B"]:
        return jnp.isin(token_B, jnp.array(eos_ids, jnp.int32))

    # The state of the loop: number of the next token, last token, rows that have ended, cache, and
    # the output so far.
    def unfinished(state: tuple[Any, ...]) -> Bool[Array, ""]:
        step, _, done_B, *_ = state
        return (step < max_new_tokens) & ~jnp.all(done_B)

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token_B, done_B, cache, output_BM = state
        # The model appends the token's own key to the cache, so the token's slot counts as empty
        # until the next step.
        written_BM = jnp.broadcast_to(new_M[None, :] < step - 1, (batch, max_new_tokens))
        own_B1 = jnp.ones((batch, 1), bool)
        position_B1 = (lengths_B + step - 1)[:, None]
        mask = attention_mask(
            position_B1,
            jnp.concatenate([slot_positions_BS, position_B1], axis=1),
            jnp.concatenate([valid_BT, written_BM, own_B1], axis=1),
            windows,
        )
        hidden, new = read(token_B[:, None], position_B1, mask, past=cache)
        # Prompts are padded on the left, so all rows write their new token to the same slot.
        slot = length + step - 1
        cache = jax.tree.map(
            lambda old, add: jax.lax.dynamic_update_slice_in_dim(old, add, slot, axis=2), cache, new
        )
        token_B = jnp.where(done_B, pad_id, next_token(hidden))
        output_BM = output_BM.at[:, step].set(token_B)
        return step + 1, token_B, done_B | ended(token_B), cache, output_BM

    first_B = next_token(hidden_BTD)
    output_BM = jnp.full((batch, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(first_B)
    start = (jnp.array(1), first_B, ended(first_B), cache, output_BM)
    return jax.lax.while_loop(unfinished, advance, start)[-1]
