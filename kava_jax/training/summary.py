"""From (sum, count) on devices to the numbers that are logged: here, and only here, divided."""

from collections.abc import Mapping

import jax
import numpy as np

from kava_jax.diagnostics import alignment_gap
from kava_jax.geometry import Mean

_PAIRED = ("kv", "cos", "cos_shuffled", "cos_constant", "cos_centered", "mag_loss")


def summarize(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """Plain floats by the names that ``metrics.jsonl`` uses.

    Figures of several teachers are averaged; with more than one, each teacher's own cosine and gap
    are added as ``<teacher>/...``. A mean over nothing is NaN.
    """
    values = {name: _divide(mean) for name, mean in jax.device_get(dict(metrics)).items()}
    teachers = list(dict.fromkeys(name.split("/")[0] for name in values if "/" in name))
    result = {name: value for name, value in values.items() if "/" not in name}
    if teachers:
        parts = [_of_teacher(values, teacher) for teacher in teachers]
        result |= {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
        if len(teachers) > 1:
            for teacher, part in zip(teachers, parts, strict=True):
                result |= {f"{teacher}/{name}": part[name] for name in ("cos_sim", "alignment_gap")}
    if "cos_running" in result:
        gap = alignment_gap(result["cos_running"], result.pop("cos_shuffled_running"))
        result["gap_running"] = np.nan if gap is None else gap
    return result


def _of_teacher(values: Mapping[str, float], teacher: str) -> dict[str, float]:
    """One teacher's figures: keys and values apart where that matters, and their mean."""
    own = {
        name.removeprefix(f"{teacher}/"): value
        for name, value in values.items()
        if name.startswith(f"{teacher}/")
    }
    result = {
        name: (own[f"{name}_k"] + own[f"{name}_v"]) / 2 for name in _PAIRED if f"{name}_k" in own
    }
    result["cos_sim"] = result.pop("cos")
    result |= {"cos_k": own["cos_k"], "cos_v": own["cos_v"]}
    gap = alignment_gap(result["cos_sim"], result["cos_shuffled"])
    result["alignment_gap"] = np.nan if gap is None else gap
    result["dir_loss"] = 1.0 - result["cos_sim"]
    ratios = [own[f"s_magnitude_{p}"] / max(own[f"t_magnitude_{p}"], 1e-30) for p in ("k", "v")]
    result["mag_ratio"] = float(np.mean(ratios))
    return result | ({"kl": own["kl"]} if "kl" in own else {})


def _divide(mean: Mean) -> float:
    return float(mean.sum) / float(mean.count) if float(mean.count) > 0 else float("nan")
