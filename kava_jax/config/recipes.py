"""The four named recipes: what a config's ``recipe`` sets where the config itself says nothing.

All of them leave padding and the first tokens out of the comparison, and all but ``healed`` keep
cross-entropy on. Any field can still be set by hand; ``kava explain CONFIG`` says in words what
comes out.
"""

from collections.abc import Mapping
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # As the method's authors describe it: the teacher's cache is mapped to the student's width by a
    # projector that learns with the student. Both may drift to one direction: watch the gap.
    "original": {
        "projector": {"kind": "elastic", "direction": "teacher_to_student", "training": "joint"},
        "loss": {"kv": "mercator", "center": "none"},
        # Rates and decay are those that the authors recommend.
        "optimizer": {"student_lr": 5e-5, "projector_lr": 1e-3, "weight_decay": 0.01},
    },
    # The projector stands on the student's side and is dropped at export, so the target is the
    # teacher's own cache and cannot drift. The pull fades: that keeps what it gives a fresh
    # student and costs a trained one nothing (docs/findings.md).
    "anchored": {
        "projector": {"kind": "elastic", "direction": "student_to_teacher", "training": "joint"},
        "loss": {
            "kv": "mercator",
            "kv_weight": {"start": 1.0, "end": 0.0, "over": 1.0},
            "key_space": "pre_rope",
        },
    },
    # The map from teacher to student is fitted in closed form before training and stays fixed; what
    # every key shares (bias, means) is taken out on both sides.
    "calibrated": {
        "teachers": {"layer_map": "calibrated"},
        "projector": {
            "kind": "linear",
            "per_layer": True,
            "direction": "teacher_to_student",
            "init": "calibrated",
            "training": "frozen",
        },
        "loss": {
            "kv": "mercator",
            "key_space": "pre_rope",
            "remove_key_bias": True,
            "center": "running",
        },
    },
    # For a student that was cut from its teacher and shares its basis: keys and values meet as they
    # are, and logit KL is the language loss (docs/cutting.md). The teacher should know the text:
    # train it on that with cross-entropy first.
    "healed": {
        "projector": {"kind": "identity"},
        "loss": {
            "kv": "mercator",
            "kv_weight": "auto(0.5)",
            "key_space": "pre_rope",
            "ce_weight": 0.0,
            "kl_weight": 1.0,
        },
    },
}

# Of ``healed`` where the cut merges KV heads: the teacher's are merged alike.
MERGED = RECIPES["calibrated"]["projector"] | {"init": "merged"}


def apply_recipe(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The raw config with its recipe's fields under its own; what is given by hand stays.

    An unknown recipe, and anything that is not of the expected shape, passes through unchanged: the
    config's validation says what is wrong with it.
    """
    recipe, merged = recipe_of(raw), dict(raw)
    # One level deep: a kv loss or a weight that is given is not mixed with the recipe's own.
    for section, fields in recipe.items():
        given = merged.get(section)
        if section == "teachers":
            if isinstance(given, list | tuple):
                merged[section] = [_under(fields, teacher) for teacher in given]
        else:
            merged[section] = _under(fields, {} if given is None else given)
    return merged


def recipe_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe of a raw config sets, by section; nothing where it names no recipe."""
    name = raw.get("recipe", "anchored")
    recipe = RECIPES.get(name, {}) if isinstance(name, str) else {}
    compares_caches = _field(raw, "loss", "match") in (None, "cache", "attention")
    merges = name == "healed" and _field(raw, "student", "cut", "kv_heads") is not None
    return recipe | {"projector": MERGED} if merges and compares_caches else recipe


def _field(raw: Any, *names: str) -> Any:
    """A field of nested sections, of whatever shape they are; None where there is none."""
    for name in names:
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw


def _under(defaults: Mapping[str, Any], given: Any) -> Any:
    return {**defaults, **given} if isinstance(given, Mapping) else given
