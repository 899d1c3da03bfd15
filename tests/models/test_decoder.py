"""The decoder against itself run another way: loops, cuts, padding, a past, recomputation."""

from functools import partial
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.cache import KVCache
from kava_jax.models.attend import attend
from kava_jax.models.decoder import Decoder
from kava_jax.models.layers import MLP, Attention, Block, Dtypes
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import rope_frequencies, rope_rotations, rotate_layers
from kava_jax.models.spec import DecoderSpec, Llama3RopeScaling
from tests.tolerances import TOL

SPEC = DecoderSpec(
    family="qwen3",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=100.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    initializer_range=0.2,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 10)), jnp.int32)
ALL = jnp.ones((2, 10), bool)


def build(**options) -> Decoder:
    """A random decoder, norms near 1; only its shapes are traced, which saves compiling."""
    spec = options.pop("spec", SPEC)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0), **options)))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        mean = float(path[-1].key == "scale")
        return jnp.asarray(mean + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    values = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(abstract))
    return nnx.merge(graph, values)


def inputs(valid: jax.Array, *windows: int | None) -> tuple[jax.Array, jax.Array]:
    positions = token_positions(valid)
    return positions, attention_mask(positions, positions, valid, windows or (None,))


@partial(jax.jit, static_argnames=("graph", "key_space"))
def forward(graph, params, tokens, valid, key_space):
    model = nnx.merge(graph, params)
    return model(tokens, *inputs(valid, *model.spec.windows), key_space=key_space)


def run(model: Decoder, tokens=TOKENS, valid=ALL, key_space="pre_rope"):
    return forward(*nnx.split(model), tokens, valid, key_space)


@partial(jax.jit, static_argnames="graph")
def forward_with_queries(graph, params):
    model = nnx.merge(graph, params)
    keep = attrgetter("pre_rope", "v", "q")
    hidden, (k, v, queries) = model.keeping(TOKENS, *inputs(ALL), keep, by_mask=True)
    return hidden, KVCache(k, v), queries


def run_with_queries(model: Decoder):
    return forward_with_queries(*nnx.split(model))


def assert_close(left, right, tolerance: str = "rearranged") -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOL[tolerance]), left, right)


def test_scanned_layers_equal_a_loop_over_them() -> None:
    model = build()
    hidden, cache = run(model)
    post = run(model, key_space="post_rope")[1]
    positions, mask = inputs(ALL)
    rotation = jax.tree.map(lambda part: part[0], rope_rotations(SPEC, positions))
    graph, layers = nnx.split(model.blocks)
    x = model.embed.embedding[...][TOKENS]
    for i in range(SPEC.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], layers))
        x, new = block(x, rotation, mask, None, attend)
        assert_close((new.pre_rope, new.post_rope, new.v), (cache.k[i], post.k[i], cache.v[i]))
    assert_close(hidden, model.final_norm(x))
    assert hidden.shape == (2, 10, 16)
    assert cache.k.shape == cache.v.shape == (3, 2, 10, 2, 6)


def test_a_seed_draws_attention_before_the_mlp() -> None:
    """As it always has: a run from random weights can be repeated by a later version."""
    dtypes = Dtypes(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))
    block = Block(SPEC, MLP, dtypes=dtypes, rngs=nnx.Rngs(7))
    rngs = nnx.Rngs(7)
    for name, part in (("attention", Attention), ("mlp", MLP)):
        alone = nnx.state(part(SPEC, dtypes=dtypes, rngs=rngs))
        jax.tree.map(np.testing.assert_array_equal, nnx.state(getattr(block, name)), alone)


def test_keys_after_rope_are_the_rotated_keys() -> None:
    model = build()
    before, after = run(model)[1], run(model, key_space="post_rope")[1]
    np.testing.assert_array_equal(before.v, after.v)
    # Independently: pair (i, i + 3) of position p as a complex number, turned by p * theta^(-i/3).
    angle = np.arange(10)[:, None] * 100.0 ** -(np.arange(3) / 3)
    turned = (np.asarray(before.k[..., :3]) + 1j * np.asarray(before.k[..., 3:])) * np.exp(
        1j * angle
    )[None, None, :, None, :]
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(after.k, want, atol=TOL["float32"])
    assert_close(rotate_layers(before.k, model.rotation(token_positions(ALL))), after.k)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_cut_teacher_writes_the_caches_of_the_whole(blocks: int) -> None:
    whole = build()
    cut = build(blocks=blocks, tail=True, head=False)
    source = nnx.to_pure_dict(nnx.state(whole))
    target = nnx.to_pure_dict(nnx.state(cut))
    assert "final_norm" not in target
    assert "head" not in target
    kept = {"embed": source["embed"]}
    if blocks:
        kept["blocks"] = jax.tree.map(lambda w: w[:blocks], source["blocks"])
    layer = jax.tree.map(lambda w: w[blocks], source["blocks"])
    names = ("q", "k", "v", "q_norm", "k_norm")
    attention = {name: layer["attention"][name] for name in names}
    kept["tail"] = {"attention_norm": layer["attention_norm"], "attention": attention}
    assert jax.tree.structure(kept) == jax.tree.structure(target)
    nnx.update(cut, kept)
    full, part = run(whole)[1], run(cut)[1]
    assert_close(part, jax.tree.map(lambda x: x[: blocks + 1], full))
    queries = [run_with_queries(model)[2] for model in (whole, cut)]
    assert_close(queries[1], queries[0][: blocks + 1])


