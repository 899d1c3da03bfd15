"""kava_jax: KV-cache distillation in JAX.

The public names are loaded on first use, so that importing the package costs nothing and starts
no JAX backend::

    from kava_jax import KVDimensionProjector, MercatorKVLoss

    projector = KVDimensionProjector({"teacher": {"d_model": 1024}}, student_d_model=256)
    target = projector.project_teacher_kv("teacher", teacher_kv)
    loss, metrics = MercatorKVLoss()(student_kv, target)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kava_jax.alignment.projector import KVDimensionProjector
    from kava_jax.cache import KVCache
    from kava_jax.errors import KavaError
    from kava_jax.geometry import angular_distance
    from kava_jax.hf.handoff_files import dynamic_cache, load_handoff
    from kava_jax.hf.load import load_model
    from kava_jax.losses import HybridKVLoss, MercatorKVLoss, alignment_accuracy
    from kava_jax.models.decoder import Decoder
    from kava_jax.models.generate import generate
    from kava_jax.models.masks import attention_mask, token_positions
    from kava_jax.models.spec import DecoderSpec

_HOMES = {
    "Decoder": "models.decoder",
    "DecoderSpec": "models.spec",
    "HybridKVLoss": "losses",
    "KVCache": "cache",
    "KVDimensionProjector": "alignment.projector",
    "KavaError": "errors",
    "MercatorKVLoss": "losses",
    "alignment_accuracy": "losses",
    "angular_distance": "geometry",
    "attention_mask": "models.masks",
    "dynamic_cache": "hf.handoff_files",
    "generate": "models.generate",
    "load_handoff": "hf.handoff_files",
    "load_model": "hf.load",
    "token_positions": "models.masks",
}

__all__ = [
    "Decoder",
    "DecoderSpec",
    "HybridKVLoss",
    "KVCache",
    "KVDimensionProjector",
    "KavaError",
    "MercatorKVLoss",
    "alignment_accuracy",
    "angular_distance",
    "attention_mask",
    "dynamic_cache",
    "generate",
    "load_handoff",
    "load_model",
    "token_positions",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kava_jax' has no attribute {name!r}")
    return getattr(import_module(f"kava_jax.{_HOMES[name]}"), name)
