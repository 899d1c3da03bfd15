"""The layer map of each teacher: what the config asks for, and what the student says of itself."""

from kava_jax.alignment.layer_map import ORIGIN_MAPS, LayerMap, make_layer_map
from kava_jax.config.pair import TeacherConfig
from kava_jax.errors import KavaError
from kava_jax.runs.find_models import Found, Models


def layer_map_of(index: int, teacher: TeacherConfig, models: Models) -> tuple[LayerMap, str | None]:
    """A teacher's layer map, and a note of how it was chosen where the config does not say.

    ``teachers.N.layer_map=null`` is ``origin`` for a student whose layers were cut from a model of
    this teacher's depth, else ``ratio``. The cut model may be another one: teachers are often
    trained further before or after the cut.

    Raises KavaError for a map that does not fit the models, or has to be measured.
    """
    field, setting = f"teachers.{index}.layer_map", teacher.layer_map
    depths = models.teachers[teacher.name].spec.num_layers, models.student.spec.num_layers
    origins, why = _origins(models.student, depths[0])
    rule = setting or ("origin" if origins else "ratio")
    if rule in ORIGIN_MAPS and origins is None:
        raise KavaError(f"{field}={rule!r}: {why}; use 'ratio' or a list of pairs")
    layer_map = make_layer_map(rule, *depths, origins=origins, field=field)
    if setting is None:
        return layer_map, f"{field}: {rule}, because {why}"
    if (
        setting == "ratio"
        and origins
        and layer_map != make_layer_map("origin", *depths, origins=origins)
    ):
        return layer_map, (
            f"{field}='ratio' pairs layers with others than they came from, although {why}; "
            f"'origin' pairs them with their own"
        )
    return layer_map, None


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
