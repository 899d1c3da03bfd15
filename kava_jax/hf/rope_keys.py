"""RoPE settings out of ``config.json`` and back.

Hugging Face has spelt them in four ways: ``rope_theta`` and ``rope_scaling`` (with ``type``, later
``rope_type``), from transformers 5.0 ``rope_parameters``, and that keyed by the type of layer.
Where several are given they must agree. A key that the rope type does not know is refused: it is a
misspelt one, or a scaling that this decoder does not have.

The fields of the scalings in ``models.spec`` are Hugging Face's own keys, so each class says what
its type takes and demands.

A family may rotate its sliding layers by a base of their own, or a part of each head alone. Left
out on purpose: scaled rotations of sliding layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from kava_jax.errors import KavaError
from kava_jax.hf.families import Family
from kava_jax.hf.values import positive_float, positive_int, true_or_false
from kava_jax.models.spec import (
    DecoderSpec,
    DynamicRopeScaling,
    LayerType,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

ROPE_TYPES: dict[str, type[RopeScaling]] = {
    "linear": LinearRopeScaling,
    "dynamic": DynamicRopeScaling,
    "yarn": YarnRopeScaling,
    "longrope": LongRopeScaling,
    "llama3": Llama3RopeScaling,
}
_ORIGINAL = "original_max_position_embeddings"


def read_ropes(
    config: Mapping[str, Any], family: Family, positions: int, head_dim: int, where: str
) -> dict[str, Any]:
    """The fields of DecoderSpec that say how keys are rotated.

    Args:
        config: the parsed ``config.json``.
        family: the model's.
        positions: its ``max_position_embeddings``.
        head_dim: how many numbers a head has.
        where: what to call the model in messages.

    Raises:
        KavaError: two spellings disagree, the type is unknown, or a value is missing, unknown or
            impossible.
    """
    sliding = None
    if family.sliding_rope_theta is not None:
        config, own = _by_type(config, where)
        sliding, scaled, _ = _rope(own, family.sliding_rope_theta, family, 1, head_dim, where)
        if scaled is not None:
            raise KavaError(
                f"{where}: config.json scales the rotation of its sliding layers, which is not "
                "supported; use a model that scales that of the others alone"
            )
    theta, scaling, dim = _rope(config, family.rope_theta, family, positions, head_dim, where)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_rope_theta": sliding,
        "rotary_dim": None if dim == head_dim else dim,
    }


def _by_type(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as full layers read it, and as sliding layers do."""
    # Up to 4.x the sliding layers' base has a key of its own, and a scaling is that of the others.
    rest = {key: value for key, value in config.items() if key != "rope_parameters"}
    given = config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or {*given} - {*get_args(LayerType)}:
        raise KavaError(
            f"{where}: rope_parameters={given!r} needs an object for each of "
            f"{', '.join(get_args(LayerType))}; correct it"
        )
    full = rest | {"rope_parameters": given.get("full_attention")}
    local = {"rope_theta": config.get("rope_local_base_freq")}
    return full, local | {"rope_parameters": given.get("sliding_attention")}


