"""The table of model families: what Hugging Face's class of each computes and takes for granted.

A family is one entry: which spec its layers have, which keys of ``config.json`` it reads beyond
those that all families have, and the values that transformers takes where a key is absent
(transformers 5.x configuration classes, read one by one).

Left out on purpose: linear and latent attention, dense layers among mixtures of experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kava_jax.hf.values import of_each_layer, positive_int

Config = Mapping[str, Any]
# Of a config and the number of a layer; the last is what messages call the model.
Rule = Callable[[Config, int, str], bool]


class Scale(NamedTuple):
    """A number of ``config.json`` that scales or caps something."""

    name: str
    """The field of DecoderSpec."""
    default: float | None
    power: float = 1.0
    """The field is the number to this power."""


@dataclass(frozen=True)
class Family:
    """One ``model_type``."""

    models: str
    """Which models are of it."""
    architecture: str
    max_position_embeddings: int
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    bias_keys: tuple[str, ...] = ()
    """The keys that switch biases on. Without them there are none but those of ``layers``."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = False
    layers: Mapping[str, Any] = field(default_factory=dict)
    """Fields of DecoderSpec that are the same in every model of the family."""
    scales: Mapping[str, Scale] = field(default_factory=dict)
    """By key of ``config.json``."""
    activation_key: str = "hidden_act"
    inner_key: str = "intermediate_size"
    """The key of the feed-forward width, or of each expert's."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """What transformers takes for sizes that public files leave out."""
    experts: Mapping[str, tuple[str, int | bool]] = field(default_factory=dict)
    """By key of ``config.json``, a field about experts and its value where the key is absent."""
    sliding_window: int | None = None
    slides: Rule | None = None
    """Which layers slide where ``layer_types`` does not say; None: all, and it is not read."""
    switch: str | None = None
    """The key that switches sliding on; None: it is on where there is a window."""
    never_slides: bool = False
    partial_rotary: bool = False
    sliding_rope_theta: float | None = None
    """The base of sliding layers, which the family rotates by themselves."""
    skips_rotation: Rule | None = None
    """Which layers are not rotated; None: every layer is."""

    def reads(self, key: str) -> bool:
        """Whether a key that changes the layers of other models is this family's own."""
        own = {*self.scales, *self.experts}
        if self.skips_rotation is not None:
            own |= {"no_rope_layers", "no_rope_layer_interval"}
        if self.experts:  # as transformers 5 writes their number, whatever the family
            own.add("num_local_experts")
        return key in own


def _pattern(config: Config, where: str) -> int:
    """Gemma 3: of so many layers the last one sees everything."""
    return positive_int(config, "sliding_window_pattern", where, default=6)


def _full_layers(config: Config, where: str) -> int:
    """Qwen: how many layers see everything before the sliding ones."""
    if config.get("max_window_layers") == 0:
        return 0
    return positive_int(config, "max_window_layers", where, default=28)


def _unrotated(config: Config, layer: int, where: str) -> bool:
    """SmolLM3: a 0 in the list, or else the last of every few layers."""
    if (listed := of_each_layer(config, "no_rope_layers", where)) is None:
        every = positive_int(config, "no_rope_layer_interval", where, default=4)
        return (layer + 1) % every == 0
    return not listed[layer]


_QWEN: dict[str, Any] = {
    "switch": "use_sliding_window",
    "sliding_window": 4096,
    "slides": lambda config, layer, where: layer >= _full_layers(config, where),
}
_GEMMA: dict[str, Any] = {
    "bias_keys": ("attention_bias",),
    "tied": True,
    "activation_key": "hidden_activation",
    "sliding_window": 4096,
}
_GEMMA_LAYERS = {
    "norm_places": "both",
    "norm_style": "offset",
    "activation": "gelu_tanh",
    "embedding_by_width": True,
}


def _gemma_scales(attention_cap: float | None, logit_cap: float | None) -> dict[str, Scale]:
    return {
        "query_pre_attn_scalar": Scale("attention_scale", 256, -0.5),
        "attn_logit_softcapping": Scale("attention_cap", attention_cap),
        "final_logit_softcapping": Scale("logit_cap", logit_cap),
    }


