"""The geometry of a RoPE decoder of any supported family (``hf.config_json.FAMILIES``).

Differences between these families are fields here, not branches elsewhere, and so are differences
between the layers of one model. ``hf`` reads a spec from a Hugging Face ``config.json`` and writes
it back.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class LinearRopeScaling:
    """Every frequency divided by ``factor`` (``rope_type: linear``)."""

    factor: float


@dataclass(frozen=True)
class DynamicRopeScaling:
    """The base grows with rows longer than ``max_position_embeddings`` (``dynamic``, NTK)."""

    factor: float


@dataclass(frozen=True)
class YarnRopeScaling:
    """Low frequencies divided by ``factor``, high ones kept, attention scaled (``yarn``)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    # 32 and 1 turns in the original length are the values of YaRN's authors.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """A divisor per frequency: one list up to the original length, one beyond (``longrope``)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 and later (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = (
    LinearRopeScaling | DynamicRopeScaling | YarnRopeScaling | LongRopeScaling | Llama3RopeScaling
)


@dataclass(frozen=True)
class Rope:
    """How the keys and queries of a layer are rotated."""

    theta: float
    dim: int
    """How many of a head's numbers are rotated, the first ones."""
    scaling: RopeScaling | None
    longest: int
    """The model's ``max_position_embeddings``."""


LayerType = Literal["full_attention", "sliding_attention"]
Projections = Literal["separate", "fused", "experts", "block_sparse_moe"]
"""How Hugging Face stores projections: each as a tensor; q, k and v as one and gate and up as
another; or a tensor for each expert, under one of two names."""
NormPlaces = Literal["before", "after", "both"]
"""Where attention and MLP are normed: their inputs, their outputs, or both."""
NormStyle = Literal["plain", "wide", "offset"]
"""How a norm scales: after rounding to the compute dtype, before it, or before it by ``1 + scale``.
"""


@dataclass(frozen=True)
class DecoderSpec:
    """Static shape of a decoder; no width is derived from another.

    ``head_dim`` need not be ``hidden_size / num_heads``. KV width is ``num_kv_heads * head_dim``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    """Whether the norms of queries and keys run over all heads of a token at once."""
    projections: Projections = "separate"
    norm_places: NormPlaces = "before"
    norm_style: NormStyle = "plain"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    num_experts: int = 0
    """Of each layer; 0 is one MLP for all tokens, and ``intermediate_size`` is each expert's."""
    experts_per_token: int = 0
    experts_normalised: bool = False
    """Whether the weights of a token's experts are divided by their sum."""
    embedding_scale: float = 1.0
    embedding_by_width: bool = False
    """Whether embeddings are multiplied by ``sqrt(hidden_size)``, too."""
    residual_scale: float = 1.0
    """What attention and MLP are multiplied by before they are added."""
    attention_scale: float | None = None
    """What scores are multiplied by; None: ``head_dim ** -0.5``."""
    attention_cap: float | None = None
    """Scores become ``cap * tanh(score / cap)``; None: they stay."""
    logit_scale: float = 1.0
    logit_cap: float | None = None
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """How many tokens a query sees, its own among them, in the layers that slide; None: all."""
    layer_types: tuple[LayerType, ...] | None = None
    """Which layers slide; None: all of them, where there is a window."""
    sliding_rope_theta: float | None = None
    """The base of sliding layers, which then have no scaling; None: as the others."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers whose keys and queries are not rotated."""
    rotary_dim: int | None = None
    """How many of a head's numbers are rotated, the first ones; None: all."""
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048

    @property
    def kv_width(self) -> int:
        """Width of one layer's flattened keys (or values) of one token."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of every layer."""
        types = self.layer_types or ("sliding_attention",) * self.num_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in types)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that any layer has, each once, in the order of the layers."""
        return tuple(dict.fromkeys(self.layer_windows))

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """The rotation of every layer; None for a layer without one."""
        dim, longest = self.rotary_dim or self.head_dim, self.max_position_embeddings
        own = plain = Rope(self.rope_theta, dim, self.rope_scaling, longest)
        if self.sliding_rope_theta is not None:
            own = Rope(self.sliding_rope_theta, dim, None, longest)
        types = self.layer_types or ("full_attention",) * self.num_layers
        return tuple(
            None if layer in self.unrotated_layers else own if "sliding" in kind else plain
            for layer, kind in enumerate(types)
        )

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rotations that any layer has, each once, in the order of the layers."""
        return tuple(dict.fromkeys(self.layer_ropes))

    def among(self, layers: tuple[int, ...]) -> "DecoderSpec":
        """The spec of a model that keeps some of these layers."""
        types, free = self.layer_types, self.unrotated_layers
        if types is not None:
            types = tuple(types[layer] for layer in layers)
        still = types is not None and "sliding_attention" not in types
        return replace(
            self,
            num_layers=len(layers),
            layer_types=None if still else types,
            sliding_window=None if still else self.sliding_window,
            sliding_rope_theta=None if still else self.sliding_rope_theta,
            unrotated_layers=tuple(i for i, layer in enumerate(layers) if layer in free),
        )
