"""The small pair as a config builds it under each recipe, in float32 or bfloat16."""

from pathlib import Path
from typing import Any, NamedTuple

from kava_jax.alignment.layer_map import ORIGIN_MAPS, LayerMap
from kava_jax.config.file import parse_config
from kava_jax.hf.cut_record import CutRecord
from kava_jax.models.spec import DecoderSpec
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.find_models import Found, Models
from tests.training.small import STUDENT, TEACHER, one_device, random_values

# The student as if it were cut from the teacher, for the maps that need to know.
CUT = CutRecord(
    teacher="big", fingerprint="", teacher_layers=4, layers=(0, 1, 3), kv_heads=((0, 1), (2, 3))
)
# Both sides with a key bias, unlike the teacher of ``small``.
BIASED = DecoderSpec(**{**vars(TEACHER), "family": "qwen2", "qk_norm": False, "qkv_bias": True})
MEASURED = {
    "cka": LayerMap((0, 1, 2), ((1,), (1,), (3,))),
    "calibrated": LayerMap((0, 1, 2), ((0, 1), (1, 2), (2, 3))),
}


class Made(NamedTuple):
    """What a config makes of the small pair, and weights for it."""

    blueprint: Blueprint
    params: dict[str, Any]
    teachers: dict[str, Any]


def made(
    recipe: str, dtype: str = "float32", student_layers: int = STUDENT.num_layers, **fields: Any
) -> Made:
    """A run of ``recipe`` with dotted ``fields`` set; the teacher is called ``big``.

    Weights depend on nothing but the models' shapes; the teacher's are kept in ``dtype``.
    """
    raw: dict[str, Any] = {
        "recipe": recipe,
        "teachers": [{"name": "big", "path": "not read"}],
        "student": {"path": "not read"},
        "train": {"dtype": dtype},
        "data": {"path": "not read", "batch_size": 8},
        "loss": {"sink_tokens": 2},
    }
    for name, value in fields.items():
        section: Any = raw
        *way, last = name.split(".")
        for part in way:
            section = section[int(part)] if part.isdigit() else section.setdefault(part, {})
        section[last] = value
    config = parse_config(raw)
    student = DecoderSpec(**{**vars(STUDENT), "num_layers": student_layers})
    name = config.teachers[0].layer_map
    cut = CUT if name in ORIGIN_MAPS else None
    models = Models(Found(Path(), student, cut), {"big": Found(Path(), BIASED)})
    maps = {"big": MEASURED[name]} if name in MEASURED else {}
    blueprint = make_blueprint(config, one_device(), models, maps)
    assert blueprint.projector
    params = {
        "student": random_values(blueprint.student.build, 1),
        "projector": random_values(blueprint.projector.build, 2),
    }
    teacher = random_values(blueprint.teachers["big"].part.build, 3)
    return Made(blueprint, params, {"big": teacher})
