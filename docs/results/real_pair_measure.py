"""Held-out loss of a student, and its KL from the teacher, by test block; see real_pair.py."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kava_jax.data.batches import Batch, eval_batches
from kava_jax.data.example import Example
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import load_tokenizer
from kava_jax.hf.load import load_model
from kava_jax.models.masks import attention_mask, token_positions

WORK = Path("build/real_pair")
TEXTS = ("gsm8k", "tinystories")
# Test blocks of a text: rows of so many tokens, and so many of them at once.
BLOCKS, LENGTH, ROWS = 96, 128, 8


def measured(student: Path, teacher: Path) -> dict[str, Any]:
    """Held-out figures on both texts."""
    return {text: figures(student, text, teacher) for text in TEXTS}


def figures(student: Path, text: str, teacher: Path) -> dict[str, Any]:
    """Cross-entropy and KL(teacher || student) in nats on ``report``, as a whole and by block."""
    sides = zip(hidden_states(student, text), hidden_states(teacher, text), strict=True)
    sums = [compared(*side, batch) for batch, side in zip(blocks(text), sides, strict=True)]
    loss, kl, tokens = (np.concatenate(parts)[:BLOCKS] for parts in zip(*sums, strict=True))
    named = {"loss": loss, "kl": kl}
    whole = {name: rounded(own.sum() / tokens.sum()) for name, own in named.items()}
    by_block = {f"block_{name}": list(map(rounded, own / tokens)) for name, own in named.items()}
    return {"tokens": int(tokens.sum()), **whole, **by_block}


@functools.cache
def blocks(text: str) -> list[Batch]:
    """The test blocks of a text in batches, as numpy arrays."""
    lines = (WORK / "texts" / f"{text}_report.jsonl").read_text(encoding="utf-8").splitlines()
    encoder = Encoder(load_tokenizer(str(WORK / "teachers" / "original")), max_length=LENGTH)
    rows = encoder.encode_all([Example("", json.loads(line)["text"]) for line in lines])
    return list(eval_batches(rows[:BLOCKS], ROWS, max_length=LENGTH, bucket=LENGTH))


# The teacher's come again for every arm: of both texts they and a student's take 0.5 GB.
@functools.lru_cache(maxsize=4)
def hidden_states(model: Path, text: str) -> list[tuple[jax.Array, jax.Array]]:
    """By batch, a model's last hidden states [B, T, D] in float32, and its head [V, D]."""
    graph, params = load_model(model)

    @jax.jit
    def run(params: Any, batch: Batch) -> jax.Array:
        decoder = nnx.merge(graph, params)
        positions = token_positions(batch.valid)
        mask = attention_mask(positions, positions, batch.valid, decoder.spec.windows)
        return decoder(batch.tokens, positions, mask)[0]

    table = nnx.merge(graph, params).head_table()
    return [(run(params, batch), table) for batch in blocks(text)]


@jax.jit
def compared(
    student: tuple[jax.Array, jax.Array], teacher: tuple[jax.Array, jax.Array], batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over each row [B]: cross-entropy, KL(teacher || student), and tokens."""
    s, t = (jax.nn.log_softmax(hidden[:, :-1] @ table.T) for hidden, table in (student, teacher))
    keep = batch.loss_mask[:, 1:]
    loss = -jnp.take_along_axis(s, batch.tokens[:, 1:, None], -1)[..., 0]
    kl = (jnp.exp(t) * (t - s)).sum(-1)
    loss, kl = (jnp.where(keep, x, 0).sum(-1) for x in (loss, kl))
    return loss, kl, keep.sum(-1)


def rounded(value: Any) -> Any:
    """Five digits behind the point, far below what blocks differ by."""
    return None if value is None else round(float(value), 5)