def test_queries_of_the_first_layer_written_out() -> None:
    model = build()
    layer = jax.tree.map(
        lambda w: np.asarray(w[0], np.float64), nnx.to_pure_dict(nnx.state(model))["blocks"]
    )
    hidden, cache, queries = run_with_queries(model)
    assert_close((hidden, cache), run(model))

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale

    x = rms(
        np.asarray(model.embed.embedding[...], np.float64)[TOKENS], layer["attention_norm"]["scale"]
    )
    q, norm = layer["attention"]["q"], layer["attention"]["q_norm"]["scale"]
    q = rms(np.einsum("btd,dnh->btnh", x, q["kernel"]) + q["bias"], norm)
    angle = np.arange(10)[:, None] * 100.0 ** -(np.arange(3) / 3)
    turned = (q[..., :3] + 1j * q[..., 3:]) * np.exp(1j * angle)[None, :, None, :]
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(queries[0], want, atol=TOL["float32"])


def test_key_bias_is_what_keys_of_zero_input_are() -> None:
    spec = DecoderSpec(**{**vars(SPEC), "qk_norm": False})
    model = build(spec=spec, blocks=2, tail=True, head=False)
    bias = model.key_bias()
    assert bias is not None
    for norm in (model.blocks.attention_norm, model.tail.attention_norm):
        norm.scale[...] = jnp.zeros_like(norm.scale[...])
    keys, bare = run(model)[1].k, run(model, key_space="pre_bias")[1].k
    assert_close(keys, jnp.broadcast_to(bias[:, None, None], keys.shape))
    np.testing.assert_array_equal(bare, 0)


@pytest.mark.parametrize(("norm", "bias"), [(True, True), (False, False)])
def test_keys_without_a_bias_of_their_own_are_those_before_rope(norm: bool, bias: bool) -> None:
    # A key norm comes after the bias, which is then no part of the key that could be taken out.
    model = build(spec=DecoderSpec(**{**vars(SPEC), "qk_norm": norm, "qkv_bias": bias}))
    assert model.key_bias() is None
    bare, keys = run(model, key_space="pre_bias")[1].k, run(model)[1].k
    np.testing.assert_array_equal(bare, keys)


@pytest.mark.parametrize("window", [None, 4])
def test_padding_on_either_side_changes_nothing(window: int | None) -> None:
    spec = DecoderSpec(**{**vars(SPEC), "sliding_window": window})
    model = build(spec=spec)
    lengths = (6, 10)
    for side in ("left", "right"):
        columns = np.arange(10)[None]
        ends = np.array(lengths)[:, None]
        valid = columns >= 10 - ends if side == "left" else columns < ends
        tokens = np.zeros((2, 10), np.int32)
        for row, n in enumerate(lengths):
            tokens[row, valid[row]] = np.asarray(TOKENS)[row, :n]
        hidden, cache = run(model, jnp.asarray(tokens), jnp.asarray(valid), "post_rope")
        for row, n in enumerate(lengths):
            alone = run(model, TOKENS[row : row + 1, :n], jnp.ones((1, n), bool), "post_rope")
            real = np.asarray(valid)[row]
            assert_close(hidden[row, real], alone[0][0])
            assert_close(
                jax.tree.map(lambda x, r=row, m=real: x[:, r, m], cache),
                jax.tree.map(lambda x: x[:, 0], alone[1]),
            )


