"""Training through the handoff, against models that only ever read what they should."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kava_jax.alignment.handoff import Handoff
from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import HandedOver, KVCache
from kava_jax.data.batches import Batch, collate
from kava_jax.data.text import Encoded
from kava_jax.models.decoder import Decoder
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import rotate_layers
from kava_jax.models.spec import DecoderSpec, Llama3RopeScaling
from kava_jax.training.handoff_term import HandoffTerm, handed_tokens
from tests.tolerances import TOL

BASE = {
    "family": "llama",
    "tie_embeddings": True,
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e4,
    "norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
LLAMA3 = Llama3RopeScaling(8.0, 1.0, 4.0, 8)
SPECS = {
    "biased": DecoderSpec(**BASE, qkv_bias=True),
    "window": DecoderSpec(**BASE, sliding_window=5),
    "normed": DecoderSpec(**BASE, qk_norm=True),
    "scaled": DecoderSpec(**BASE | {"tie_embeddings": False}, rope_scaling=LLAMA3),
}
READER = DecoderSpec(**BASE | {"num_layers": 3, "num_kv_heads": 4, "head_dim": 6}, qkv_bias=True)
# Prompts of 5, 3, 1 and no tokens; the second has four targets, and all but one are padded.
ROWS = ((12, 5), (7, 3), (9, 1), (6, 0))


@cache
def model(spec: DecoderSpec, seed: int = 0) -> Decoder:
    """Random weights, biases and norms too."""
    made = Decoder(spec, rngs=nnx.Rngs(seed))
    graph, state = nnx.split(made)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda x: x + jnp.float32(rng.normal(0, 0.1, x.shape)), state)
    return nnx.merge(graph, noisy)


@cache
def batch() -> Batch:
    rng = np.random.default_rng(1)
    rows = [Encoded(rng.integers(3, 61, n).astype(np.int32), p, False) for n, p in ROWS]
    return jax.tree.map(jnp.asarray, collate(rows, 12, pad_id=0, sink_tokens=0))


def read(decoder: Decoder, tokens, valid, **options):
    positions = token_positions(valid)
    mask = attention_mask(positions, positions, valid, decoder.spec.windows)
    return decoder(tokens, positions, mask, **options)


def random_cache(spec: DecoderSpec, rows: int, length: int) -> KVCache:
    shape = (spec.num_layers, rows, length, spec.num_kv_heads, spec.head_dim)
    rng = np.random.default_rng(2)
    return KVCache(*(jnp.float32(rng.normal(size=shape)) for _ in range(2)))


def test_the_last_token_of_the_prompt_and_the_answer_are_not_handed_over():
    found = np.asarray(handed_tokens(batch()))
    assert [list(np.flatnonzero(row)) for row in found] == [[0, 1, 2, 3], [0, 1], [], []]


@pytest.mark.parametrize("name", SPECS)
def test_what_is_handed_over_is_read_like_a_past(name):
    """Any cache, in place of the first tokens' own or as the past of a call without them."""
    spec, rows = SPECS[name], batch()
    decoder, given = model(spec), random_cache(spec, 4, 12)
    where = jnp.broadcast_to(handed_tokens(rows), (spec.num_layers, 4, 12))
    hidden, new = read(decoder, rows.tokens, rows.valid, past=HandedOver(given, where))
    for b, (length, prompt) in enumerate(ROWS):
        n = max(0, prompt - 1)
        past = jax.tree.map(lambda x, b=b, n=n: x[:, b : b + 1, :n], given)
        positions = jnp.arange(length)[None]
        mask = attention_mask(
            positions[:, n:], positions, jnp.ones((1, length), bool), spec.windows
        )
        alone, own = decoder(rows.tokens[b : b + 1, n:length], positions[:, n:], mask, past=past)
        np.testing.assert_allclose(
            hidden[b, n:length], alone[0], rtol=TOL["float32"], atol=TOL["float32"]
        )
        np.testing.assert_allclose(
            new.v[:, b, n:length], own.v[:, 0], rtol=TOL["float32"], atol=TOL["float32"]
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SPECS)
def test_its_own_cache_through_an_identity_is_reading_by_itself(name, side):
    spec, rows = SPECS[name], batch()
    decoder = model(spec)
    tokens, valid, where = rows.tokens, rows.valid, handed_tokens(rows)
    if side == "left":
        shift = [12 - length for length, _ in ROWS]
        tokens, valid, where = (
            jnp.stack([jnp.roll(row, n) for row, n in zip(x, shift, strict=True)])
            for x in (tokens, valid, where)
        )
    alone, own = read(decoder, tokens, valid, key_space="pre_rope")
    width = {"d_model": spec.num_kv_heads * spec.head_dim, "num_heads": spec.num_kv_heads}
    same = LayerMap((0, 1), ((0,), (1,)))
    handoff = Handoff(
        KVDimensionProjector(
            {"self": width | {"num_layers": 2}},
            width["d_model"],
            kind="identity",
            student_heads=spec.num_kv_heads,
            per_layer=True,
        ),
        {"self": same},
        {"self": 1.0},
    )
    given = handoff({"self": own}, decoder.rotation(token_positions(valid)))
    everywhere = jnp.broadcast_to(where, (2, *where.shape))
    handed, _ = read(decoder, tokens, valid, past=HandedOver(given, everywhere))
    counted = np.asarray(valid & ~where)
    difference = np.abs(decoder.logits(handed) - decoder.logits(alone)).max(axis=-1)
    assert difference[counted].max() < TOL["float32"]


