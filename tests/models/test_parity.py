"""Logits, keys, values and greedy tokens against transformers in float32, on tiny random models."""

from operator import attrgetter

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.hf.load import load_decoder_params
from kava_jax.models.generate import generate
from kava_jax.models.masks import attention_mask, token_positions
from tests.tiny_models import (
    CONFIGS,
    QUICK_LAYERS,
    each,
    load_decoder,
    torch_model,
    write_directory,
)
from tests.tolerances import TOL

torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")

LENGTHS = (40, 23, 31)


@pytest.fixture(scope="module", params=each({*CONFIGS} - {"mistral_full"}, QUICK_LAYERS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("model"), name)


def batch(padding: str, vocab: int = 97) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [3, 40] and which of them are real."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, vocab, (3, 40))
    columns = np.arange(40)[None, :]
    lengths = np.array(LENGTHS)[:, None]
    valid = {
        "none": np.ones((3, 40), bool),
        "right": columns < lengths,
        "left": columns >= 40 - lengths,
    }[padding]
    return np.where(valid, tokens, 0), valid


def keys_before_rotation(attention, shape: tuple[int, ...]):
    """The last module before the rotation, and its output as keys [B, T, K, H]."""
    heads, width = attention.config.num_key_value_heads, attention.head_dim
    if (fused := getattr(attention, "qkv_proj", None)) is not None:
        first = attention.config.num_attention_heads * width
        return fused, lambda out: out[..., first : first + heads * width].reshape(*shape, heads, -1)
    module = getattr(attention, "k_norm", None) or attention.k_proj
    # Some norm the keys after their heads have been moved to the front.
    front = attention.config.model_type == "gemma3_text"
    return module, lambda out: (out.transpose(1, 2) if front else out).reshape(*shape, heads, width)


def run_torch(name: str, tokens: np.ndarray, valid: np.ndarray):
    """Logits, post-RoPE keys, values and pre-RoPE keys of every layer, as [L, B, T, K, H]."""
    from transformers import DynamicCache

    model = torch_model(name)
    hooked: list[np.ndarray] = []
    hooks = []
    for layer in model.model.layers:
        module, keys_of = keys_before_rotation(layer.self_attn, tokens.shape)
        hooks.append(
            module.register_forward_hook(
                lambda _m, _i, out, keys_of=keys_of: hooked.append(keys_of(out.detach()).numpy())
            )
        )
    cache = DynamicCache()  # without the config, so that sliding layers keep every token
    mask = torch.from_numpy(valid.astype(np.int64))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            torch.from_numpy(tokens),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        ).logits.numpy()
    for hook in hooks:
        hook.remove()
    keys = np.stack([layer.keys.numpy().transpose(0, 2, 1, 3) for layer in cache.layers])
    values = np.stack([layer.values.numpy().transpose(0, 2, 1, 3) for layer in cache.layers])
    return logits, keys, values, np.stack(hooked)


def run_ours(model, tokens: np.ndarray, valid: np.ndarray, key_space: str):
    valid_BT = jnp.asarray(valid)
    positions = token_positions(valid_BT)
    mask = attention_mask(positions, positions, valid_BT, model.spec.windows)
    return model(jnp.asarray(tokens), positions, mask, key_space=key_space)


def assert_close(ours, theirs: np.ndarray, valid: np.ndarray) -> None:
    """Largest difference over real tokens of logits [B, T, V] or a cache [L, B, T, K, H]."""
    tokens = valid if theirs.ndim == 3 else (slice(None), valid)
    assert theirs.shape == ours.shape
    assert np.abs(np.asarray(ours)[tokens] - theirs[tokens]).max() < TOL["parity"]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_keys_and_values_match_transformers(name, directory, padding):
    tokens, valid = batch(padding)
    logits, post, values, pre = run_torch(name, tokens, valid)
    model = load_decoder(directory)
    hidden, cache = run_ours(model, tokens, valid, "post_rope")
    assert_close(model.logits(hidden), logits, valid)
    assert_close(cache.k, post, valid)
    assert_close(cache.v, values, valid)
    _, cache = run_ours(model, tokens, valid, "pre_rope")
    assert_close(cache.k, pre, valid)
    assert not np.allclose(post[:, valid], pre[:, valid], atol=TOL["parity"])


