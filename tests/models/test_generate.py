"""Cached greedy decoding against recomputing everything, and its cost by counting products."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.models.decoder import Decoder
from kava_jax.models.generate import generate
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.spec import DecoderSpec

NEW, PAD = 9, 39
SPEC = DecoderSpec(
    family="qwen2",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=100.0,
    norm_eps=1e-6,
    tie_embeddings=False,
    qkv_bias=True,
    initializer_range=0.8,
)
LENGTHS = (8, 3, 5)


def prompts() -> tuple[jax.Array, jax.Array]:
    tokens = np.random.default_rng(0).integers(0, 39, (3, 8)).astype(np.int32)
    valid = np.arange(8)[None] >= 8 - np.array(LENGTHS)[:, None]
    return jnp.asarray(np.where(valid, tokens, PAD), jnp.int32), jnp.asarray(valid)


@partial(jax.jit, static_argnames=("graph", "window"))
def next_tokens(graph, params, tokens, window):
    """The greedy token after every position of one row, right-padded: nothing is cached."""
    valid = jnp.ones(tokens.shape, bool)
    positions = token_positions(valid)
    model = nnx.merge(graph, params)
    hidden, _ = model(tokens, positions, attention_mask(positions, positions, valid, (window,)))
    return jnp.argmax(model.logits(hidden), axis=-1)


def naive(graph, params, window: int | None) -> np.ndarray:
    """Each row by itself, without padding on its left, the whole row read again for every token."""
    tokens, _ = prompts()
    rows = []
    for row, length in zip(np.asarray(tokens), LENGTHS, strict=True):
        text = list(row[8 - length :])
        for _ in range(NEW):
            padded = np.zeros((1, 8 + NEW), np.int32)
            padded[0, : len(text)] = text
            found = next_tokens(graph, params, jnp.asarray(padded), window)
            text.append(int(found[0, len(text) - 1]))
        rows.append(text[length:])
    return np.array(rows)


@pytest.mark.parametrize("window", [None, 4])
def test_greedy_tokens_equal_naive_recomputation_and_stop_at_eos(window: int | None) -> None:
    spec = DecoderSpec(**{**vars(SPEC), "sliding_window": window})
    graph, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(4)))
    params = nnx.to_pure_dict(state)
    want = naive(graph, params, window)
    assert all(len(set(row.tolist())) > 2 for row in want)  # not one token over and over
    run = partial(generate, graph, params, *prompts(), max_new_tokens=NEW, pad_id=PAD)
    np.testing.assert_array_equal(run(eos_ids=()), want)
    if window is None:
        # Ends: row 0 at its third token, row 1 perhaps never; two ids end a row.
        eos = (int(want[0, 2]), int(want[1, 4]))
        ended = want.copy()
        for row in ended:
            places = np.flatnonzero(np.isin(row, eos))
            if len(places):
                row[places[0] + 1 :] = PAD
        assert (ended != want).any()
        np.testing.assert_array_equal(run(eos_ids=eos), ended)
        # Every row ends at once: nothing but the first token is ever written.
        first = tuple(int(token) for token in want[:, 0])
        assert (np.asarray(run(eos_ids=first))[:, 1:] == PAD).all()


def inner_jaxprs(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def products(jaxpr) -> int:
    """Multiplications of all matrix products, those of a scan times its length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in inner_jaxprs(equation))
    return total


def decoding_loop(jaxpr):
    """The body of the one while loop, wherever it is nested."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            found.append(equation.params["body_jaxpr"].jaxpr)
        else:
            found += [loop for inner in inner_jaxprs(equation) for loop in decoding_loop(inner)]
    return found


@pytest.mark.parametrize("length", [8, 64])
def test_a_new_token_costs_one_token_and_its_look_at_the_cache(length: int) -> None:
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(SPEC, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)
    jaxpr = jax.make_jaxpr(
        lambda params, tokens, valid: generate(
            graph, params, tokens, valid, max_new_tokens=NEW, eos_ids=(1,), pad_id=PAD
        )
    )(params, *(jax.ShapeDtypeStruct((3, length), kind) for kind in (jnp.int32, jnp.bool_)))
    bodies = [body for body in decoding_loop(jaxpr.jaxpr) if products(body)]
    assert len(bodies) == 1
    # Per layer q, k, v, o (4 + 2 + 2 + 4 heads of 8, width 16), the MLP's three, scores and sums.
    layer = 16 * 8 * (4 + 2 + 2 + 4) + 3 * 16 * 24 + 2 * 4 * 8 * (length + NEW + 1)
    assert products(bodies[0]) == 3 * (2 * layer + 16 * 40)
