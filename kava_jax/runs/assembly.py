"""From a config's numbers and names to what trains: objective, projectors, weights, optimizer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import optax
from flax import nnx
from jax.sharding import Mesh

from kava_jax.alignment.frame import empty
from kava_jax.alignment.kv_losses import Hybrid, Mercator
from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector, forgets_length
from kava_jax.config.run import Config
from kava_jax.config.weights import AutoShare, Ramp, is_zero
from kava_jax.errors import KavaError
from kava_jax.models.spec import DecoderSpec
from kava_jax.runs.find_models import Models
from kava_jax.runs.parts import Part, TeacherPart
from kava_jax.training.handoff_term import HandoffTerm
from kava_jax.training.objective import PART_WEIGHTS, Objective, Statistics, TeacherLink
from kava_jax.training.optimizer import learning_rate, make_optimizer


def make_objective(
    config: Config,
    student: nnx.GraphDef[Any],
    teachers: Mapping[str, TeacherLink],
    projector: nnx.GraphDef[Any] | None,
    handoff: HandoffTerm | None,
    batch_shards: int,
) -> Objective:
    """The objective that the config describes, over modules that are already built."""
    loss, steps = config.loss, config.train.steps
    return Objective(
        student=student,
        projector=projector,
        teachers=teachers,
        kv_loss=loss.kv.model_copy(update={"beta": 0.0}) if magnitude_note(config) else loss.kv,
        center=loss.center,
        parts=PART_WEIGHTS[loss.parts] if loss.output is None else {"o": 1.0},
        output=loss.output,
        direction=config.projector.direction,
        match_attention=loss.match == "attention",
        ce_weight=_weight(loss.ce_weight, steps),
        kl_weight=None if is_zero(loss.kl_weight) else _weight(loss.kl_weight, steps),
        kl_temperature=loss.kl_temperature,
        handoff=handoff,
        batch_shards=batch_shards,
    )


def projector_of(
    config: Config, student: DecoderSpec, teachers: Mapping[str, TeacherPart], mesh: Mesh
) -> Part:
    """The projector of the comparison, which knows every teacher's heads."""
    settings, shapes = config.projector, {}
    # One match compares all teachers, so each of them knows the student's heads.
    own, width = next(iter(teachers.values())).link.comparison.heads(student)
    for name, teacher in teachers.items():
        comparison, sources = teacher.link.comparison, teacher.layer_map.sources
        heads, head_dim = comparison.heads(teacher.spec)
        # Teacher layers that are mixed for one student layer lie side by side in the width.
        shapes[name] = _shape(heads * sources, head_dim, teacher.layer_map)
    build = partial(
        KVDimensionProjector,
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
    )
    return Part.of(build, mesh, config.mesh.indivisible)


def handoff_of(
    config: Config, models: Models, maps: Mapping[str, LayerMap], mesh: Mesh
) -> tuple[Part, HandoffTerm]:
    """The handoff with its projector: identity between equal heads, else linear by layer.

    ``maps`` are by teacher.
    """
    settings, student = config.loss.handoff, models.student.spec
    assert settings is not None
    own, width = student.num_kv_heads, student.head_dim
    specs = {name: found.spec for name, found in models.teachers.items()}
    equal = all((spec.num_kv_heads, spec.head_dim) == (own, width) for spec in specs.values())
    if equal and settings.train == "projector":
        raise KavaError(
            "loss.handoff.train=projector: the heads of all models are equal, so caches are handed "
            "over as they are and nothing would learn; set train=both"
        )
    build = partial(
        KVDimensionProjector,
        {name: _shape(s.num_kv_heads, s.head_dim, maps[name]) for name, s in specs.items()},
        own * width,
        kind="identity" if equal else "linear",
        direction="teacher_to_student" if settings.reader == "teacher" else "student_to_teacher",
        student_heads=own,
        per_layer=True,
    )
    part = Part.of(build, mesh, config.mesh.indivisible)
    total = sum(teacher.weight for teacher in config.teachers)
    return part, HandoffTerm(
        projector=part.graph,
        maps=maps,
        shares={teacher.name: teacher.weight / total for teacher in config.teachers},
        reader=settings.reader,
        weight=_weight(settings.weight, config.train.steps),
        alone_share=settings.read_alone,
    )


