"""Geometry of the models that the shipped configs name, for ``--smoke`` without a download.

Only smoke runs read this table; a real run reads the model's own ``config.json``. The figures are
those of the models' public ``config.json`` files.
"""

from typing import Any

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
    "vocab_size": 128256,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _qwen25(
    layers: int, width: int, ffw: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return _QWEN25 | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffw,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def _llama32(layers: int, width: int, heads: int, head_dim: int) -> dict[str, Any]:
    return _LLAMA32 | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_dim": head_dim,
    }


KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-14B": _qwen25(48, 5120, 13824, 40, 8, 152064, tied=False),
    "Qwen/Qwen2.5-7B": _qwen25(28, 3584, 18944, 28, 4, 152064, tied=False),
    "Qwen/Qwen2.5-1.5B": _qwen25(28, 1536, 8960, 12, 2, 151936, tied=True),
    "Qwen/Qwen2.5-0.5B": _qwen25(24, 896, 4864, 14, 2, 151936, tied=True),
    "meta-llama/Llama-3.2-3B": _llama32(28, 3072, 24, 128),
    "meta-llama/Llama-3.2-1B": _llama32(16, 2048, 32, 64),
}
