"""``config.json`` in, ``DecoderSpec`` out, and back.

The only place that knows how Hugging Face spells a model's geometry. Absent keys get the value
transformers would give them (transformers 5.x configuration classes, read one by one). Two
generations of spellings are understood and written: up to 4.x ``rope_theta``, ``rope_scaling``
and ``torch_dtype`` at the top level; from 5.0 ``rope_parameters`` and ``dtype``.

RoPE has a file of its own (``hf.rope_keys``), and so have the families. Left out on purpose:
quantized checkpoints (the command that converts them is said). They are refused by name, never
guessed.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from kava_jax.errors import KavaError
from kava_jax.hf.config_keys import OPTIONAL_SIZES, SIZES, refused
from kava_jax.hf.families import FAMILIES, TEXT_PARTS, Family
from kava_jax.hf.rope_keys import read_ropes, rope_config
from kava_jax.hf.values import of_each_layer, positive_float, positive_int, true_or_false
from kava_jax.models.spec import DecoderSpec, LayerType

FloatName = Literal["float32", "bfloat16", "float16"]

# Hugging Face's names of an activation; the first one is written.
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new")}
# Which key switches which biases on, in families that leave it to the config.
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
    config = text_part(config, where)
    name, family = _family(config, where)
    _refuse_unsupported(config, family, where)
    sizes = _sizes(family)
    needed = sizes.keys() - family.sizes.keys() - OPTIONAL_SIZES
    if missing := [key for key in sizes if key in needed and config.get(key) is None]:
        raise KavaError(f"{where}: config.json lacks {', '.join(missing)}; add what the model has")
    default = family.sizes.get("num_attention_heads")
    heads = positive_int(config, "num_attention_heads", where, default=default)
    # A null is not an absent key here: transformers then takes as many as there are query heads.
    kv_heads = None if "num_key_value_heads" in config else family.num_kv_heads
    defaults = {
        **family.sizes,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": family.head_dim or max(positive_int(config, "hidden_size", where) // heads, 1),
        "max_position_embeddings": family.max_position_embeddings,
    }
    fields: dict[str, Any] = {
        field: positive_int(config, key, where, default=defaults.get(key))
        for key, field in sizes.items()
    }
    if heads % fields["num_kv_heads"]:
        raise KavaError(
            f"{where}: num_key_value_heads={fields['num_kv_heads']} does not divide "
            f"num_attention_heads={heads}; correct config.json"
        )
    head_dim, positions = fields["head_dim"], fields["max_position_embeddings"]
    if head_dim % 2:
        raise KavaError(f"{where}: head_dim={head_dim} is odd; RoPE needs an even head_dim")
    fields["norm_eps"] = positive_float(config, "rms_norm_eps", where, default=family.norm_eps)
    fields["initializer_range"] = positive_float(config, "initializer_range", where, default=0.02)
    for field, key in _SWITCHES.items():
        fields[field] = true_or_false(config, key, where) and key in family.bias_keys
    fields |= _scales(config, family, where)
    fields |= _experts(config, family, where)
    fields |= _sliding(config, family, fields["num_layers"], where)
    ropes = read_ropes(config, family, positions, head_dim, where)
    if fields["sliding_window"] is None:  # no layer slides
        ropes["sliding_rope_theta"] = None
    skips = family.skips_rotation
    tied = config.get("tie_word_embeddings", family.tied)
    return DecoderSpec(
        family=name,
        tie_embeddings=true_or_false({"tie_word_embeddings": tied}, "tie_word_embeddings", where),
        unrotated_layers=tuple(
            layer
            for layer in range(fields["num_layers"])
            if skips is not None and skips(config, layer, where)
        ),
        **{**fields, **ropes, **family.layers},
    )


def text_part(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The text model's own config, where a model reads images, too; else ``config`` itself.

    Raises KavaError for such a model of an unknown architecture.
    """
    if "text_config" not in config or (inner := config["text_config"]) is None:
        return config
    names = config.get("architectures") or []
    parts = [TEXT_PARTS[name] for name in names if name in TEXT_PARTS]
    if not isinstance(inner, Mapping) or len(parts) != 1:
        raise KavaError(
            f"{where}: architectures={names} with a text_config is not supported; of models that "
            f"read more than text, {', '.join(TEXT_PARTS)} is"
        )
    return {**inner, "architectures": parts}