def _rope(
    config: Mapping[str, Any],
    theta: float,
    family: Family,
    positions: int,
    head_dim: int,
    where: str,
) -> tuple[float, RopeScaling | None, int]:
    """Base, scaling, and how many numbers of a head are rotated; ``theta`` where none is given."""
    seen = _merged(config, where)
    theta = positive_float(seen, "rope_theta", where, default=theta)
    seen.pop("rope_theta", None)
    kind = seen.pop("rope_type", None)
    kind = "longrope" if kind == "su" and family.partial_rotary else kind
    partial = positive_float(seen, "partial_rotary_factor", where, default=1.0)
    seen.pop("partial_rotary_factor", None)
    if partial != 1.0 and not family.partial_rotary:
        raise KavaError(
            f"{where}: partial_rotary_factor={partial} is not supported for "
            f"{family.architecture}; use a model that rotates the whole head (1.0)"
        )
    dim = int(head_dim * partial)
    if not 2 <= dim <= head_dim or dim % 2:
        raise KavaError(
            f"{where}: partial_rotary_factor={partial} rotates {dim} of head_dim={head_dim} "
            "numbers; it must be an even number of them"
        )
    if kind in (None, "default"):
        if seen:
            raise KavaError(
                f"{where}: config.json: rope_type={kind!r} does not take {_given(seen)}; set "
                f"rope_type to what the model was trained with ({', '.join(ROPE_TYPES)}), or "
                "remove them"
            )
        return theta, None, dim
    if kind not in ROPE_TYPES:
        renamed = "; it is called longrope now" if kind == "su" else ""
        raise KavaError(
            f"{where}: rope_type={kind!r} is not supported; use a model with one of default, "
            f"{', '.join(ROPE_TYPES)}{renamed}"
        )
    scaling = ROPE_TYPES[kind]
    # transformers does not read the original length for these two: linear needs no length, and
    # dynamic counts from max_position_embeddings.
    if scaling not in (LinearRopeScaling, DynamicRopeScaling):
        _add(seen, _ORIGINAL, config.get(_ORIGINAL), where)
    if scaling is DynamicRopeScaling and seen.pop(_ORIGINAL, positions) != positions:
        raise KavaError(
            f"{where}: config.json: rope_type='dynamic' counts from "
            f"max_position_embeddings={positions}, and {_ORIGINAL} is another length; make "
            "max_position_embeddings the length before scaling and remove the other"
        )
    if scaling is LongRopeScaling:
        _set_attention_factor(seen, positions, where)
    found = _scaling(kind, seen, positions, where)
    _check(found, kind, theta, dim, where)
    return theta, found, dim