def test_several_readers_are_averaged_and_mapped_layer_by_layer():
    spec, rng = SPECS["biased"], np.random.default_rng(4)
    teachers = {"a": READER, "b": SPECS["normed"]}
    shapes = {
        name: {
            "d_model": one.num_kv_heads * one.head_dim,
            "num_heads": one.num_kv_heads,
            "num_layers": 2,
        }
        for name, one in teachers.items()
    }
    projector = KVDimensionProjector(
        shapes, 16, kind="linear", student_heads=2, per_layer=True, rngs=nnx.Rngs(3)
    )
    maps = {"a": LayerMap((0, 1), ((2,), (0,))), "b": LayerMap((0, 1), ((0,), (1,)))}
    caches = {name: random_cache(one, 2, 5) for name, one in teachers.items()}
    rotation = model(spec).rotation(jnp.asarray(rng.integers(0, 30, (2, 5))))
    found = Handoff(projector, maps, {"a": 0.25, "b": 0.75})(caches, rotation)
    expected = {}
    for part in ("k", "v"):
        total = 0.0
        for name, share in (("a", 0.25), ("b", 0.75)):
            kernel, bias = (
                np.asarray(getattr(projector.pairs[name][part].out, leaf)[...], np.float64)
                for leaf in ("kernel", "bias")
            )
            source = np.asarray(getattr(caches[name], part), np.float64)
            for layer, (row,) in enumerate(maps[name].teacher_layers):
                flat = source[row].reshape(2, 5, -1) @ kernel[layer] + bias[layer]
                total = total + share * np.eye(2)[layer][:, None, None, None] * flat
        expected[part] = total.reshape(2, 2, 5, 2, 8)
    np.testing.assert_allclose(found.v, expected["v"], rtol=TOL["float32"], atol=TOL["float32"])
    keys = rotate_layers(jnp.float32(expected["k"]), rotation)
    np.testing.assert_allclose(found.k, keys, rtol=TOL["float32"], atol=TOL["float32"])


def term(share: float, reader: str = "teacher") -> HandoffTerm:
    graph = nnx.split(KVDimensionProjector({"a": {"d_model": 4}}, 4, kind="identity"))[0]
    return HandoffTerm(graph, {}, {}, reader, optax.constant_schedule(1.0), share)


def test_as_many_rows_are_read_alone_in_every_step_and_nothing_else_is_compared():
    rows = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch())
    drawn = []
    for seed in range(20):
        dealt, handed = term(0.25).dealt(jax.random.key(seed), rows)
        assert int(handed.sum()) == 6
        np.testing.assert_array_equal(dealt.kv_mask, rows.kv_mask & ~handed[:, None])
        np.testing.assert_array_equal(dealt.loss_mask, rows.loss_mask)
        drawn.append(np.asarray(handed))
    # Every row is drawn sometimes, and is not drawn sometimes.
    assert 0 < np.mean(drawn, axis=0).min() <= np.mean(drawn, axis=0).max() < 1
    dealt, handed = term(0.25, "student").dealt(jax.random.key(0), rows)
    assert handed.all()
    np.testing.assert_array_equal(dealt.kv_mask, rows.kv_mask)
