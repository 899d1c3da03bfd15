"""The layer map of each teacher: what the config asks for, and what the student says of itself."""

from typing import Any

from kava_jax.alignment.layer_map import ORIGIN_MAPS, LayerMap, make_layer_map
from kava_jax.config.distillation import HandoffConfig
from kava_jax.config.pair import TeacherConfig
from kava_jax.errors import KavaError
from kava_jax.runs.find_models import Found, Models


def layer_map_of(
    index: int, teacher: TeacherConfig, models: Models
) -> tuple[LayerMap, Any, str | None]:
    """A teacher's layer map, its rule or pairs, and what is to be said of the choice.

    ``teachers.N.layer_map=null`` is ``origin`` for a student whose layers were cut from a model of
    this teacher's depth, else ``ratio``. The cut model may be another one: teachers are often
    trained further before or after the cut.

    Raises KavaError for a map that does not fit the models, or has to be measured.
    """
    field, rule = f"teachers.{index}.layer_map", teacher.layer_map
    depths = models.teachers[teacher.name].spec.num_layers, models.student.spec.num_layers
    origins, why = _origins(models.student, depths[0])
    note = None
    if rule is None:
        rule = "origin" if origins else "ratio"
        # Of a student with a basis of its own there is nothing to say: ratio is the rule.
        note = f"{field}: {rule}, because {why}" if models.student.cut else None
    if rule in ORIGIN_MAPS and origins is None:
        raise KavaError(f"{field}={rule!r}: {why}; use 'ratio' or a list of pairs")
    layer_map = make_layer_map(rule, *depths, origins=origins, field=field)
    others = origins is not None and layer_map.read_layers != origins
    if teacher.layer_map == "ratio" and others:
        note = (
            f"{field}='ratio' pairs layers with others than they came from, although {why}; "
            f"'origin' pairs them with their own"
        )
    return layer_map, rule, note


def handoff_map(settings: HandoffConfig, teacher: str, models: Models) -> LayerMap:
    """The reader's layer for each layer of the answerer, which has the place of a student's.

    Raises KavaError for a map that does not fit the models, or leaves a layer without a source.
    """
    field, rule = "loss.handoff.layer_map", settings.layer_map
    theirs, ours = models.teachers[teacher].spec.num_layers, models.student.spec.num_layers
    origins, depths = None, (ours, theirs)
    if settings.reader == "teacher":
        origins, depths = _origins(models.student, theirs)[0], (theirs, ours)
    if rule is None:
        rule = "origin" if origins else "ratio"
    found = make_layer_map(rule, *depths, origins=origins, field=field)
    if missing := sorted({*range(depths[1])} - {*found.student_layers}):
        raise KavaError(
            f"{field}: layers {missing} of the answerer have no source; give each of its "
            f"{depths[1]} layers one"
        )
    return found


def _origins(student: Found, teacher_layers: int) -> tuple[tuple[int, ...] | None, str]:
    """The teacher layers that the student's were cut from, or None; and why, in words."""
    cut, layers = student.cut, student.spec.num_layers
    if cut is None:
        return None, "the student holds no record of a cut (kava_cut.json)"
    if (cut.teacher_layers, len(cut.layers)) != (teacher_layers, layers):
        return None, (
            f"the student's record is of a cut from {cut.teacher_layers} to {len(cut.layers)} "
            f"layers, but the teacher has {teacher_layers} and the student {layers}"
        )
    return cut.layers, f"the student's layers were cut from {cut.teacher}"