def config_from_spec(spec: DecoderSpec, *, dtype: FloatName) -> dict[str, Any]:
    """Write the geometry as a ``config.json`` object that transformers 4.x and 5.x both read.

    Raises:
        KavaError: when the family's Hugging Face class has no way to express the spec.
    """
    if spec.family not in FAMILIES:
        raise KavaError(f"family={spec.family!r} is unknown; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[spec.family]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": spec.family,
        **{key: getattr(spec, field) for key, field in _sizes(family).items()},
        **{key: getattr(spec, field) for key, (field, _) in family.experts.items()},
        "rms_norm_eps": spec.norm_eps,
        "initializer_range": spec.initializer_range,
        family.activation_key: _ACTIVATIONS[spec.activation][0],
        "tie_word_embeddings": spec.tie_embeddings,
        **rope_config(spec, family),
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    for field, key in _SWITCHES.items():
        if key in family.bias_keys:
            config[key] = getattr(spec, field)
    for key, (field, default, power) in family.scales.items():
        value = getattr(spec, field)
        # A power and its inverse may leave 168.00000000000003, and what is whole stays an integer.
        config[key] = None if value is None else round(value ** (1 / power), 9)
        if isinstance(default, int) and float(config[key] or 0.5).is_integer():
            config[key] = int(config[key])
    if not family.never_slides:
        # Classes with typed layers ask for a window even where none slides.
        needed = family.slides is not None and family.switch is None
        config["sliding_window"] = spec.sliding_window or (needed and family.sliding_window) or None
    if family.slides is not None and (spec.layer_types or family.switch is None):
        kinds = {True: "full_attention", False: "sliding_attention"}
        config["layer_types"] = [kinds[window is None] for window in spec.layer_windows]
    if family.switch is not None:
        config[family.switch] = spec.sliding_window is not None
    if family.skips_rotation is not None:
        free = spec.unrotated_layers
        config["no_rope_layers"] = [int(i not in free) for i in range(spec.num_layers)]
    _check_written(spec, config)
    return config


def _check_written(spec: DecoderSpec, config: Mapping[str, Any]) -> None:
    """Raise KavaError where the config would be read as another spec."""
    again = spec_from_config(config, where=f"family={spec.family}")
    if faults := [
        f"{field}={value} (reads as {getattr(again, field)})"
        for field, value in vars(spec).items()
        if getattr(again, field) != value
    ]:
        raise KavaError(f"family={spec.family} cannot express {', '.join(faults)}; change the spec")


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
            f"supported; use one of {', '.join(sorted(by_architecture))}{_no_cache(config)}"
        )
    return name, FAMILIES[name]


def _no_cache(config: Mapping[str, Any]) -> str:
    """Why the caches of some models cannot be compared, whoever reads them."""
    kinds = {*(config.get("layer_types") or ()), *(config.get("block_types") or ())}
    if config.get("kv_lora_rank") is not None:
        return " (its attention is latent: one vector for all heads in place of keys and values)"
    if kinds & {"linear_attention", "mamba", "conv", "recurrent"}:
        return " (some of its layers are linear or convolutions and have no keys and values)"
    return ""


def _refuse_unsupported(config: Mapping[str, Any], family: Family, where: str) -> None:
    faults = []
    if (quantized := config.get("quantization_config")) is not None:
        faults.append(_quantized(quantized))
    wanted = _ACTIVATIONS[family.layers.get("activation", "silu")]
    if (act := config.get(family.activation_key) or wanted[0]) not in wanted:
        faults.append(f"{family.activation_key}={act!r} is not supported; only {wanted[0]} is")
    if true_or_false(config, "use_bidirectional_attention", where):
        faults.append("use_bidirectional_attention=true is not supported; use a causal model")
    if family.never_slides and (window := config.get("sliding_window")) is not None:
        longest = config.get("max_position_embeddings") or family.max_position_embeddings
        # A window of at least the longest row the model is made for changes nothing.
        if not isinstance(window, int) or window < longest:
            faults.append(
                f"sliding_window={window!r} has no effect on {family.architecture} in "
                "transformers; set it to null, or use a family that has one"
            )
    faults += refused(config, family)
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


