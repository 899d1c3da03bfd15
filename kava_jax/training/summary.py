"""From (sum, count) on devices to the numbers that are logged: here, and only here, divided."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from kava_jax.geometry import Mean
from kava_jax.training.comparison import PARTS

_OF_PARTS = ("kv", "cos", "cos_shuffled", "mag_loss")


class Figures(NamedTuple):
    """Plain numbers: of the whole, and by mapped layer as ``teacher/figure_part``."""

    values: dict[str, float]
    layers: dict[str, list[float]]


def summarize(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """Plain floats by the names that ``metrics.jsonl`` uses.

    Figures of several teachers are averaged; with more than one, each teacher's own are added as
    ``<teacher>/...``. A mean over nothing is NaN; where no token was compared at all, since every
    row was handed over, the figures of the comparison are left out.
    """
    # One transfer for all figures. Each ``float`` of a device array would be one of its own.
    means = jax.device_get(dict(metrics))
    if not any(mean.count for name, mean in means.items() if "/cos_" in name):
        told = {name for name in means if "/" not in name and not name.endswith("_running")}
        means = {name: mean for name, mean in means.items() if mean.count or name in told}
    values = {name: _divide(mean) for name, mean in means.items()}
    result = {name: value for name, value in values.items() if "/" not in name}
    result |= _over_teachers({name: _of_teacher(own) for name, own in _by_teacher(values).items()})
    if "cos_running" in result:
        result["gap_running"] = result["cos_running"] - result.pop("cos_shuffled_running")
    return result


def summarize_layers(layers: Mapping[str, Float[Array, "P"]]) -> Figures:
    """Per-layer arrays ``teacher/figure_part`` as lists, and as means over layers and parts."""
    # Layers are averaged first, then parts, then teachers, so that a teacher with more mapped
    # layers does not count for more.
    plain = {name: [float(x) for x in row] for name, row in jax.device_get(dict(layers)).items()}
    means: dict[str, dict[str, float]] = {}
    for teacher, own in _by_teacher(
        {name: float(np.mean(row)) for name, row in plain.items()}
    ).items():
        parts: dict[str, list[float]] = {}
        for key, value in own.items():
            name, _, part = key.rpartition("_")
            parts.setdefault(name if part in PARTS else key, []).append(value)
        means[teacher] = {name: float(np.mean(found)) for name, found in parts.items()}
    return Figures(_over_teachers(means), plain)


def _by_teacher(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """``teacher/figure`` as one dict per teacher."""
    result: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        teacher, slash, name = key.partition("/")
        if slash:
            result.setdefault(teacher, {})[name] = value
    return result


def _over_teachers(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over teachers, and each one's own where there are several."""
    names = dict.fromkeys(name for own in parts.values() for name in own)
    result = {
        name: float(np.mean([own[name] for own in parts.values() if name in own])) for name in names
    }
    if len(parts) > 1:
        for teacher, own in parts.items():
            result |= {f"{teacher}/{name}": value for name, value in own.items()}
    return result


def _of_teacher(own: Mapping[str, float]) -> dict[str, float]:
    """One teacher's figures: parts apart where that matters, and their mean."""
    parts = [part for part in PARTS if f"cos_{part}" in own]
    found = _of_parts(own, parts) if parts else {}
    return found | {name: own[name] for name in ("kl", "attention_kl", "ce_handed") if name in own}


def _of_parts(own: Mapping[str, float], parts: Sequence[str]) -> dict[str, float]:
    """Those of the comparison of some parts."""
    result = {
        name: sum(own[f"{name}_{part}"] for part in parts) / len(parts)
        for name in _OF_PARTS
        if f"{name}_{parts[0]}" in own
    }
    result["cos_sim"] = result.pop("cos")
    result |= {f"cos_{part}": own[f"cos_{part}"] for part in parts}
    result["alignment_gap"] = result["cos_sim"] - result["cos_shuffled"]
    result["dir_loss"] = 1.0 - result["cos_sim"]
    # 1e-30 only keeps a target of length 0 from dividing by zero.
    ratios = [own[f"s_magnitude_{p}"] / max(own[f"t_magnitude_{p}"], 1e-30) for p in parts]
    result["mag_ratio"] = float(np.mean(ratios))
    return result


def _divide(mean: Mean) -> float:
    # NaN and not 0: the log shows that nothing was measured.
    return float(mean.sum) / float(mean.count) if float(mean.count) > 0 else float("nan")
