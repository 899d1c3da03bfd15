"""The geometry of a dense RoPE decoder: Qwen2/2.5, Qwen3, Llama 2/3, Mistral or SmolLM.

Differences between these families are fields here, not branches elsewhere. ``hf`` reads it from a
Hugging Face ``config.json`` and writes it back.
"""

from dataclasses import dataclass


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
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048

    @property
    def kv_width(self) -> int:
        """Width of one layer's flattened keys (or values) of one token."""
        return self.num_kv_heads * self.head_dim
