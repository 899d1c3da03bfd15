"""Geometry of the models that the shipped configs name, for ``--smoke`` without a download.

Only smoke runs read this table; a real run reads the model's own ``config.json``. The figures are
those of the models' public ``config.json`` files.
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
_SIZES = {
    "Qwen/Qwen2.5-14B": (48, 5120, 13824, 40, 8, 152064, False),
    "Qwen/Qwen2.5-7B": (28, 3584, 18944, 28, 4, 152064, False),
    "Qwen/Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151936, True),
    "Qwen/Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 151936, True),
    "meta-llama/Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128256, True),
    "meta-llama/Llama-3.2-1B": (16, 2048, 8192, 32, 8, 128256, True),
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    name: (_QWEN25 if name.startswith("Qwen/") else _LLAMA32) | dict(zip(_KEYS, sizes, strict=True))
    for name, sizes in _SIZES.items()
}
