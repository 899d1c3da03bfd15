"""``config.json`` in, ``DecoderSpec`` out, and back.

The only place that knows how Hugging Face spells a model's geometry. Absent keys get the value
transformers would give them (transformers 5.x configuration classes, read one by one). Two
generations of spellings are understood and written: up to 4.x ``rope_theta``, ``rope_scaling``
and ``torch_dtype`` at the top level; from 5.0 ``rope_parameters`` and ``dtype``.

RoPE has a file of its own (``hf.rope_keys``). Left out on purpose: layers of different kinds in one
model, quantized checkpoints (the command that converts them is said), mixture of experts. They are
refused by name, never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kava_jax.errors import KavaError
from kava_jax.hf.config_keys import NUMBERS, REQUIRED_SIZES, SIZES, refused
from kava_jax.hf.rope_keys import read_rope, rope_config
from kava_jax.hf.values import positive_float, positive_int, true_or_false
from kava_jax.models.spec import DecoderSpec

FloatName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Family:
    """What transformers assumes for a ``model_type`` when ``config.json`` does not say."""

    architecture: str
    num_kv_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int
    sliding_window: int | None = None
    qkv_bias: bool | None = None  # None: follows the config's attention_bias
    output_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", 32, None, 32768, qkv_bias=True, output_bias=False),
    "qwen3": Family("Qwen3ForCausalLM", 32, 128, 32768, qk_norm=True),
    "llama": Family("LlamaForCausalLM", None, None, 2048, mlp_bias=None),
    "mistral": Family(
        "MistralForCausalLM", 8, None, 131072, 4096, qkv_bias=False, output_bias=False
    ),
}

# Which key switches which biases on in families that leave it to the config.
_SWITCHES = {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"}


def spec_from_config(config: Mapping[str, Any], *, where: str) -> DecoderSpec:
    """Read the geometry of a dense RoPE decoder from a parsed ``config.json``.

    Args:
        config: the parsed JSON object.
        where: what to call this model in messages, such as its directory or ``student.path``.

    Raises:
        KavaError: for an unknown architecture, a missing or impossible value, or a feature this
            decoder does not have; the message names the key, its value and the remedy.
    """
    name, family = _family(config, where)
    _refuse_unsupported(config, name, where)
    if missing := [key for key in REQUIRED_SIZES if config.get(key) is None]:
        raise KavaError(f"{where}: config.json lacks {', '.join(missing)}; add what the model has")
    heads = positive_int(config, "num_attention_heads", where)
    # A null is not an absent key here: transformers then takes as many as there are query heads.
    kv_heads = None if "num_key_value_heads" in config else family.num_kv_heads
    defaults = {
        "num_key_value_heads": kv_heads or heads,
        "head_dim": family.head_dim or max(positive_int(config, "hidden_size", where) // heads, 1),
        "max_position_embeddings": family.max_position_embeddings,
    }
    fields: dict[str, Any] = {
        field: positive_int(config, key, where, default=defaults.get(key))
        for key, field in SIZES.items()
    }
    if heads % fields["num_kv_heads"]:
        raise KavaError(
            f"{where}: num_key_value_heads={fields['num_kv_heads']} does not divide "
            f"num_attention_heads={heads}; correct config.json"
        )
    head_dim, positions = fields["head_dim"], fields["max_position_embeddings"]
    if head_dim % 2:
        raise KavaError(f"{where}: head_dim={head_dim} is odd; RoPE needs an even head_dim")
    for key, (field, default) in NUMBERS.items():
        fields[field] = positive_float(config, key, where, default=default)
    for field, key in _SWITCHES.items():
        fixed, asked = getattr(family, field), true_or_false(config, key, where)
        fields[field] = asked if fixed is None else fixed
    rope_theta, rope_scaling = read_rope(
        config, positions=positions, head_dim=head_dim, where=where
    )
    return DecoderSpec(
        family=name,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=true_or_false(config, "tie_word_embeddings", where),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(config, name, family, where),
        **fields,
    )


def config_from_spec(spec: DecoderSpec, *, dtype: FloatName) -> dict[str, Any]:
    """Write the geometry as a ``config.json`` object that transformers 4.x and 5.x both read.

    Raises:
        KavaError: when the family's Hugging Face class has no way to express the spec.
    """
    family = _expressible(spec)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": spec.family,
        **{key: getattr(spec, field) for key, field in SIZES.items()},
        **{key: getattr(spec, field) for key, (field, _) in NUMBERS.items()},
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tie_embeddings,
        **rope_config(spec),
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    for field, key in _SWITCHES.items():
        if getattr(family, field) is None:
            config[key] = getattr(spec, field)
    if spec.family == "mistral":
        config["sliding_window"] = spec.sliding_window
    if spec.family in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": False, "sliding_window": None}
    return config


def _family(config: Mapping[str, Any], where: str) -> tuple[str, Family]:
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    # As transformers writes it for a model that was saved without its head.
    bases = {a.replace("ForCausalLM", "Model"): name for a, name in by_architecture.items()}
    # model_type alone would let Qwen2ForSequenceClassification through, architectures alone would
    # refuse a config written by hand; both must agree where both are given.
    known = by_architecture | bases
    names = {known.get(a) for a in architectures} | ({model_type} - {None})
    if len(names) != 1 or (name := names.pop()) not in FAMILIES:
        raise KavaError(
            f"{where}: architectures={architectures} with model_type={model_type!r} is not "
            f"supported; use one of {', '.join(sorted(by_architecture))}"
        )
    return name, FAMILIES[name]


def _refuse_unsupported(config: Mapping[str, Any], name: str, where: str) -> None:
    faults = []
    if (quantized := config.get("quantization_config")) is not None:
        faults.append(_quantized(quantized))
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        faults.append(f"hidden_act={act!r} is not supported; only silu is")
    if name in ("qwen2", "qwen3") and true_or_false(config, "use_sliding_window", where):
        faults.append(
            "use_sliding_window=true is not supported for Qwen; set it to false to use full "
            "attention in every layer"
        )
    if name == "llama" and (window := config.get("sliding_window")) is not None:
        longest = config.get("max_position_embeddings") or FAMILIES[name].max_position_embeddings
        # A window of at least the longest row the model is made for changes nothing.
        if not isinstance(window, int) or window < longest:
            faults.append(
                f"sliding_window={window!r} has no effect on Llama in transformers; set it to "
                "null, or use MistralForCausalLM, which has one"
            )
    kinds = set(config.get("layer_types") or [])
    # Mistral's class reads sliding_window alone and gives all its layers the same mask.
    allowed = {"sliding_attention", "full_attention"} if name == "mistral" else {"full_attention"}
    if len(kinds) > 1 or not kinds <= allowed:
        faults.append(
            f"layer_types has {sorted(map(str, kinds))}; only models whose layers are all "
            "full_attention are supported"
        )
    faults += refused(config)
    if faults:
        raise KavaError(f"{where}: config.json: " + "; ".join(faults))


# Commands that write a quantized model in bfloat16. DIR is the model and NEW a new directory.
# Without save_original_format transformers writes fp8 tensors again, and says nothing.
_FP8 = """python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T, \
FineGrainedFP8Config as Q; T.from_pretrained('DIR').save_pretrained('NEW'); \
M.from_pretrained('DIR', dtype='bfloat16', quantization_config=Q(dequantize=True))\
.save_pretrained('NEW', save_original_format=False)\""""
_GPTQ = """python -c "from gptqmodel.utils.model_dequant import dequantize_model as d; \
d('DIR', 'NEW')" (after: pip install gptqmodel)"""
# Written out, because gptqmodel (7.7.0) reads the eight numbers of a word in the wrong order.
_AWQ = """python -c "import glob, torch, transformers as T; \
from safetensors.torch import load_file; \
t = {n: x for f in glob.glob('DIR/*.safetensors') for n, x in load_file(f).items()}; \
u = lambda q: (q[..., None] >> torch.tensor([0, 16, 4, 20, 8, 24, 12, 28]) & 15).flatten(-2); \
d = lambda q, z, s: ((u(q).unflatten(0, (len(s), -1)) - u(z)[:, None]) * s[:, None].float())\
.flatten(0, 1).T; \
w = {n[:-7] + 'weight': d(x, t[n[:-7] + 'qzeros'], t[n[:-7] + 'scales']) \
for n, x in t.items() if n.endswith('.qweight')}; \
r = {n: x for n, x in t.items() if not n.endswith(('.qweight', '.qzeros', '.scales'))}; \
c = T.AutoConfig.from_pretrained('DIR'); del c.quantization_config; \
getattr(T, c.architectures[0]).from_pretrained(None, config=c, state_dict=w | r, \
dtype='bfloat16').save_pretrained('NEW'); \
T.AutoTokenizer.from_pretrained('DIR').save_pretrained('NEW')\""""


