"""``kava explain``: in words, what a config will do, without loading or downloading a weight.

Says what is compared with what, in which frame, what is minimised, and what learns at which rate;
which fields differ from the recipe; and what such a run is known to suffer from.
"""

from typing import Any

import yaml

from kava_jax.alignment.layer_map import CALIBRATED_MAPS
from kava_jax.config.distillation import HandoffConfig
from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.pair import TeacherConfig
from kava_jax.config.recipes import recipe_of
from kava_jax.config.run import Config
from kava_jax.config.weights import AutoShare, Ramp, is_zero
from kava_jax.errors import KavaError
from kava_jax.hf.cut import MEASURED
from kava_jax.journal.manifest import config_diff
from kava_jax.runs.assembly import magnitude_note
from kava_jax.runs.calibrate import LAYERS
from kava_jax.runs.find_models import Models, at_hand, cut_source, find_models
from kava_jax.runs.idle import idle_settings
from kava_jax.runs.layer_maps import layer_map_of

MAPS = {
    "ratio": "the one at its own relative depth (first meets first, last meets last)",
    "last": "the teacher's last layers, one by one",
    "origin": "the one that it was cut from",
    "straddle": "the last one before the student's next layer, by the layers it was cut from",
    # Without the models' own files it is not known which of the two.
    None: "the one that it was cut from where that is known, else the one at its own depth",
    "cka": "the one with the highest CKA of the 8 nearest teacher layers, measured before training",
    "calibrated": f"the {LAYERS} of the 8 nearest teacher layers that fit best together, measured "
    "before training",
}

OUTPUTS = {
    "attention_outputs": "what each layer's attention adds to the residual stream",
    "block_outputs": "the residual stream after each layer",
}

CONTROLS = {
    "none": "",
    "shuffled": " Control: its targets are those of another row, so they teach nothing.",
    "constant": " Control: all its targets are one mean vector, so they teach nothing.",
    "random": " Control: it has random weights, so its targets teach nothing.",
}

# What a recipe asks of the models that it is given.
EXPECTS = {
    "healed": " It expects a student cut from its teacher, and a teacher that knows the "
    "text: train that one with cross-entropy alone first.",
}


def explain(config: Config) -> str:
    """The config in words, a paragraph per question, with every layer map as a table."""
    train, data = config.train, config.data
    parts = [
        f"Run {config.run.name} ({config.run.directory}): {train.steps} steps of "
        f"{data.batch_size} rows of up to {data.max_length} tokens from {data.path}.",
    ]
    models = _models(config)
    parts += [_cut(config, models)] if config.student.cut else []
    if config.teachers:
        parts += [f"Recipe {config.recipe}. {_changes(config)}{EXPECTS.get(config.recipe, '')}"]
        parts += [_teacher(config, *one, models) for one in enumerate(config.teachers)]
        parts += [_compared(config), _projected(config), _minimised(config)]
        parts += [_handed(config.loss.handoff)] if config.loss.handoff else []
        parts += [_learning(config), *_warnings(config)]
    else:
        parts += ["No teacher: the student learns by cross-entropy alone.", _learning(config)]
    idle = idle_settings(config)
    parts += [f"Beware: {'; '.join(idle)}."] if idle else []
    return "\n\n".join(parts)


def _models(config: Config) -> Models | None:
    try:
        return find_models(config, find=at_hand)
    except KavaError:
        return None  # the words do without numbers of layers and widths


def _changes(config: Config) -> str:
    """The fields in which the config differs from its recipe."""
    raw = dump_config(config)
    bare = [{"name": teacher.name, "path": teacher.path} for teacher in config.teachers]
    # The recipe is filled in for the same models and data, so only what it sets can differ.
    kept = {name: raw[name] for name in ("recipe", "student", "data")}
    recipe = dump_config(parse_config(kept | {"teachers": bare}))
    differ = config_diff(_set_by_recipe(recipe), _set_by_recipe(raw))
    changes = [f"{field} {change}" for field, change in differ.items()]
    if not changes:
        return "Every field that it sets is as it sets it."
    return f"Set otherwise here: {'; '.join(changes)}."


