"""From a config's numbers and names to the functions that train: objective, weights, optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import nnx

from kava_jax.alignment.frame import empty
from kava_jax.alignment.kv_losses import Hybrid, Mercator
from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import forgets_length
from kava_jax.config.run import Config
from kava_jax.config.weights import AutoShare, Ramp, is_zero
from kava_jax.models.spec import DecoderSpec
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


def handoff_term(
    config: Config, projector: nnx.GraphDef[Any], maps: Mapping[str, LayerMap]
) -> HandoffTerm:
    """The handoff that the config describes; ``maps`` are by teacher."""
    settings = config.loss.handoff
    assert settings is not None
    total = sum(teacher.weight for teacher in config.teachers)
    return HandoffTerm(
        projector=projector,
        maps=maps,
        shares={teacher.name: teacher.weight / total for teacher in config.teachers},
        reader=settings.reader,
        weight=_weight(settings.weight, config.train.steps),
        alone_share=settings.read_alone,
    )


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