def test_a_cut_teacher_writes_the_same_cache_as_the_first_layers(name, directory):
    tokens, valid = batch("right")
    _, _, values, pre = run_torch(name, tokens, valid)
    for layers in (0, 2):
        model = load_decoder(directory, layers=layers, tail=True, head=False)
        _, cache = run_ours(model, tokens, valid, "pre_rope")
        assert_close(cache.k, pre[: layers + 1], valid)
        assert_close(cache.v, values[: layers + 1], valid)


def outputs_of_torch(name: str, tokens: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
    """What attention and the whole layer give, of every layer, as [L, B, T, D]."""
    model = torch_model(name)
    found = {"attention_outputs": [], "block_outputs": []}

    def keep(kind: str):
        def hook(_module, _inputs, out) -> None:
            found[kind].append((out[0] if isinstance(out, tuple) else out).detach().numpy())

        return hook

    hooks = []
    # What attention adds to the residual stream is normed after it in some families.
    normed = model.config.model_type in ("gemma2", "gemma3_text", "olmo2")
    for layer in model.model.layers:
        added = layer.post_attention_layernorm if normed else layer.self_attn
        hooks.append(added.register_forward_hook(keep("attention_outputs")))
        hooks.append(layer.register_forward_hook(keep("block_outputs")))
    mask = torch.from_numpy(valid.astype(np.int64))
    with torch.no_grad():
        states = model(
            torch.from_numpy(tokens),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
        ).hidden_states
    for hook in hooks:
        hook.remove()
    stacked = {kind: np.stack(layers) for kind, layers in found.items()}
    stacked["attention_outputs"] *= getattr(model.config, "residual_multiplier", 1.0)
    # The last of transformers' own hidden states has gone through the final norm.
    for layer, state in enumerate(states[1:-1]):
        np.testing.assert_array_equal(stacked["block_outputs"][layer], state.numpy())
    return stacked


@pytest.mark.parametrize("padding", ["right", "left"])
def test_outputs_of_layers_match_transformers(name, directory, padding):
    tokens, valid = batch(padding)
    wanted = outputs_of_torch(name, tokens, valid)
    valid_BT = jnp.asarray(valid)
    positions = token_positions(valid_BT)

    def check(model, layers: tuple[int, ...] | None, kept: slice) -> None:
        mask = attention_mask(positions, positions, valid_BT, model.spec.windows)
        for kind, theirs in wanted.items():
            inputs = (jnp.asarray(tokens), positions, mask)
            _, ours = model.keeping(*inputs, attrgetter(kind), layers=layers)
            assert ours.shape == theirs[kept].shape
            assert np.abs(np.asarray(ours) - theirs[kept])[:, valid].max() < TOL["parity"]

    model = load_decoder(directory)
    check(model, None, slice(None))
    check(model, (0, 2), slice(None, None, 2))
    check(load_decoder(directory, layers=2, head=False), None, slice(2))


def test_64_greedy_tokens_match_transformers_on_a_left_padded_batch(name, directory):
    tokens, valid = batch("left")
    with torch.no_grad():
        theirs = (
            torch_model(name)
            .generate(
                torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(valid.astype(np.int64)),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[:, tokens.shape[1] :]
            .numpy()
        )
    model = load_decoder(directory)
    graph, _ = nnx.split(model)
    params = load_decoder_params(directory, model.spec)
    ours = generate(
        graph,
        params,
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(valid),
        max_new_tokens=64,
        eos_ids=(),
        pad_id=0,
    )
    np.testing.assert_array_equal(np.asarray(ours), theirs)
    assert len(np.unique(theirs)) > 10  # not one token over and over, which would prove little
