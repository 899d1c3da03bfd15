"""The projectors of a run: of what is compared, and of caches that are handed over."""

from flax import nnx
from jax.sharding import Mesh

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.models.spec import DecoderSpec
from kava_jax.runs.assembly import handoff_term
from kava_jax.runs.find_models import Models
from kava_jax.runs.layer_maps import handoff_map
from kava_jax.runs.parts import Part, TeacherPart
from kava_jax.training.handoff_term import HandoffTerm


def projector_of(
    config: Config, student: DecoderSpec, teachers: dict[str, TeacherPart], mesh: Mesh
) -> Part:
    """That of the comparison, which knows every teacher's heads."""
    settings, shapes = config.projector, {}
    # One match compares all teachers, so each of them knows the student's heads.
    own, width = next(iter(teachers.values())).link.comparison.heads(student)
    for name, teacher in teachers.items():
        comparison, sources = teacher.link.comparison, teacher.layer_map.sources
        heads, head_dim = comparison.heads(teacher.spec)
        shapes[name] = {
            # Teacher layers that are mixed for one student layer lie side by side in the width.
            "d_model": heads * head_dim * sources,
            "num_heads": heads * sources,
            "num_layers": len(teacher.layer_map),
        }

    def build(rngs: nnx.Rngs) -> KVDimensionProjector:
        return KVDimensionProjector(
            shapes,
            own * width,
            settings.mlp_ratio,
            settings.dropout,
            # Of weights that are fitted, or follow from the cut, this only has the shape.
            "xavier" if settings.init in ("calibrated", "merged") else settings.init,
            settings.training != "frozen",
            kind=settings.kind,
            direction=settings.direction,
            student_heads=own,
            per_layer=settings.per_layer,
            parts=("k", "v") if config.loss.output is None else ("o",),
            rngs=rngs,
        )

    return Part.of(build, mesh, config.mesh.indivisible)


def handoff_of(config: Config, models: Models, mesh: Mesh) -> tuple[Part, HandoffTerm]:
    """The handoff's projector: identity between equal heads, else linear; a map for each layer."""
    settings, student = config.loss.handoff, models.student.spec
    assert settings is not None
    maps = {name: handoff_map(settings, name, models) for name in models.teachers}
    own, width = student.num_kv_heads, student.head_dim
    specs = {name: found.spec for name, found in models.teachers.items()}
    equal = all((spec.num_kv_heads, spec.head_dim) == (own, width) for spec in specs.values())
    if equal and settings.train == "projector":
        raise KavaError(
            "loss.handoff.train=projector: the heads of all models are equal, so caches are handed "
            "over as they are and nothing would learn; set train=both"
        )
    shapes = {
        name: {
            "d_model": spec.num_kv_heads * spec.head_dim,
            "num_heads": spec.num_kv_heads,
            "num_layers": len(maps[name]),
        }
        for name, spec in specs.items()
    }

    def build(rngs: nnx.Rngs) -> KVDimensionProjector:
        return KVDimensionProjector(
            shapes,
            own * width,
            kind="identity" if equal else "linear",
            direction=(
                "teacher_to_student" if settings.reader == "teacher" else "student_to_teacher"
            ),
            student_heads=own,
            per_layer=True,
            rngs=rngs,
        )

    part = Part.of(build, mesh, config.mesh.indivisible)
    return part, handoff_term(config, part.graph, maps)
