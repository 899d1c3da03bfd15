"""Every RoPE scaling against transformers' own tables and logits, one row at a time.

transformers chooses the frequencies of ``dynamic`` and ``longrope`` by the longest row of a batch
and remembers the longest it has seen, so each row is read by a fresh module.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from kava_jax.hf.config_json import spec_from_config
from kava_jax.models.generate import generate
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import rope_rotations
from tests.tiny_models import CONFIGS, load_decoder, random_tensors
from tests.tolerances import TOL

torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")

# The original length is 16; linear has none, and dynamic starts at max_position_embeddings.
BELOW, AT, BEYOND = 9, 16, 37
HEAD_DIM = CONFIGS["llama3"]["head_dim"]
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn by hand": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn with its attention factor": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(HEAD_DIM // 2)],
        "long_factor": [1.0 + 0.8 * i for i in range(HEAD_DIM // 2)],
        "original_max_position_embeddings": 16,
    },
    "longrope with a factor": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [2.0] * (HEAD_DIM // 2),
        "original_max_position_embeddings": 16,
        "factor": 8.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def config_with(scaling: str) -> dict:
    """The tiny Llama with this scaling; only dynamic has its original length as its longest."""
    longest = 16 if scaling == "dynamic" else 64
    return CONFIGS["llama3"] | {
        "rope_scaling": SCALINGS[scaling],
        "rope_theta": 1000.0,
        "max_position_embeddings": longest,
    }


def hf_config(scaling: str):
    from transformers import LlamaConfig

    fields = json.loads(json.dumps(config_with(scaling)))  # it changes what it is given
    return LlamaConfig(**fields)


def padded(rows: int, side: str) -> np.ndarray:
    """Which tokens of the rows below, at and beyond the original length are real."""
    columns = np.arange(BEYOND)[None]
    lengths = np.array([BELOW, AT, BEYOND][:rows])[:, None]
    return columns < lengths if side == "right" else columns >= BEYOND - lengths


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_cosines_and_sines_are_those_of_transformers(scaling, side):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    valid = padded(3, side)
    spec = spec_from_config(config_with(scaling), where="tiny")
    tables = rope_rotations(spec, token_positions(jnp.asarray(valid)))
    for row, real in enumerate(valid):
        rotary = LlamaRotaryEmbedding(hf_config(scaling))
        positions = torch.arange(int(real.sum()))[None]
        for ours, theirs in zip(tables, rotary(torch.zeros(1), positions), strict=True):
            want = theirs[0, :, : HEAD_DIM // 2].numpy()
            np.testing.assert_allclose(ours[0, row, real, 0], want, atol=TOL["parity"])


@pytest.fixture(params=SCALINGS)
def scaled(request, tmp_path):
    """Name of a scaling, and a directory of random weights with it."""
    (tmp_path / "config.json").write_text(json.dumps(config_with(request.param)))
    save_file(random_tensors("llama3"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return request.param, tmp_path


def their_logits(directory, tokens: np.ndarray) -> np.ndarray:
    """Logits of one row, [T, V], by a model that has read nothing before."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()


def test_logits_of_a_padded_batch_are_those_of_each_row_by_itself(scaled):
    _, directory = scaled
    tokens = np.random.default_rng(0).integers(3, 97, (3, BEYOND))
    valid = padded(3, "right")
    model = load_decoder(directory)
    positions = token_positions(jnp.asarray(valid))
    mask = attention_mask(positions, positions, jnp.asarray(valid))
    ours = model.logits(model(jnp.asarray(tokens), positions, mask)[0])
    for row, real in enumerate(valid):
        theirs = their_logits(directory, tokens[row, real])
        np.testing.assert_allclose(ours[row, real], theirs, atol=TOL["parity"])


@pytest.mark.parametrize("scaled", ["dynamic", "longrope"], indirect=True)
def test_answers_use_the_table_of_prompt_and_new_tokens(scaled):
    """Independently: no cache, every row filled up to the length that it may reach."""
    from transformers import AutoModelForCausalLM

    _, directory = scaled
    new, lengths = 9, (4, 12)  # the first ends below the original length, the second beyond it
    tokens = np.random.default_rng(1).integers(3, 97, (2, 12))
    valid = np.arange(12)[None] >= 12 - np.array(lengths)[:, None]
    model = load_decoder(directory)
    graph, state = nnx.split(model)
    ours = generate(
        graph,
        nnx.to_pure_dict(state),
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(valid),
        max_new_tokens=new,
        eos_ids=(),
        pad_id=0,
    )
    for row, length in enumerate(lengths):
        theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
        text = np.zeros(length + new, np.int64)
        text[:length] = tokens[row, valid[row]]
        for place in range(length, length + new):
            with torch.no_grad():
                logits = theirs(torch.from_numpy(text)[None], use_cache=False).logits
            text[place] = int(logits[0, place - 1].argmax())
        np.testing.assert_array_equal(ours[row], text[length:])
        assert len(set(text[length:].tolist())) > 2  # not one token over and over
