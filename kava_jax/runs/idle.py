"""What was asked for and would do nothing: settings that no one reads, tokens that no one compares.

Some of it is refused, where nothing at all would be left; the rest is said before a run starts.
Contradictions between fields alone are refused by the config itself.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from kava_jax.config.run import Config
from kava_jax.config.weights import is_zero
from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError
from kava_jax.storage import reachable

# Of these a run does one at its end, however long the interval.
INTERVALS = ("log_every", "eval_every", "checkpoint_every")


def idle_settings(config: Config) -> list[str]:
    """Every field that is not at its default and does nothing given the others, and why."""
    notes = []
    for field, why in _unread(config).items():
        value, default = _value_and_default(config, field)
        if value != default:
            notes.append(f"{field}={value} does nothing: {why}")
    loss = config.loss
    if loss.handoff and not loss.handoff.compares and not is_zero(loss.kv_weight):
        notes.append("loss.kv_weight does nothing: every row is handed over, none is compared")
    steps = config.train.steps
    for name in INTERVALS:
        every, default = _value_and_default(config, f"train.{name}")
        if every is not None and every > steps and every != default:
            notes.append(f"train.{name}={every} is more than train.steps={steps}: only at the end")
    often, every = config.train.eval_every, config.eval.exact_match_every
    # At the last step there are answers in any case, so a multiple there is none in between.
    if config.eval.max_new_tokens and often and every and math.lcm(often, every) >= steps:
        notes.append(
            f"eval.exact_match_every={every} and train.eval_every={often} have no multiple in "
            f"common below train.steps={steps}: only at the end"
        )
    return notes


def _unread(config: Config) -> dict[str, str]:
    """Fields that no part of such a run reads, by dotted name, and why not."""
    found: dict[str, str] = {}

    def unless(read: bool, why: str, *fields: str) -> None:
        found.update({} if read else dict.fromkeys(fields, why))

    loss, projector = config.loss, config.projector
    if config.teachers:
        kind = f"projector.kind={projector.kind}"
        unless(not is_zero(loss.kl_weight), "loss.kl_weight=0", "loss.kl_temperature")
        unless(projector.kind == "elastic", kind, "projector.mlp_ratio", "projector.dropout")
        weights = ("projector.init", "projector.per_layer", "optimizer.projector_lr")
        unless(projector.kind != "identity", kind, *weights)
        training = f"projector.training={projector.training}"
        unless(projector.training == "warmup", training, "projector.warmup_steps")
        learns = projector.training != "frozen" or loss.handoff is not None
        unless(learns, training, "optimizer.projector_lr")
    else:
        unless(False, "there is no teacher", "loss.kl_weight", "projector.warmup_steps")
    cut = config.student.cut
    if cut is not None and not isinstance(cut.layers, int):
        unless(False, "student.cut.layers is no number", "student.cut.rule")
    if loss.handoff is not None:
        alone, student_reads = "loss.handoff.alone_share", loss.handoff.reader == "student"
        unless(loss.handoff.train == "both", "the student does not learn", alone)
        unless(not student_reads, "the student always reads by itself", alone)
    every = "eval.exact_match_every"
    unless(config.train.eval_every is not None, "train.eval_every=null", every)
    unless(config.eval.max_new_tokens > 0, "eval.max_new_tokens=0", every)
    if reachable(config.data.path, "data.path").is_file():
        unless(False, "data.path is a file", "data.subset")
        # A single file has no splits; the name would only apply to ``eval_path``.
        unless(config.data.eval_path is not None, "data.path is a file", "data.eval_split")
    return found


def _value_and_default(config: Config, field: str) -> tuple[Any, Any]:
    *sections, name = field.split(".")
    section = reduce(getattr, sections, config)
    return getattr(section, name), type(section).model_fields[name].default


def compared_notes(sets: Mapping[str, Sequence[Encoded]], sink_tokens: int) -> list[str]:
    """What to say of rows of which no token is compared with a teacher's, by set.

    Raises KavaError for a set in which that is so of all rows.
    """
    notes = []
    for name, rows in sets.items():
        short = sum(len(row.ids) <= sink_tokens for row in rows)
        longest = max((len(row.ids) for row in rows), default=0)
        if rows and short == len(rows):
            raise KavaError(
                f"loss.sink_tokens={sink_tokens} leaves no token of the {name} rows to compare: "
                f"the longest has {longest}; lower it"
            )
        if short:
            notes.append(
                f"{name}: {short} of {len(rows)} rows are no longer than loss.sink_tokens="
                f"{sink_tokens}, so nothing of them is compared with a teacher"
            )
    return notes


def check_prompts(sets: Mapping[str, Sequence[Encoded]]) -> None:
    """Refuse rows without a prompt to hand over, and those in which several replies are trained on.

    Raises KavaError.
    """
    for name, rows in sets.items():
        bare = sum(row.prompt_length < 2 for row in rows)
        several = sum(row.trained is not None for row in rows)
        if bare:
            raise KavaError(
                f"loss.handoff: {bare} of {len(rows)} {name} rows have no prompt of two tokens or "
                f"more to hand over; give questions with answers, or leave loss.handoff out"
            )
        if several:
            raise KavaError(
                f"loss.handoff: {several} of {len(rows)} {name} rows have several replies, and "
                f"only the first answers what is handed over; set data.train_on=last"
            )
