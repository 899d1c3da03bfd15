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


def _config(family: dict[str, Any], *sizes: int) -> dict[str, Any]:
    """What a family's models share, with one model's figures in the order of ``_KEYS``."""
    return family | dict(zip(_KEYS, sizes, strict=True))


# Keys at the value that transformers takes for them anyway are left out.
_QWEN25: dict[str, Any] = {"model_type": "qwen2", "rope_theta": 1e6}
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
    "max_position_embeddings": 40960,
}
_QWEN3_MOE = _QWEN3 | {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
# The text part of models that read images, too.
_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
}
_GEMMA3_27B = _GEMMA3 | {"head_dim": 128, "query_pre_attn_scalar": 168}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-14B": _config(_QWEN25, 48, 5120, 13824, 40, 8, 152064, False),
    "Qwen/Qwen2.5-7B": _config(_QWEN25, 28, 3584, 18944, 28, 4, 152064, False),
    "Qwen/Qwen2.5-1.5B": _config(_QWEN25, 28, 1536, 8960, 12, 2, 151936, True),
    "Qwen/Qwen2.5-0.5B": _config(_QWEN25, 24, 896, 4864, 14, 2, 151936, True),
    "meta-llama/Llama-3.2-3B": _config(_LLAMA32, 28, 3072, 8192, 24, 8, 128256, True),
    "meta-llama/Llama-3.2-1B": _config(_LLAMA32, 16, 2048, 8192, 32, 8, 128256, True),
    "Qwen/Qwen3-30B-A3B": _config(_QWEN3_MOE, 48, 2048, 6144, 32, 4, 151936, False),
    "Qwen/Qwen3-1.7B": _config(_QWEN3, 28, 2048, 6144, 16, 8, 151936, True),
    "google/gemma-3-27b-pt": _config(_GEMMA3_27B, 62, 5376, 21504, 32, 16, 262208, True),
    "google/gemma-3-4b-pt": _config(_GEMMA3, 34, 2560, 10240, 8, 4, 262208, True),
}