def _scales(config: Mapping[str, Any], family: Family, where: str) -> dict[str, float | None]:
    """The fields that scale or cap something."""
    found: dict[str, float | None] = {}
    for key, (field, default, power) in family.scales.items():
        value = config.get(key, default)
        # No cap is no fault; a scale has to be a number.
        uncapped = value is None and field.endswith("_cap")
        found[field] = None if uncapped else positive_float({key: value}, key, where) ** power
    return found


def _sizes(family: Family) -> dict[str, str]:
    """The keys of sizes, with the field for each."""
    inner = {"intermediate_size": family.inner_key}
    return {inner.get(key, key): field for key, field in SIZES.items()}


def _experts(config: Mapping[str, Any], family: Family, where: str) -> dict[str, int | bool]:
    """The fields about experts."""
    found: dict[str, int | bool] = {}
    counts = {config.get(key) for key in ("num_experts", "num_local_experts")} - {None}
    if len(counts) > 1 and family.experts:
        raise KavaError(
            f"{where}: config.json has num_experts={config['num_experts']} and "
            f"num_local_experts={config['num_local_experts']}; make them agree"
        )
    for key, (field, default) in family.experts.items():
        given = {key: config.get(key, default)}
        if field == "num_experts" and counts:
            given = {key: counts.pop()}
        read = true_or_false if isinstance(default, bool) else positive_int
        found[field] = read(given, key, where)
    if found.get("experts_per_token", 0) > found.get("num_experts", 0):
        raise KavaError(
            f"{where}: num_experts_per_tok={found['experts_per_token']} of "
            f"{found['num_experts']} experts; correct config.json"
        )
    return found


def _sliding(
    config: Mapping[str, Any], family: Family, depth: int, where: str
) -> dict[str, int | tuple[LayerType, ...] | None]:
    """The window, and which layers have it."""
    kinds = _layer_types(config, where)
    on = family.switch is None or true_or_false(config, family.switch, where)
    on = on and not family.never_slides
    window = config.get("sliding_window", family.sliding_window) if on else None
    by_layer = family.slides is not None or family.never_slides
    if window is None:
        if by_layer and kinds and "sliding_attention" in kinds:
            raise KavaError(
                f"{where}: config.json: layer_types has sliding_attention, and there is no "
                f"sliding_window in this {family.architecture}; correct one of them"
            )
        return {"sliding_window": None, "layer_types": None}
    window = positive_int({"sliding_window": window}, "sliding_window", where)
    if family.slides is None:
        if kinds and len(set(kinds)) > 1:
            raise KavaError(
                f"{where}: config.json: layer_types mixes types, and {family.architecture} gives "
                "all its layers the same mask; correct it"
            )
        return {"sliding_window": window, "layer_types": None}
    kinds = kinds or tuple(
        "sliding_attention" if family.slides(config, layer, where) else "full_attention"
        for layer in range(depth)
    )
    if "sliding_attention" not in kinds:
        return {"sliding_window": None, "layer_types": None}
    return {"sliding_window": window, "layer_types": kinds}


def _layer_types(config: Mapping[str, Any], where: str) -> tuple[LayerType, ...] | None:
    """The given types, one for each layer, of the two that are known."""
    given = of_each_layer(config, "layer_types", where)
    if given is None:
        return None
    if unknown := sorted({str(kind) for kind in given} - {*get_args(LayerType)}):
        raise KavaError(
            f"{where}: config.json: layer_types has {', '.join(unknown)}; only models whose layers "
            f"are {' or '.join(get_args(LayerType))} are supported"
        )
    return tuple(given)