# Models that read images, too, with the architecture of the text part that is read here.
TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}

FAMILIES = {
    "qwen2": Family(
        "Qwen2, Qwen2.5", "Qwen2ForCausalLM", 32768, 32, layers={"qkv_bias": True}, **_QWEN
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        32768,
        32,
        128,
        bias_keys=("attention_bias",),
        layers={"qk_norm": True},
        **_QWEN,
    ),
    "llama": Family(
        "Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2, TinyLlama, Yi",
        "LlamaForCausalLM",
        2048,
        bias_keys=("attention_bias", "mlp_bias"),
        never_slides=True,
    ),
    "mistral": Family(
        "Mistral 7B, Mistral Nemo, Ministral 8B",
        "MistralForCausalLM",
        131072,
        8,
        sliding_window=4096,
    ),
    "ministral": Family(
        "Ministral of transformers 5",
        "MinistralForCausalLM",
        131072,
        8,
        sliding_window=4096,
        slides=lambda _config, _layer, _where: True,
    ),
    "gemma2": Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        8192,
        4,
        256,
        layers=_GEMMA_LAYERS,
        scales=_gemma_scales(50.0, 30.0),
        slides=lambda _config, layer, _where: layer % 2 == 0,
        **_GEMMA,
    ),
    "gemma3_text": Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        131072,
        4,
        256,
        rope_theta=1e6,
        sliding_rope_theta=1e4,
        sizes={"vocab_size": 262208, "num_attention_heads": 8},
        layers=_GEMMA_LAYERS | {"qk_norm": True},
        scales=_gemma_scales(None, None),
        slides=lambda config, layer, where: (layer + 1) % _pattern(config, where) != 0,
        **_GEMMA,
    ),
    "phi3": Family(
        "Phi-3, Phi-3.5, Phi-4-mini",
        "Phi3ForCausalLM",
        4096,
        norm_eps=1e-5,
        layers={"projections": "fused"},
        partial_rotary=True,
    ),
    "olmo2": Family(
        "OLMo 2",
        "Olmo2ForCausalLM",
        2048,
        bias_keys=("attention_bias",),
        norm_eps=1e-5,
        layers={
            "norm_places": "after",
            "norm_style": "wide",
            "qk_norm": True,
            "qk_norm_over_heads": True,
        },
        never_slides=True,
    ),
    "smollm3": Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        32768,
        4,
        bias_keys=("attention_bias", "mlp_bias"),
        rope_theta=2e6,
        tied=True,
        switch="use_sliding_window",
        slides=_unrotated,
        skips_rotation=_unrotated,
    ),
    "mixtral": Family(
        "Mixtral",
        "MixtralForCausalLM",
        131072,
        8,
        rope_theta=1e6,
        norm_eps=1e-5,
        layers={"projections": "block_sparse_moe", "experts_normalised": True},
        experts={
            "num_local_experts": ("num_experts", 8),
            "num_experts_per_tok": ("experts_per_token", 2),
        },
    ),
    "qwen3_moe": Family(
        "Qwen3 30B-A3B, 235B-A22B",
        "Qwen3MoeForCausalLM",
        32768,
        4,
        bias_keys=("attention_bias",),
        layers={"projections": "experts", "qk_norm": True},
        inner_key="moe_intermediate_size",
        experts={
            "num_experts": ("num_experts", 128),
            "num_experts_per_tok": ("experts_per_token", 8),
            "norm_topk_prob": ("experts_normalised", False),
        },
        switch="use_sliding_window",
        sliding_window=4096,
    ),
    "granite": Family(
        "Granite 3",
        "GraniteForCausalLM",
        2048,
        bias_keys=("attention_bias", "mlp_bias"),
        scales={
            "embedding_multiplier": Scale("embedding_scale", 1.0),
            "residual_multiplier": Scale("residual_scale", 1.0),
            "attention_multiplier": Scale("attention_scale", 1.0),
            "logits_scaling": Scale("logit_scale", 1.0, -1.0),
        },
        never_slides=True,
    ),
}
