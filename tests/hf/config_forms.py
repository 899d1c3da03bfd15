"""The public ``config.json`` forms of the supported families, with their keys and values.

Written out from the field names of transformers' configuration classes and of the programs that
write such files (transformers 4.2x to 5.x, Unsloth, converters). Widths are the models' own.
"""

from typing import Any

Form = dict[str, Any]


def sizes(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> Form:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
    }


def written(model_type: str, class_name: str, version: str, dtype: str = "bfloat16") -> Form:
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "transformers_version": version,
        "torch_dtype": dtype,
        "use_cache": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
    }


def without(form: Form, *keys: str) -> Form:
    return {key: value for key, value in form.items() if key not in keys}


_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA = written("llama", "LlamaForCausalLM", "4.40.0")
_QWEN2 = written("qwen2", "Qwen2ForCausalLM", "4.43.1") | {
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_QWEN3 = without(written("qwen3", "Qwen3ForCausalLM", "4.51.0"), "hidden_act") | {
    "attention_bias": False,
    "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_GEMMA3 = without(written("gemma3_text", "Gemma3ForCausalLM", "4.50.0"), "hidden_act") | {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
}
_PHI3 = written("phi3", "Phi3ForCausalLM", "4.43.3") | {
    "attention_bias": False,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "long_factor": [1.0 + 0.5 * pair for pair in range(48)],
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
}
_LLAMA3_ENDS = {"bos_token_id": 128000, "eos_token_id": 128001}
_LLAMA31 = (
    _LLAMA
    | sizes(4096, 14336, 32, 32, 8, 128256)
    | {
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
)
_MISTRAL = written("mistral", "MistralForCausalLM", "4.34.0") | _ENDS | {"rms_norm_eps": 1e-05}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}

FORMS: dict[str, Form] = {
    "Qwen2-7B": _QWEN2
    | sizes(3584, 18944, 28, 28, 4, 152064)
    | {"max_position_embeddings": 131072, "tie_word_embeddings": False},
    "Qwen2.5-0.5B": _QWEN2
    | sizes(896, 4864, 24, 14, 2, 151936)
    | {"tie_word_embeddings": True, "use_mrope": False},
    "Qwen2.5-7B-Instruct with YaRN": _QWEN2
    | sizes(3584, 18944, 28, 28, 4, 152064)
    | {"rope_scaling": _YARN | {"type": "yarn"}, "tie_word_embeddings": False},
    "Qwen2.5 saved by transformers 5": without(_QWEN2, "torch_dtype", "rope_theta", "rope_scaling")
    | sizes(1536, 8960, 28, 12, 2, 151936)
    | {
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 28,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "transformers_version": "5.0.0",
    },
    "Qwen2.5 saved by Unsloth": _QWEN2
    | sizes(2048, 11008, 36, 16, 2, 151936)
    | {
        "_name_or_path": "unsloth/Qwen2.5-3B",
        "model_name": "unsloth/Qwen2.5-3B",
        "pad_token_id": 151654,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "unsloth_fixed": True,
        "unsloth_version": "2025.3.1",
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2
    | sizes(1536, 8960, 28, 12, 2, 151936)
    | {
        "eos_token_id": 151643,
        "max_position_embeddings": 131072,
        "max_window_layers": 21,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_mrope": False,
    },
    "DeepSeek-R1-Distill-Llama-8B": _LLAMA31 | _LLAMA3_ENDS | {"transformers_version": "4.43.0"},
    "QwQ-32B": _QWEN2
    | sizes(5120, 27648, 64, 40, 8, 152064)
    | {"max_position_embeddings": 40960, "max_window_layers": 64, "rms_norm_eps": 1e-05},
    "Qwen3-0.6B": _QWEN3 | sizes(1024, 3072, 28, 16, 8, 151936) | {"tie_word_embeddings": True},
    "Qwen3-8B with YaRN": _QWEN3
    | sizes(4096, 12288, 36, 32, 8, 151936)
    | {"rope_scaling": _YARN | {"rope_type": "yarn"}, "tie_word_embeddings": False},
    "Qwen3 saved by transformers 4.55": _QWEN3
    | sizes(2560, 9728, 36, 32, 8, 151936)
    | {"layer_types": ["full_attention"] * 36, "tie_word_embeddings": True},
    "Llama-2-7b-hf": without(_LLAMA, "attention_dropout")
    | without(sizes(4096, 11008, 32, 32, 32, 32000), "num_key_value_heads")
    | _ENDS
    | {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
    },
    "LLaMA-7B of 2023": without(_LLAMA, "attention_dropout")
    | without(sizes(4096, 11008, 32, 32, 32, 32000), "num_key_value_heads")
    | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_sequence_length": 2048,
        "pad_token_id": -1,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "transformers_version": "4.27.0.dev0",
    },
    "Meta-Llama-3-8B": _LLAMA
    | sizes(4096, 14336, 32, 32, 8, 128256)
    | _LLAMA3_ENDS
    | {
        "attention_bias": False,
        "max_position_embeddings": 8192,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "Llama-3.1-8B-Instruct": _LLAMA31,
    "Llama-3.2-1B": _LLAMA31
    | sizes(2048, 8192, 16, 32, 8, 128256)
    | _LLAMA3_ENDS
    | {
        "head_dim": 64,
        "rope_scaling": _LLAMA31["rope_scaling"] | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "Llama-3.2 saved by transformers 5": without(
        _LLAMA31, "torch_dtype", "rope_theta", "rope_scaling"
    )
    | {
        "dtype": "bfloat16",
        "pad_token_id": None,
        "rope_parameters": _LLAMA31["rope_scaling"] | {"rope_theta": 500000.0},
        "tie_word_embeddings": True,
    },
    "Mistral-7B-v0.1": _MISTRAL
    | sizes(4096, 14336, 32, 32, 8, 32000)
    | {
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "Mistral-7B-Instruct-v0.3": _MISTRAL
    | sizes(4096, 14336, 32, 32, 8, 32768)
    | {
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Mistral-Nemo-Base-2407": _MISTRAL
    | sizes(5120, 14336, 40, 32, 8, 131072)
    | {
        "head_dim": 128,
        "max_position_embeddings": 128000,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "SmolLM-135M": _LLAMA
    | sizes(576, 1536, 30, 9, 3, 49152)
    | {
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "SmolLM2-1.7B-Instruct": _LLAMA
    | sizes(2048, 8192, 24, 32, 32, 49152)
    | _ENDS
    | {
        "attention_bias": False,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 130000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Yi-6B": without(_LLAMA, "attention_dropout")
    | sizes(4096, 11008, 32, 32, 4, 64000)
    | _ENDS
    | {
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.34.0",
    },
    "TinyLlama-1.1B": _LLAMA
    | sizes(2048, 5632, 22, 32, 4, 32000)
    | _ENDS
    | {
        "attention_bias": False,
        "max_position_embeddings": 2048,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "vicuna-7b-v1.5-16k, linear": _LLAMA
    | sizes(4096, 11008, 32, 32, 32, 32000)
    | _ENDS
    | {
        "_name_or_path": "vicuna-7b-v1.5-16k",
        "max_position_embeddings": 4096,
        "max_sequence_length": 16384,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "tie_word_embeddings": False,
    },
    "deepseek-coder-6.7b, linear": _LLAMA
    | sizes(4096, 11008, 32, 32, 32, 32256)
    | {
        "bos_token_id": 32013,
        "eos_token_id": 32014,
        "max_position_embeddings": 16384,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
        "tie_word_embeddings": False,
    },
    "Llama with dynamic NTK": _LLAMA
    | sizes(4096, 11008, 32, 32, 32, 32000)
    | _ENDS
    | {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "tie_word_embeddings": False,
    },
    "Yarn-Llama-2-7b-64k": _LLAMA
    | sizes(4096, 11008, 32, 32, 32, 32000)
    | _ENDS
    | {
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
        "max_position_embeddings": 65536,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "finetuned": True,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "tie_word_embeddings": False,
    },
    "longrope as Phi-3.5 has it, on Llama": _LLAMA
    | sizes(3072, 8192, 32, 32, 32, 32064)
    | {
        "attention_bias": False,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0 + 0.5 * pair for pair in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
    },
    "Qwen2 with sliding windows": _QWEN2
    | sizes(3584, 18944, 28, 28, 4, 152064)
    | {"use_sliding_window": True, "max_window_layers": 14, "tie_word_embeddings": False},
    "Ministral saved by transformers 5": without(_MISTRAL, "torch_dtype")
    | sizes(4096, 12288, 36, 32, 8, 131072)
    | {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "dtype": "bfloat16",
        "head_dim": 128,
        "layer_types": 9 * ["full_attention", *["sliding_attention"] * 3],
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_theta": 100000000.0, "rope_type": "default"},
        "sliding_window": 32768,
        "tie_word_embeddings": False,
    },
    "gemma-2-2b": written("gemma2", "Gemma2ForCausalLM", "4.42.4", "float32")
    | sizes(2304, 9216, 26, 8, 4, 256000)
    | {
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "gemma-3-1b-it": _GEMMA3
    | sizes(1152, 6912, 26, 4, 1, 262144)
    | {
        "eos_token_id": [1, 106],
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma-3-270m saved by transformers 5": without(_GEMMA3, "torch_dtype")
    | sizes(640, 2048, 18, 4, 1, 262144)
    | {
        "_sliding_window_pattern": 6,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "layer_types": 3 * [*["sliding_attention"] * 5, "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 512,
        "use_bidirectional_attention": False,
    },
    "Phi-3.5-mini-instruct": _PHI3
    | sizes(3072, 8192, 32, 32, 32, 32064)
    | {"eos_token_id": 32000, "pad_token_id": 32000, "tie_word_embeddings": False},
    "Phi-4-mini-instruct": _PHI3
    | sizes(3072, 8192, 32, 24, 8, 200064)
    | {
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
    },
    "OLMo-2-1124-7B": written("olmo2", "Olmo2ForCausalLM", "4.47.0.dev0", "float32")
    | sizes(4096, 11008, 32, 32, 32, 100352)
    | {
        "attention_bias": False,
        "eos_token_id": 100257,
        "max_position_embeddings": 4096,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "SmolLM3-3B": written("smollm3", "SmolLM3ForCausalLM", "4.54.0")
    | sizes(2048, 11008, 36, 16, 4, 128256)
    | {
        "attention_bias": False,
        "eos_token_id": 128012,
        "layer_types": 36 * ["full_attention"],
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": 9 * [1, 1, 1, 0],
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "granite-3.1-2b-base": written("granite", "GraniteForCausalLM", "4.47.0.dev0")
    | sizes(2048, 8192, 40, 32, 8, 49155)
    | {
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
    },
}

FORMS |= {
    "Qwen3-30B-A3B": without(_QWEN3, "max_window_layers")
    | sizes(2048, 6144, 48, 32, 4, 151936)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
    "Mixtral-8x7B-v0.1": written("mixtral", "MixtralForCausalLM", "4.36.0.dev0")
    | sizes(4096, 14336, 32, 32, 8, 32000)
    | _ENDS
    | {
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}

NOT_SUPPORTED: dict[str, tuple[Form, str]] = {
    "Qwen3-8B-FP8": (
        FORMS["Qwen3-8B with YaRN"]
        | {
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            }
        },
        "quantization_config",
    ),
    "Qwen2.5-7B-Instruct-AWQ": (
        FORMS["Qwen2-7B"]
        | {"quantization_config": {"bits": 4, "group_size": 128, "quant_method": "awq"}},
        "quantization_config",
    ),
    "DeepSeek-V3": (
        {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512},
        "its attention is latent",
    ),
    "Qwen3-Next": (
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "layer_types": ["linear_attention", "full_attention"],
        },
        "have no keys and values",
    ),
    "Qwen3-MoE with dense layers": (
        FORMS["Qwen3-30B-A3B"] | {"mlp_only_layers": [0]},
        "mlp_only_layers=[0] is not supported",
    ),
    "Qwen3-MoE with an MLP in every second layer": (
        FORMS["Qwen3-30B-A3B"] | {"decoder_sparse_step": 2},
        "decoder_sparse_step=2 is not supported",
    ),
    "more experts for a token than there are": (
        FORMS["Mixtral-8x7B-v0.1"] | {"num_experts_per_tok": 9},
        "num_experts_per_tok=9 of 8 experts",
    ),
    "Gemma with attention in both directions": (
        FORMS["gemma-3-1b-it"] | {"use_bidirectional_attention": True},
        "use_bidirectional_attention=true",
    ),
    "Gemma 3's sliding layers with a scaled rotation": (
        FORMS["gemma-3-270m saved by transformers 5"]
        | {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            }
        },
        "scales the rotation of its sliding layers",
    ),
    "Gemma 3 with one rotation for all types": (
        FORMS["gemma-3-270m saved by transformers 5"]
        | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        "needs an object for each of full_attention, sliding_attention",
    ),
    "fewer types than layers": (
        FORMS["SmolLM3-3B"] | {"layer_types": ["full_attention"]},
        "layer_types=['full_attention'] is no list of num_hidden_layers=36 entries",
    ),
    "sliding layers without a window": (
        FORMS["SmolLM3-3B"] | {"layer_types": 36 * ["sliding_attention"]},
        "there is no sliding_window",
    ),
    "Phi with half a pair rotated": (
        FORMS["Phi-4-mini-instruct"] | {"partial_rotary_factor": 0.01},
        "rotates 1 of head_dim=128",
    ),
    "a Granite's multipliers on Llama": (
        FORMS["TinyLlama-1.1B"] | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
        "embedding_multiplier=12.0 is not supported",
    ),
    "a sliding window on Llama": (
        FORMS["TinyLlama-1.1B"] | {"sliding_window": 1024},
        "sliding_window=1024 has no effect on Llama",
    ),
    "layers without rotation": (
        FORMS["SmolLM2-1.7B-Instruct"] | {"no_rope_layers": [1, 1, 1, 0]},
        "no_rope_layers",
    ),
    "rotation in the other layout": (
        FORMS["SmolLM-135M"] | {"rope_interleaved": True},
        "rope_interleaved=True",
    ),
    "Mistral-NeMo-Minitron's partial rotation": (
        FORMS["Mistral-7B-v0.1"] | {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5",
    ),
    "Phi-4-mini with another family's factors": (
        FORMS["Phi-4-mini-instruct"] | {"partial_rotary_factor": 1.0},
        "needs 64 of each",
    ),
}
