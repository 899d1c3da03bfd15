"""Geometry of models by hub id, for ``--smoke`` and ``kava plan`` without a download.

Only these read this table; a real run reads the model's own ``config.json``. The figures are those
of the models' public ``config.json`` files.
"""

from typing import Any

_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
_QWEN25: dict[str, Any] = {
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
_LLAMA32: dict[str, Any] = {
    "model_type": "llama",
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
_QWEN3_MOE = _QWEN3 | {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rms_norm_eps": 1e-6,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
}
_SIZES = {
    "Qwen/Qwen2.5-14B": (48, 5120, 13824, 40, 8, 152064, False),
    "Qwen/Qwen2.5-7B": (28, 3584, 18944, 28, 4, 152064, False),
    "Qwen/Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151936, True),
    "Qwen/Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 151936, True),
    "meta-llama/Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128256, True),
    "meta-llama/Llama-3.2-1B": (16, 2048, 8192, 32, 8, 128256, True),
    "Qwen/Qwen3-30B-A3B": (48, 2048, 6144, 32, 4, 151936, False),
    "Qwen/Qwen3-1.7B": (28, 2048, 6144, 16, 8, 151936, True),
    "google/gemma-3-27b-pt": (62, 5376, 21504, 32, 16, 262208, True),
    "google/gemma-3-4b-pt": (34, 2560, 10240, 8, 4, 262208, True),
}
_OF_ALL = {
    "Qwen/Qwen2.5": _QWEN25,
    "meta-llama/": _LLAMA32,
    "Qwen/Qwen3-30B": _QWEN3_MOE,
    "Qwen/Qwen3-1": _QWEN3,
    # The text part of models that read images, too.
    "google/gemma-3-27b": _GEMMA3 | {"head_dim": 128, "query_pre_attn_scalar": 168},
    "google/gemma-3-4b": _GEMMA3 | {"head_dim": 256, "query_pre_attn_scalar": 256},
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    name: next(base for start, base in _OF_ALL.items() if name.startswith(start))
    | dict(zip(_KEYS, sizes, strict=True))
    for name, sizes in _SIZES.items()
}
