"""Tiny random models of every family: as configs, as torch models, and as directories.

Tensor names and shapes are written out here by hand, apart from the package's own table, so that
the two can disagree. Biases and norm scales are random: fresh ones (0 and 1) would hide mistakes.
"""

import json
import tempfile
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
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
    "qwen2_sliding": _COMMON
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "ministral": _COMMON
    | {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "gemma2": _COMMON
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 10,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3": _COMMON
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 14,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 30,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
    },
    "phi3": _COMMON
    | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "rms_norm_eps": 1e-5,
        "sliding_window": 9,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "phi4_mini": _COMMON
    | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 96,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
            "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
        },
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "olmo2": _COMMON
    | {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "smollm3": _COMMON
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "no_rope_layers": [1, 0, 1],
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    "granite": _COMMON
    | {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "rms_norm_eps": 1e-5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "mixtral": _COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "rms_norm_eps": 1e-5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": _COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
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

# Mixtures of experts can only teach.
DENSE = sorted(name for name, config in CONFIGS.items() if "num_experts_per_tok" not in config)
# One for each way to store tensors; what is done to files is quick for these.
_FILES = ("llama_biased", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")
# What the layers of these compute, those of others do, too.
_ALIKE = ("llama_biased", "ministral", "mixtral", "phi3", "qwen2_sliding", "smollm")
QUICK_FILES, QUICK_LAYERS = {*_FILES}, {*CONFIGS} - {*_ALIKE}


def each(names: Iterable[str], quick: set[str]) -> list[Any]:
    """Parameters of a test: all of ``names``, of which some are long."""
    long = partial(pytest.param, marks=pytest.mark.long)
    return [name if name in quick else long(name) for name in sorted(names)]


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors transformers stores for one of ``CONFIGS``."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    H = config.get("head_dim", D // N)
    biased = config.get("attention_bias", False)
    family = config["model_type"]
    # The norms of a layer, by family; the usual ones stand before attention and MLP.
    norms = {
        "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        **dict.fromkeys(
            ("gemma2", "gemma3_text"),
            (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        ),
    }.get(family, ("input_layernorm", "post_attention_layernorm"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        shapes |= {f"{layer}{norm}.weight": (D,) for norm in norms}
        shapes[attention + "o_proj.weight"] = (D, N * H)
        if family == "phi3":
            shapes[attention + "qkv_proj.weight"] = ((N + 2 * K) * H, D)
        else:
            shapes |= {
                attention + "q_proj.weight": (N * H, D),
                attention + "k_proj.weight": (K * H, D),
                attention + "v_proj.weight": (K * H, D),
            }
        if family in ("mixtral", "qwen3_moe"):
            shapes |= _experts(layer, config)
        elif family == "phi3":
            shapes |= {
                mlp + "gate_up_proj.weight": (2 * F, D),
                mlp + "down_proj.weight": (D, F),
            }
        else:
            shapes |= {
                mlp + "gate_proj.weight": (F, D),
                mlp + "up_proj.weight": (F, D),
                mlp + "down_proj.weight": (D, F),
            }
        if family == "qwen2" or biased:
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
        if family in ("qwen3", "gemma3_text", "qwen3_moe"):
            shapes |= {attention + "q_norm.weight": (H,), attention + "k_norm.weight": (H,)}
        if family == "olmo2":
            shapes |= {attention + "q_norm.weight": (N * H,), attention + "k_norm.weight": (K * H,)}
    shapes["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def _experts(layer: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A router and the experts of one layer."""
    D = config["hidden_size"]
    if config["model_type"] == "mixtral":
        E, F, start = config["num_local_experts"], config["intermediate_size"], "block_sparse_moe."
        names = ("w1", "w3", "w2")
    else:
        E, F, start = config["num_experts"], config["moe_intermediate_size"], "mlp."
        names = ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {f"{layer}{start}gate.weight": (E, D)}
    for expert in range(E):
        for part, shape in zip(names, ((F, D), (F, D), (D, F)), strict=True):
            shapes[f"{layer}{start}experts.{expert}.{part}.weight"] = shape
    return shapes


def random_tensors(name: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights that keep activations near one and every parameter's effect visible."""
    rng = np.random.default_rng(sorted(CONFIGS).index(name))
    tensors = {}
    for tensor, shape in tensor_shapes(CONFIGS[name]).items():
        noise = rng.standard_normal(shape)
        if "norm" in tensor:
            # Gemma multiplies by one more than what is stored.
            value = (0 if "gemma" in CONFIGS[name]["model_type"] else 1) + 0.3 * noise
        elif tensor.endswith("bias"):
            value = 0.2 * noise
        else:
            value = 1.5 * noise / np.sqrt(shape[-1])
        if "embed" in tensor and name in ("gemma2", "gemma3", "granite"):
            value *= 0.2  # they are scaled up and tied: each token would predict itself
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
    if name not in DENSE:  # transformers holds the experts of a layer as one, and converts them
        with tempfile.TemporaryDirectory() as folder:
            directory = write_directory(Path(folder), name)
            load = partial(AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
            return load(directory, dtype=torch.float32).eval()
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