def test_a_row_without_any_token_is_finite_and_so_is_its_gradient() -> None:
    graph, params = nnx.split(build())
    valid = ALL.at[0].set(False)

    def total(params):
        hidden, cache = run(nnx.merge(graph, params), valid=valid)
        return jnp.sum(hidden**2) + jnp.sum(cache.k**2), (hidden, cache)

    grads, outputs = jax.jit(jax.grad(total, has_aux=True))(params)
    for leaf in jax.tree.leaves((grads, outputs)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("window", [None, 4])
def test_a_sliding_window_sees_only_so_far_and_a_past_continues_exactly(window) -> None:
    spec = DecoderSpec(**{**vars(SPEC), "sliding_window": window})
    model = build(spec=spec)
    valid = ALL.at[0, :3].set(False)  # left padding in one row
    positions, mask = inputs(valid, window)
    hidden, cache = model(TOKENS, positions, mask, key_space="post_rope")
    past: KVCache | None = None
    parts = []
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        part, new = model(
            TOKENS[:, start:stop],
            positions[:, start:stop],
            mask[:, :, start:stop, :stop],
            past=past,
            key_space="post_rope",
        )
        assert new.k.shape[2] == stop - start
        parts.append(part)
        past = new if past is None else jax.tree.map(lambda *x: jnp.concatenate(x, 2), past, new)
    joined = jnp.concatenate(parts, axis=1)
    assert_close(joined[valid], hidden[valid])
    assert_close(
        jax.tree.map(lambda x: x[:, valid], past), jax.tree.map(lambda x: x[:, valid], cache)
    )


def test_masks_by_hand() -> None:
    valid = jnp.asarray([[0, 1, 1, 1], [1, 1, 1, 0]], bool)
    positions = token_positions(valid)
    np.testing.assert_array_equal(positions, [[0, 0, 1, 2], [0, 1, 2, 2]])
    mask = attention_mask(positions, positions, valid)
    np.testing.assert_array_equal(mask[0, 0, 1:], [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(mask[1, 0, :3], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    mask = attention_mask(positions, positions, valid, (2,))
    np.testing.assert_array_equal(mask[0, 0, 1:], [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])


def test_the_window_reaches_back_layer_by_layer() -> None:
    # Two layers that see 2 tokens each see 3 together: token 0 no longer touches token 3.
    model = build(spec=DecoderSpec(**{**vars(SPEC), "num_layers": 2, "sliding_window": 2}))
    changed = TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % 40)
    difference = np.abs(np.asarray(run(model)[0] - run(model, changed)[0])).max(axis=(0, 2))
    assert (difference[:3] > TOL["rearranged"]).all()
    np.testing.assert_array_equal(difference[3:], 0)


def test_recomputation_changes_neither_value_nor_gradient() -> None:
    found = {}
    for policy in ("none", "dots", "full"):
        graph, params = nnx.split(build(remat=policy))

        def total(params, graph=graph):
            hidden, cache = run(nnx.merge(graph, params))
            return jnp.mean(hidden**3) + jnp.mean(cache.k * cache.v)

        value, grads = jax.jit(jax.value_and_grad(total))(params)
        found[policy] = value, nnx.to_pure_dict(grads)
        text = str(jax.make_jaxpr(jax.grad(total))(params))
        assert ("remat" in text or "checkpoint" in text) == (policy != "none")
    assert_close(found["none"], found["dots"])
    assert_close(found["none"], found["full"])


def test_bf16_computes_in_bf16_over_float32_parameters() -> None:
    graph, params = nnx.split(build(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def total(params):
        model = nnx.merge(graph, params)
        hidden, cache = run(model)
        logits = model.logits(hidden)
        assert {x.dtype for x in (hidden, cache.k, cache.v)} == {jnp.dtype("bfloat16")}
        assert logits.dtype == jnp.float32
        return jnp.mean(logits**2), hidden

    grads, hidden = jax.grad(total, has_aux=True)(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    wide = run(build())[0]
    error = jnp.linalg.norm(hidden.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
    assert 0 < error < TOL["bf16_model"]


def test_a_teacher_can_be_kept_in_bf16() -> None:
    model = Decoder(SPEC, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}


def test_logits_tied_and_untied() -> None:
    tied = build()
    hidden = run(tied)[0]
    table = np.asarray(tied.embed.embedding[...], np.float64)
    want = np.asarray(hidden, np.float64) @ table.T
    np.testing.assert_allclose(tied.logits(hidden), want, atol=TOL["float32"])
    untied = build(spec=DecoderSpec(**{**vars(SPEC), "tie_embeddings": False}))
    want = np.asarray(hidden, np.float64) @ np.asarray(untied.head.kernel[...], np.float64)
    np.testing.assert_allclose(untied.logits(hidden), want, atol=TOL["float32"])


def test_llama3_frequencies() -> None:
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    spec = DecoderSpec(**{**vars(SPEC), "head_dim": 16, "rope_scaling": scaling})
    want = []
    for i in range(8):
        frequency = 100.0 ** (-2 * i / 16)
        wavelength = 2 * np.pi / frequency
        if wavelength < 64 / 4.0:
            want.append(frequency)
        elif wavelength > 64 / 1.0:
            want.append(frequency / 8.0)
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            want.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    plain = 100.0 ** (-np.arange(8) / 8)
    kinds = {"kept": want[0] == plain[0], "divided": np.isclose(want[-1], plain[-1] / 8)}
    assert all(kinds.values())
    found = rope_frequencies(spec.ropes[0], jnp.array([10]))[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=TOL["float32"])
    between = (found < 0.99 * plain) & (found > 1.01 * plain / 8)
    assert between.any()


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (0, 2), (2,), (0, 1, 2)])
@pytest.mark.parametrize("tail", [False, True])
def test_only_wanted_layers_are_kept(wanted: tuple[int, ...], tail: bool) -> None:
    """Gathered from all of them, bit for bit; also where layers follow the last one."""
    model = build(blocks=2, tail=True, head=False) if tail else build()
    positions, mask = inputs(ALL)
    hidden, cache = model(TOKENS, positions, mask)
    fewer_hidden, fewer = model(TOKENS, positions, mask, layers=wanted)
    np.testing.assert_array_equal(fewer_hidden, hidden)
    for kept, whole in zip(fewer, cache, strict=True):
        np.testing.assert_array_equal(kept, whole[np.array(wanted)])