def rope_config(spec: DecoderSpec, family: Family) -> dict[str, Any]:
    """The same for ``config.json``, in the spellings of transformers 4.x and 5.x."""
    config: dict[str, Any] = {"rope_theta": spec.rope_theta, "rope_scaling": None}
    scaling = spec.rope_scaling
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        kind["rope_type"] = next(n for n, known in ROPE_TYPES.items() if type(scaling) is known)
        for field in dataclasses.fields(scaling):
            if (value := getattr(scaling, field.name)) != field.default:
                kind[field.name] = list(value) if isinstance(value, tuple) else value
        config["rope_scaling"] = kind
    if isinstance(scaling, LongRopeScaling):
        # Before 5.0 this type looked for the original length here alone.
        config[_ORIGINAL] = scaling.original_max_position_embeddings
    own = {"rope_theta": spec.rope_theta} | kind
    if family.partial_rotary:
        part = {"partial_rotary_factor": (spec.rotary_dim or spec.head_dim) / spec.head_dim}
        config, own = config | part, own | part
    if family.sliding_rope_theta is None:
        return config | {"rope_parameters": own}
    local = spec.sliding_rope_theta or family.sliding_rope_theta
    config["rope_local_base_freq"] = local
    return config | {
        "rope_parameters": {
            "full_attention": own,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    }


def _merged(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every key that any spelling gives, once."""
    seen: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        _add_all(seen, config.get(name) or {}, name, where)
    for key in ("rope_theta", "partial_rotary_factor"):
        _add(seen, key, config.get(key), where)
    # A note in the files of YaRN's authors (arXiv 2309.00071), of which the frequencies know
    # nothing.
    seen.pop("finetuned", None)
    return seen


def _add_all(seen: dict[str, Any], spelling: Any, name: str, where: str) -> None:
    """What one spelling gives, including the objects of the types of layer in it."""
    if not isinstance(spelling, Mapping):
        raise KavaError(
            f"{where}: {name}={spelling!r} is not an object that says how keys are rotated; "
            "correct it, or use a model that rotates the keys of every layer"
        )
    for key, value in spelling.items():
        if key in get_args(LayerType):
            _add_all(seen, value, f"{name}.{key}", where)
        else:
            _add(seen, "rope_type" if key == "type" else key, value, where)


def _add(seen: dict[str, Any], key: str, value: Any, where: str) -> None:
    if value is not None and seen.setdefault(key, value) != value:
        raise KavaError(
            f"{where}: config.json gives {key} twice, {seen[key]!r} and {value!r} (rope_theta, "
            "rope_scaling, rope_parameters, layer types); make them agree"
        )


def _given(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _scaling(kind: str, seen: Mapping[str, Any], positions: int, where: str) -> RopeScaling:
    """The scaling's own class, filled by its fields' names."""
    fields = {field.name: field for field in dataclasses.fields(ROPE_TYPES[kind])}
    seen = {_ORIGINAL: positions, **seen} if _ORIGINAL in fields else seen
    if unknown := {key: value for key, value in seen.items() if key not in fields}:
        raise KavaError(
            f"{where}: config.json: rope_type={kind!r} does not take {_given(unknown)}; it takes "
            f"{', '.join(fields)}: correct what is misspelt and remove the rest"
        )
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in seen]:
        raise KavaError(f"{where}: rope_type={kind} lacks {', '.join(missing)}; add the values")
    return ROPE_TYPES[kind](**{key: _value(seen, key, where) for key in seen})


def _set_attention_factor(seen: dict[str, Any], positions: int, where: str) -> None:
    """``sqrt(1 + ln(factor) / ln(original))``, where longrope does not give it.

    Without a ``factor`` it is the ratio of the lengths. Up to 4.x transformers preferred that ratio
    to a given factor. We write the result, which all versions read in the same way.
    """
    original = positive_int(seen, _ORIGINAL, where, default=positions)
    if original == 1:
        raise KavaError(f"{where}: {_ORIGINAL}=1 with rope_type='longrope'; correct config.json")
    factor = positive_float(seen, "factor", where, default=positions / original)
    seen.pop("factor", None)
    grown = math.log(max(factor, 1.0)) / math.log(original)
    seen.setdefault("attention_factor", math.sqrt(1.0 + grown))


def _value(seen: Mapping[str, Any], key: str, where: str) -> Any:
    value = seen[key]
    if key == _ORIGINAL:
        return positive_int(seen, key, where)
    if key == "truncate":
        return true_or_false(seen, key, where)
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, list):
            raise KavaError(f"{where}: {key}={value!r} is not a list of numbers; correct it")
        return tuple(positive_float({key: item}, key, where) for item in value)
    if key in ("mscale", "mscale_all_dim") and value == 0:  # as good as absent in transformers
        return None
    return positive_float(seen, key, where)


def _check(scaling: RopeScaling, kind: str, theta: float, head_dim: int, where: str) -> None:
    """Values that the formulas of transformers would divide by zero or misread."""
    fault = None
    match scaling:
        case DynamicRopeScaling() if head_dim == 2:
            fault = "cannot scale head_dim=2; use a larger one"
        case YarnRopeScaling() if theta <= 1:
            fault = f"needs a rope_theta above 1, not {theta}"
        case YarnRopeScaling() if scaling.beta_fast < scaling.beta_slow:
            fault = f"has beta_fast={scaling.beta_fast} below beta_slow={scaling.beta_slow}; swap"
        case Llama3RopeScaling() if scaling.high_freq_factor <= scaling.low_freq_factor:
            fault = (
                f"has high_freq_factor={scaling.high_freq_factor} not above "
                f"low_freq_factor={scaling.low_freq_factor}; swap them"
            )
        case LongRopeScaling():
            sizes = {len(scaling.short_factor), len(scaling.long_factor)}
            if sizes != {head_dim // 2}:
                fault = (
                    f"has {len(scaling.short_factor)} short_factor and {len(scaling.long_factor)} "
                    f"long_factor values, and head_dim={head_dim} needs {head_dim // 2} of each"
                )
        case _:
            pass
    if fault:
        raise KavaError(f"{where}: config.json: rope_type={kind!r} {fault}; correct config.json")
