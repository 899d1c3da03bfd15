"""The text part of a model that reads images, too: read, and written as a model of its own."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kava_jax.errors import KavaError
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.config_keys import note_unknown
from kava_jax.hf.export import export_model
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.masks import attention_mask, token_positions
from tests.tiny_models import CONFIGS, load_decoder, write_tokenizer
from tests.tolerances import TOL

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def test_the_text_part_of_a_model_that_reads_images_is_read_and_written_alone(tmp_path):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    text = {k: v for k, v in CONFIGS["gemma3"].items() if k != "architectures"}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    spec = read_spec(tmp_path / "whole")
    assert spec == spec_from_config(CONFIGS["gemma3"], where="text")
    note = note_unknown(json.loads((tmp_path / "whole/config.json").read_text()), "teachers.big")
    assert note == (
        "teachers.big: of this model the text part alone is read, not what reads images"
    )
    tokens = np.random.default_rng(0).integers(3, 97, (2, 20))
    with torch.no_grad():
        want = whole(torch.from_numpy(tokens)).logits.numpy()
    write_tokenizer(tmp_path / "whole")
    params = load_decoder_params(tmp_path / "whole", spec)
    export_model(
        tmp_path / "out",
        params,
        spec,
        dtype="float32",
        tokenizer=None,
        source_dir=tmp_path / "whole",
        card="",
    )
    # As transformers 4.x wrote it, too.
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "whole", old)
    tensors = {
        re.sub(r"^model\.language_model\.", "language_model.model.", name): value
        for name, value in load_file(old / "model.safetensors").items()
    }
    assert any(name.startswith("language_model.model.") for name in tensors)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    for directory in (tmp_path / "whole", old, tmp_path / "out"):
        model = load_decoder(directory)
        valid = jnp.ones((2, 20), bool)
        positions = token_positions(valid)
        mask = attention_mask(positions, positions, valid, model.spec.windows)
        ours = model.logits(model(jnp.asarray(tokens), positions, mask)[0])
        np.testing.assert_allclose(ours, want, atol=TOL["parity"])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(written).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        again = written(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(again, want, atol=TOL["parity"])
    other = json.loads((old / "config.json").read_text()) | {"architectures": ["LlavaForCausalLM"]}
    (old / "config.json").write_text(json.dumps(other))
    with pytest.raises(KavaError, match=r"LlavaForCausalLM'\] with a text_config is not supported"):
        read_spec(old)


def test_what_a_public_text_config_leaves_out_is_what_transformers_takes():
    from transformers import Gemma3TextConfig

    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": VISION,
    }
    spec = spec_from_config(config, where="gemma-3-4b-it")
    theirs = Gemma3TextConfig(**{k: v for k, v in text.items() if k != "model_type"})
    found = (spec.vocab_size, spec.num_heads, spec.num_kv_heads, spec.head_dim)
    assert found == (
        theirs.vocab_size,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    )
    assert spec.tie_embeddings
    assert spec.layer_windows.count(None) == theirs.layer_types.count("full_attention")