def _set_by_recipe(raw: dict[str, Any]) -> dict[str, Any]:
    """A dumped config's values of the fields that its recipe sets; a ramp is one text."""
    found = {}
    for section, fields in recipe_of(raw).items():
        several = raw[section] if section == "teachers" else [raw[section]]
        chosen = [{name: _ramp_in_words(one[name]) for name in fields} for one in several]
        found[section] = chosen if section == "teachers" else chosen[0]
    return found


def _ramp_in_words(value: Any) -> Any:
    if not (isinstance(value, dict) and "start" in value):
        return value
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip()


def _cut(config: Config, models: Models | None) -> str:
    """What is left of which model."""
    cut = config.student.cut
    assert cut is not None
    text = f"Student: cut out of {cut_source(config)}"
    if models is None or models.student.cut is None:
        return f"{text}."
    spec, record = models.student.spec, models.student.cut
    layers = ", ".join(map(str, record.layers))
    if isinstance(cut.layers, int) and cut.rule in MEASURED:
        layers = f"those found by {cut.rule} on training rows, before training"
    text += f", {spec.num_layers} of {record.teacher_layers} layers ({layers})"
    return f"{text}, {spec.num_kv_heads} KV heads, {spec.intermediate_size} units in a layer."


def _teacher(config: Config, index: int, teacher: TeacherConfig, models: Models | None) -> str:
    """Which layers meet, in words and as a table where the models' geometry is found."""
    setting, layer_map, note = teacher.layer_map, None, None
    if models is not None and setting not in CALIBRATED_MAPS:
        layer_map, setting, note = layer_map_of(index, teacher, models)
    words = "the pairs that are given" if isinstance(setting, tuple) else MAPS[setting]
    text = f"Teacher {teacher.name} ({teacher.path}): each student layer meets {words}."
    text += CONTROLS[teacher.control]
    if models is None:
        return f"{text} Its geometry was not found here, so the layers are not listed."
    student, own = models.student.spec, models.teachers[teacher.name].spec
    text += (
        f" {own.num_layers} layers with {own.num_kv_heads} KV heads of {own.head_dim}; the student "
        f"has {student.num_layers} with {student.num_kv_heads} of {student.head_dim}."
    )
    if layer_map is None:
        return text
    rows = "\n".join(f"  {line}" for line in layer_map.table(teacher.name))
    text += f" {note}." if note else ""
    if is_zero(config.loss.kl_weight):
        text += f" It is cut after layer {layer_map.last_teacher_layer}."
    return f"{text}\n{rows}"


def _compared(config: Config) -> str:
    loss = config.loss
    where = "before RoPE" if loss.key_space == "pre_rope" else "after RoPE"
    steps = []
    if loss.remove_key_bias:
        steps.append("keys are taken without their projection's bias (on both sides)")
    if loss.center != "none":
        source = "of the batch" if loss.center == "batch" else "running over past steps"
        steps.append(f"means per layer, head and dimension ({source}) are subtracted on both sides")
    frame = f" Frame: {'; '.join(steps)}." if steps else " Frame: raw vectors."
    what = {"both": f"keys {where} and values", "keys": f"keys {where}", "values": "values"}
    compared = OUTPUTS[loss.output] if loss.output else f"{what[loss.parts]}, head by head"
    return (
        f"Compared: {compared}, of every real token but the first {loss.sink_tokens} of its "
        f"row.{frame}"
    )


def _projected(config: Config) -> str:
    settings = config.projector
    if settings.kind == "identity":
        return "Projector: identity, so both sides' vectors are compared as they are."
    forward = settings.direction == "teacher_to_student"
    source, space = ("teacher", "student") if forward else ("student", "teacher")
    scope = "one per layer" if settings.per_layer else "one for all layers"
    apart = "" if config.loss.output else ", keys and values apart"
    text = (
        f"Projector: {settings.kind}, {scope}{apart}; it maps the {source}'s "
        f"vectors into the {space}'s space, where they are compared. "
    )
    if settings.init == "calibrated":
        text += "It is fitted in closed form before training, on rows the run then trains on. "
    if settings.init == "merged":
        text += "It merges the teacher's KV heads as the cut merged the student's. "
    if not forward:
        own = "output" if config.loss.output else "cache"
        text += f"The target is the teacher's own {own} and cannot drift; "
        return text + "the projector is dropped at export."
    if settings.training == "frozen":
        return text + "It stays as it is, so the target cannot drift."
    return text + "The target moves with the projector."