def _shape(heads: int, head_dim: int, layer_map: LayerMap) -> dict[str, int]:
    """A teacher's side of a projector."""
    return {"d_model": heads * head_dim, "num_heads": heads, "num_layers": len(layer_map)}


def magnitude_note(config: Config) -> str | None:
    """That ``loss.kv.beta`` counts as 0 and why, in one line; None where it does not."""
    loss, projector = config.loss.kv, config.projector
    if not (isinstance(loss, Mercator | Hybrid) and loss.beta > 0):
        return None
    if not (config.teachers and forgets_length(projector.kind, projector.direction)):
        return None
    return (
        f"loss.kv.beta={loss.beta:g} is off: projector.kind={projector.kind} begins with a "
        "norm, so what comes out of it says nothing of the student's lengths"
    )


def empty_statistics(objective: Objective, student: DecoderSpec) -> Statistics:
    """Statistics of no step yet, for whatever the frame keeps."""
    means: Statistics = {}
    if objective.center == "running":
        for name, link in objective.teachers.items():
            layer_map = link.comparison.layer_map
            # Both sides, and so their means, have the shape of the side that is not projected.
            forward = objective.direction == "teacher_to_student"
            heads, width = link.comparison.heads(student if forward else link.spec)
            none = empty(len(layer_map), heads if forward else heads * layer_map.sources, width)
            means[name] = dict.fromkeys(objective.parts, (none, none))
    return means


def kv_weight(config: Config) -> optax.Schedule:
    """Step -> KV weight.

    Where it is a measured share, this is the sum of the language weights. It is multiplied by the
    measured ``TrainState.kv_scale``, and follows their ramps between two measurements.
    """
    loss, steps = config.loss, config.train.steps
    if isinstance(loss.kv_weight, AutoShare):
        ce, kl = _weight(loss.ce_weight, steps), _weight(loss.kl_weight, steps)
        return lambda step: ce(step) + kl(step)
    return _weight(loss.kv_weight, steps)


def schedules(config: Config) -> dict[str, optax.Schedule]:
    """Every rate and weight that may follow the step, by the name that it is logged or set by."""
    loss, steps = config.loss, config.train.steps
    rates = {f"lr_{name}": rate for name, rate in learning_rates(config).items()}
    language = {name: _weight(getattr(loss, name), steps) for name in ("ce_weight", "kl_weight")}
    return rates | {"kv_weight": kv_weight(config)} | language


def learning_rates(config: Config) -> dict[str, optax.Schedule]:
    """Rates of the student and of the projector.

    With ``projector.training=warmup`` the student's rate is 0 until the projector has had its
    steps, and its schedule is what is left of the run.
    """
    settings, steps = config.optimizer, config.train.steps

    def rate(peak: float, length: int) -> optax.Schedule:
        warmup, ratio = settings.warmup_steps, settings.min_lr_ratio
        return learning_rate(peak, length, warmup_steps=warmup, min_lr_ratio=ratio)

    rates = {"student": rate(settings.student_lr, steps)}
    waits = config.projector.warmup_steps
    if config.teachers and config.projector.training == "warmup":
        later = rate(settings.student_lr, steps - waits)
        # At a rate of 0 there is no decay either: AdamW multiplies it by the rate.
        rates["student"] = optax.join_schedules([optax.constant_schedule(0.0), later], [waits])
    return rates | {"projector": rate(settings.projector_lr, steps)}


def optimizer_of(
    config: Config, rates: Mapping[str, optax.Schedule]
) -> optax.GradientTransformation:
    """AdamW per group; what is frozen does not move."""
    frozen, handoff = config.projector.training == "frozen", config.loss.handoff
    groups = {
        "student": None if handoff and handoff.train == "projector" else rates["student"],
        "projector": None if frozen else rates["projector"],
    }
    return make_optimizer(
        groups | ({"handoff": rates["projector"]} if handoff else {}),
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
        b2=config.optimizer.b2,
        mu_dtype=config.optimizer.mu_dtype,
    )


def _weight(weight: float | Ramp, steps: int) -> Callable[[Any], Any]:
    if isinstance(weight, Ramp):
        # Steps count from 0, so the last of n steps is number n - 1.
        moving = max(1, round(weight.over * steps) - 1)
        return optax.linear_schedule(weight.start, weight.end, moving)
    return optax.constant_schedule(weight)
