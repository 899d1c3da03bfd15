"""Heads that are turned compute the same; heads that are copies merge without a loss."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from scipy.linalg import expm
from scipy.stats import ortho_group

from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.merge import Turns, find_turns, turned
from kava_jax.hf.names import parameter_shapes
from kava_jax.models.decoder import Decoder
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.spec import DecoderSpec
from tests.tiny_models import CONFIGS
from tests.tolerances import TOL

# With 4 KV heads, so that there are groups of two; biases, scaled RoPE and a window at once, which
# no family has together.
BIASED = {**CONFIGS["llama_biased"], "num_attention_heads": 8, "num_key_value_heads": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SPECS = {
    "plain": spec_from_config(BIASED, where="plain"),
    "yarn": spec_from_config(BIASED | {"rope_scaling": YARN}, where="yarn"),
    "qwen3": spec_from_config(
        CONFIGS["qwen3"] | {"num_attention_heads": 8, "num_key_value_heads": 4}, where="qwen3"
    ),
}
TOKENS = np.random.default_rng(5).integers(3, 97, (2, 24))


def random_params(spec: DecoderSpec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        path: rng.normal(0, 0.3 if "bias" in path else 0.15, shape) + ("norm" in path)
        for path, shape in parameter_shapes(spec).items()
    }


def logits(spec: DecoderSpec, flat: dict[str, np.ndarray], window: int | None = 7) -> np.ndarray:
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
    params = {path: jnp.asarray(x, jnp.float32) for path, x in flat.items()}
    nnx.replace_by_pure_dict(state, unflatten_dict(params, sep="/"))
    model = nnx.merge(graph, state)
    valid = jnp.ones(TOKENS.shape, bool)
    positions = token_positions(valid)
    mask = attention_mask(positions, positions, valid, (window,))
    return np.asarray(model.logits(model(jnp.asarray(TOKENS), positions, mask)[0]))


def attention_of(flat: dict[str, np.ndarray], module: str, layer: int) -> np.ndarray:
    """Kernel and bias of one layer, as ``find_turns`` takes them."""
    kernel = flat[f"blocks/attention/{module}/kernel"][layer]
    bias = flat.get(f"blocks/attention/{module}/bias")
    return kernel if bias is None else np.concatenate([kernel, bias[layer][None]])


def all_turned(flat, spec, turns: list[Turns]) -> dict[str, np.ndarray]:
    """Every layer turned and nothing merged."""
    group = spec.num_heads // spec.num_kv_heads
    queries = [n // group for n in range(spec.num_heads)]
    result = dict(flat)
    for path in flat:
        module, leaf = path.split("/")[-2:]
        if module in ("q", "k", "v") or (module, leaf) == ("o", "kernel"):
            owners = range(spec.num_kv_heads) if module in ("k", "v") else queries
            layers = zip(flat[path], turns, strict=True)
            result[path] = np.stack([turned(path, part, own, owners) for part, own in layers])
    return result


def found(flat, spec, left: int) -> list[Turns]:
    layers = range(spec.num_layers)
    pairs = [[attention_of(flat, module, layer) for module in ("k", "v")] for layer in layers]
    return [find_turns(k, v, left, turn_keys=not spec.qk_norm) for k, v in pairs]


def random_turns(spec: DecoderSpec, seed: int) -> list[Turns]:
    rng = np.random.default_rng(seed)
    heads, width = spec.num_kv_heads, spec.head_dim
    return [
        Turns(
            np.exp(1j * rng.uniform(0, 2 * np.pi, (heads, width // 2))),
            ortho_group.rvs(width, heads, random_state=rng),
        )
        for _ in range(spec.num_layers)
    ]


@pytest.mark.parametrize("name", ["plain", "yarn"])
def test_any_turn_leaves_the_logits(name):
    """Biases, scaled RoPE, a window: what is turned at random computes the same."""
    spec = SPECS[name]
    flat = random_params(spec)
    before = logits(spec, flat)
    after = logits(spec, all_turned(flat, spec, random_turns(spec, 1)))
    assert np.abs(before).max() > 1
    assert np.abs(after - before).max() < TOL["float32"]


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("left", [1, 2, 4])
def test_turned_but_not_merged_is_the_teacher(name, left):
    spec = SPECS[name]
    flat = random_params(spec)
    turns = found(flat, spec, left)
    for own in turns:
        eye = own.values @ own.values.swapaxes(1, 2)
        np.testing.assert_allclose(
            eye, np.broadcast_to(np.eye(spec.head_dim), eye.shape), atol=1e-9
        )
        np.testing.assert_allclose(np.abs(own.keys), 1, atol=1e-12)
        # A head that is alone in its group is turned by next to nothing.
        alone = left == spec.num_kv_heads
        assert alone or spec.qk_norm == bool((own.keys == 1).all())
    after = logits(spec, all_turned(flat, spec, turns))
    assert np.abs(after - logits(spec, flat)).max() < TOL["float32"]


@pytest.mark.parametrize("left", [1, 2])
def test_hidden_turns_of_copies_are_found(left):
    """Copies in bases of their own agree after the turns, to the last digits."""
    spec = SPECS["yarn"]
    flat = random_params(spec)
    each = spec.num_kv_heads // left
    for path in flat:
        if path.split("/")[-2] in ("k", "v"):
            flat[path] = flat[path][..., np.arange(spec.num_kv_heads) // each * each, :]
    hidden = all_turned(flat, spec, random_turns(spec, 2))
    after = all_turned(hidden, spec, found(hidden, spec, left))
    for module in ("k", "v"):
        for leaf in ("kernel", "bias"):
            heads = after[f"blocks/attention/{module}/{leaf}"]
            grouped = heads.reshape(*heads.shape[:-2], left, each, spec.head_dim)
            np.testing.assert_allclose(grouped, grouped[..., :1, :].repeat(each, -2), atol=1e-9)
            apart = hidden[f"blocks/attention/{module}/{leaf}"].reshape(grouped.shape)
            assert np.abs(apart - apart[..., :1, :]).max() > 0.1


def test_opposite_heads_are_merged_and_not_cancelled():
    rng = np.random.default_rng(3)
    k, v = rng.normal(size=(2, 9, 1, 4))
    k, v = np.concatenate([k, -k], axis=1), np.concatenate([v, -v], axis=1)
    turns = find_turns(k, v, 1)
    for path, x in (("a/k/kernel", k), ("a/v/kernel", v)):
        merged = turned(path, x, turns, [0, 1]).mean(axis=1)
        np.testing.assert_allclose(merged, x[:, 0], atol=1e-12)


def test_rounds_only_bring_heads_closer():
    """Nearer to each other than as they were, and no random turns come nearer."""
    rng = np.random.default_rng(4)
    shared = rng.normal(size=(40, 1, 8))
    k, v = shared + 0.5 * rng.normal(size=(2, 40, 4, 8))

    def spread(path: str, x: np.ndarray, turns: Turns) -> float:
        heads = turned(path, x, turns, range(4))
        return float(((heads - heads.mean(axis=1, keepdims=True)) ** 2).sum())

    best = find_turns(k, v, 1)
    none = Turns(np.ones((4, 4), complex), np.broadcast_to(np.eye(8), (4, 8, 8)))
    for path, x in (("a/k/kernel", k), ("a/v/kernel", v)):
        assert spread(path, x, best) < spread(path, x, none)
        for seed in range(20):
            near = np.random.default_rng(seed)
            small = Turns(
                best.keys * np.exp(0.02j * near.normal(size=best.keys.shape)),
                best.values @ _small_turn(near, best.values.shape),
            )
            assert spread(path, x, best) < spread(path, x, small) * (1 + 1e-4)


def _small_turn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    noise = 0.02 * rng.normal(size=shape)
    return expm(noise - noise.swapaxes(1, 2))