def _quantized(quantization: Any) -> str:
    known = quantization if isinstance(quantization, Mapping) else {}
    method = known.get("quant_method")
    said = (
        f"quantization_config with quant_method={method!r} is not read; use the checkpoint that "
        "this one was quantized from"
    )
    commands = {"fp8": _FP8, "gptq": _GPTQ}
    if known.get("bits") == 4 and str(known.get("version", "gemm")).lower() == "gemm":
        commands["awq"] = _AWQ
    if method not in commands:
        return said
    return f"{said}, or convert it (DIR: this model, NEW: a new directory): {commands[method]}"


def _sliding_window(config: Mapping[str, Any], name: str, family: Family, where: str) -> int | None:
    if name != "mistral" or ("sliding_window" in config and config["sliding_window"] is None):
        return None
    return positive_int(config, "sliding_window", where, default=family.sliding_window)


def _expressible(spec: DecoderSpec) -> Family:
    if spec.family not in FAMILIES:
        raise KavaError(f"family={spec.family!r} is unknown; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[spec.family]
    faults = []
    for field in _SWITCHES:
        fixed = getattr(family, field)
        if fixed is not None and getattr(spec, field) != fixed:
            faults.append(f"{field}={getattr(spec, field)} (always {fixed})")
    if family.qkv_bias is None and spec.qkv_bias != spec.output_bias:
        faults.append(f"qkv_bias={spec.qkv_bias} with output_bias={spec.output_bias} (one switch)")
    if spec.qk_norm != family.qk_norm:
        faults.append(f"qk_norm={spec.qk_norm} (always {family.qk_norm})")
    if spec.sliding_window is not None and spec.family != "mistral":
        faults.append(f"sliding_window={spec.sliding_window} (only mistral has one)")
    if faults:
        raise KavaError(f"family={spec.family} cannot express {', '.join(faults)}; change the spec")
    return family