def _minimised(config: Config) -> str:
    loss = config.loss
    weight = loss.kv_weight
    if isinstance(weight, AutoShare):
        kv = (
            f"KV, weighted so that its gradient is {weight.share:g} of the language gradient, that "
            f"of the other terms (measured every {weight.every} steps)"
        )
    else:
        kv = f"{_number(weight)} x KV"
    terms = [f"{_number(loss.ce_weight)} x cross-entropy"]
    terms += [] if is_zero(loss.kl_weight) else [f"{_number(loss.kl_weight)} x logit KL"]
    off = magnitude_note(config)
    measured = loss.kv.model_copy(update={"beta": 0.0}) if off else loss.kv
    text = f"Minimised: {' + '.join([*terms, kv])}. KV is {measured.words}."
    if loss.match == "attention":
        text += " The KL of what the space's queries attend to in both caches is added to it."
    text += f" {off}." if off else ""
    if len(config.teachers) == 1:
        return text
    weights = ", ".join(f"{teacher.name} {teacher.weight:g}" for teacher in config.teachers)
    return f"{text} The teachers' terms are added with fixed weights ({weights})."


def _handed(handoff: HandoffConfig) -> str:
    answerer = {"teacher": "student", "student": "teacher"}[handoff.reader]
    text = (
        f"Handoff: the {handoff.reader} reads each prompt but for its last token, and the "
        f"{answerer} answers from that cache. Its loss counts {_number(handoff.weight)} times."
    )
    if handoff.read_alone:
        text += f" In every step it reads {handoff.read_alone:.0%} of the rows alone."
    return text


def _learning(config: Config) -> str:
    settings = config.optimizer
    shape = f"cosine, {settings.warmup_steps} warm-up steps"
    text = f"Learns: the student at {settings.student_lr:g} ({shape})"
    handoff = config.loss.handoff
    if handoff and handoff.train == "projector":
        text = f"Learns: the handoff's projector at {settings.projector_lr:g} ({shape}), no student"
    if not config.teachers or config.projector.kind == "identity":
        return f"{text}."
    training = {
        "joint": f"the projector at {settings.projector_lr:g} with it from the first step",
        "warmup": f"the projector at {settings.projector_lr:g}, alone for the first "
        f"{config.projector.warmup_steps} steps, then with it",
        "frozen": "the projector stays as it was initialised",
    }[config.projector.training]
    return f"{text}; {training}."


def _warnings(config: Config) -> list[str]:
    """What such a run is known to suffer from."""
    found = []
    settings = config.projector
    learns = settings.training != "frozen" and settings.kind != "identity"
    if settings.direction == "teacher_to_student" and learns:
        found.append(
            "Beware: student and target learn together and can drift to one common direction; "
            "a high cosine proves nothing here, look at the alignment gap."
        )
    fitted = settings.init == "calibrated" and settings.direction == "teacher_to_student"
    if fitted and config.student.geometry is not None:
        found.append(
            "Beware: the projector is fitted to the cache of a student with random weights, which "
            "is nothing to hold on to; start from a trained student (student.path)."
        )
    if fitted and config.student.cut is not None:
        found.append(
            "Beware: the projector is fitted to a student that has not healed from its cut, so "
            "what the cut has broken is the target; set recipe=healed."
        )
    return found


def _number(weight: Any) -> str:
    if isinstance(weight, Ramp):
        word = "falling" if weight.start > weight.end else "rising"
        part = "" if weight.over == 1 else f" over the first {weight.over:.0%} of the run"
        return f"({weight.start:g} {word} to {weight.end:g}{part})"
    return f"{weight:g}"
