"""Tiny random models of every family: as configs, as torch models, and as directories.

Tensor names and shapes are written out here by hand, apart from the package's own table, so that
the two can disagree. Biases and norm scales are random: fresh ones (0 and 1) would hide mistakes.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.decoder import Decoder

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": _COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "llama3": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3,
        "head_dim": 20,
        "tie_word_embeddings": False,
    },
    "llama_biased": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "smollm": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "mistral": _COMMON
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 5,
        "tie_word_embeddings": False,
    },
    "mistral_full": _COMMON
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors transformers stores for one of ``CONFIGS``."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = config.get("head_dim", D // N)
    biased = config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            attention + "q_proj.weight": (N * H, D),
            attention + "k_proj.weight": (K * H, D),
            attention + "v_proj.weight": (K * H, D),
            attention + "o_proj.weight": (D, N * H),
            mlp + "gate_proj.weight": (F, D),
            mlp + "up_proj.weight": (F, D),
            mlp + "down_proj.weight": (D, F),
        }
        if config["model_type"] == "qwen2" or biased:
            shapes |= {
                attention + "q_proj.bias": (N * H,),
                attention + "k_proj.bias": (K * H,),
                attention + "v_proj.bias": (K * H,),
            }
        if biased:
            shapes[attention + "o_proj.bias"] = (D,)
        if config.get("mlp_bias"):
            shapes |= {
                mlp + "gate_proj.bias": (F,),
                mlp + "up_proj.bias": (F,),
                mlp + "down_proj.bias": (D,),
            }
        if config["model_type"] == "qwen3":
            shapes |= {attention + "q_norm.weight": (H,), attention + "k_norm.weight": (H,)}
    shapes["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def random_tensors(name: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights that keep activations near one and every parameter's effect visible."""
    rng = np.random.default_rng(sorted(CONFIGS).index(name))
    tensors = {}
    for tensor, shape in tensor_shapes(CONFIGS[name]).items():
        noise = rng.standard_normal(shape)
        if "norm" in tensor:
            value = 1 + 0.3 * noise
        elif tensor.endswith("bias"):
            value = 0.2 * noise
        else:
            value = 1.5 * noise / np.sqrt(shape[-1])
        tensors[tensor] = value.astype(np.float32).astype(dtype)
    return tensors


def write_directory(directory: Path, name: str, dtype: Any = np.float32) -> Path:
    """A single-file Hugging Face directory with ``random_tensors``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    tensors = random_tensors(name, dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_tokenizer(directory: Path, *, words: bool = False) -> Path:
    """A small tokenizer made here: byte-level BPE, or whole words, with pad 0, bos 1, eos 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<tool>"]
    if words:
        vocabulary = {word: i for i, word in enumerate([*special, "Answer", "the"])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            ["the answer to the question is the other one"] * 3,
            trainers.BpeTrainer(
                special_tokens=special, initial_alphabet=alphabet, show_progress=False
            ),
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<tool>"],
    )
    tokenizer.save_pretrained(directory)
    return directory


@cache
def torch_model(name: str) -> Any:
    """The same weights in transformers' own model class, eager attention, float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)  # matrices this small only lose by being split
    fields = {k: v for k, v in CONFIGS[name].items() if k not in ("architectures", "model_type")}
    config = AutoConfig.for_model(CONFIGS[name]["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = {key: torch.from_numpy(value) for key, value in random_tensors(name).items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model


def load_decoder(directory: Path, **cut: Any) -> Decoder:
    """Our decoder with a directory's weights in it; ``cut`` as in ``load_decoder_params``."""
    spec = read_spec(directory)
    params = load_decoder_params(directory, spec, **cut)
    kinds = {"blocks": cut.get("layers"), "tail": cut.get("tail", False)}
    model = nnx.eval_shape(
        lambda: Decoder(spec, rngs=nnx.Rngs(0), head=cut.get("head", True), **kinds)
    )
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """``path -> array`` of a nested dict."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    key = jax.tree_util.keystr
    return {key(p, simple=True, separator="/"): np.asarray(leaf) for p, leaf in leaves}
