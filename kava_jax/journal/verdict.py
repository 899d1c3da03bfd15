"""The measurements in words: how good an alignment is, and what a person should be warned of.

Plain floats in, words out. Every threshold is a constant at the top. A figure that is NaN is
treated like one that is None: as not measured. ``diagnostics`` measures, ``journal.monitor`` prints
and logs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kava_jax.diagnostics import alignment_gap
from kava_jax.training.comparison import PARTS

# Lower ends of the original method's bands; below the last one it is "Poor".
EXCELLENT, GOOD, ACCEPTABLE = 0.95, 0.80, 0.50
# The word is withdrawn when the gap, or its share of what was left to gain, is below these.
# Noise can make a gap up to the first. The share does not depend on an offset that all vectors
# have in common (docs/theory.md, What the gap measures).
LEAST_GAP, LEAST_GAP_SHARE = 0.05, 0.1
# Signs of collapse that do not change the word: a centred cosine below this, retrieval that finds
# at most this many times what chance finds, a student's effective rank below this share of its
# target's.
LEAST_COS_CENTERED = 0.1
MOST_TIMES_CHANCE = 3.0
LEAST_RANK_SHARE = 0.1


def verdict(cos: float, cos_shuffled: float | None = None) -> str:
    """The original's word for a cosine, or "collapsed" where unrelated pairs do as well.

    Excellent above 0.95, Good from 0.80, Acceptable from 0.50, else Poor. "collapsed" when the gap
    is below 0.05 or below a tenth of ``1 - cos_shuffled``; never without a baseline.
    """
    gap = alignment_gap(cos, cos_shuffled)
    if cos_shuffled is not None and gap is not None and gap < _least_gap(cos_shuffled):
        return "collapsed"
    # The original's bands: above the first limit, from the second on.
    if cos > EXCELLENT:
        return "Excellent"
    if cos >= GOOD:
        return "Good"
    return "Acceptable" if cos >= ACCEPTABLE else "Poor"


def collapse_signs(figures: Mapping[str, Any]) -> list[str]:
    """One sentence, with the figure and what was expected, for each sign of collapse found.

    What is missing, None or NaN is skipped. Only the first sign makes ``verdict`` say "collapsed".

    Args:
        figures: of an evaluation, without ``eval_``; others than these are not looked at.
            ``cos_shuffled``, ``alignment_gap``: a sign when the gap is below 0.05 or a tenth of
            ``1 - cos_shuffled``.
            ``cos_centered``: a sign below 0.1.
            ``retrieval``, ``sampled_tokens``: the share of that many tokens found; a sign up to
            three times chance, ``1 / sampled_tokens``. Of three tokens or fewer even finding all
            says nothing: skipped.
            ``student_rank``, ``target_rank``: effective ranks; a sign when the student's is below a
            tenth.
    """
    numbers = {name: x for name, x in figures.items() if isinstance(x, float | int)}
    known = {name: x for name, x in numbers.items() if not math.isnan(x)}
    found = []
    if {"alignment_gap", "cos_shuffled"} <= known.keys():
        shuffled = known["cos_shuffled"]
        what = f"The gap over a shuffled cosine of {shuffled:.3g}"
        found += _too_low(what, known["alignment_gap"], _least_gap(shuffled))
    if "cos_centered" in known:
        found += _too_low("The centred cosine", known["cos_centered"], LEAST_COS_CENTERED)
    if "retrieval" in known and known.get("sampled_tokens", 0) > MOST_TIMES_CHANCE:
        share, most = known["retrieval"], MOST_TIMES_CHANCE / known["sampled_tokens"]
        if share <= most:
            found.append(
                f"The share of tokens retrieved is {share:.3g}; more than {most:.3g} was "
                f"expected, {MOST_TIMES_CHANCE:.3g} times chance."
            )
    if {"student_rank", "target_rank"} <= known.keys():
        target = known["target_rank"]
        what = f"The student's effective rank next to the target's {target:.3g}"
        found += _too_low(what, known["student_rank"], LEAST_RANK_SHARE * target)
    return found


def collapsed_layers(
    layers: Mapping[str, Sequence[float | int | None]],
) -> dict[str, list[int]]:
    """Which mapped layers have collapsed by themselves, by ``teacher keys`` and the like.

    A mean over layers can look well while some hold nothing: each layer is judged by ``verdict``,
    keys, values and outputs apart. ``layers`` holds ``teacher/cos_sim_k`` and the like, one figure
    per mapped layer; only what has collapsed is returned.
    """
    found = {}
    for key, cosines in layers.items():
        teacher, _, figure = key.rpartition("/")
        name, _, part = figure.rpartition("_")
        if name != "cos_sim":
            continue
        shuffled = layers.get(f"{teacher}/cos_shuffled_{part}", ())
        rows = [
            row
            # Without a baseline there are no pairs, and nothing is called collapsed.
            for row, (cos, baseline) in enumerate(zip(cosines, shuffled, strict=False))
            if cos is not None and verdict(cos, baseline) == "collapsed"
        ]
        if rows:
            found[f"{teacher} {PARTS[part]}"] = rows
    return found


def _too_low(what: str, figure: float | int, least: float | int) -> list[str]:
    """The sentence, if there is something to say."""
    sentence = f"{what} is {figure:.3g}; at least {least:.3g} was expected."
    return [sentence] if figure < least else []


def alarms(
    *, mag_ratio: float, mag_loss: float | None, dir_losses: Sequence[float] = ()
) -> list[str]:
    """One sentence, with its remedy, for each thing the original method warns of.

    Args:
        mag_ratio: mean|s| / mean|t|; alarming outside 0.5 to 2.0, abnormal outside 0.1 to 10.
        mag_loss: the magnitude term before its weight beta; alarming above 1. None where the loss
            cannot have one, because the projector forgets lengths.
        dir_losses: the last few logged direction losses, oldest first (see ``oscillates``).
    """
    found = []
    # These limits, and the one of the magnitude loss below, are the original method's.
    if not 0.1 <= mag_ratio <= 10.0:
        what = "has exploded" if mag_ratio > 10.0 else "has collapsed"
        beta = " and set beta to 0.01" if mag_loss is not None else ""
        found.append(
            f"The student's magnitude {what} (ratio {mag_ratio:.3g}); stop, lower the learning "
            f"rates{beta}."
        )
    elif not 0.5 <= mag_ratio <= 2.0:
        remedy = (
            "set beta to 0.01, or raise it a little (0.05 at most)"
            if mag_loss is not None
            else "nothing in the loss holds it behind a projector that begins with a norm; if it "
            "moves on, lower the learning rates"
        )
        found.append(f"The magnitude ratio {mag_ratio:.3g} is outside 0.5 to 2.0; {remedy}.")
    if oscillates(dir_losses):
        found.append("The direction loss oscillates; halve the learning rates.")
    if mag_loss is not None and mag_loss > 1.0:
        found.append(f"The magnitude loss {mag_loss:.3g} is above 1; lower beta (0.01 is usual).")
    return found


def oscillates(losses: Sequence[float], share: float = 0.1) -> bool:
    """Whether a short history swings instead of settling.

    True when there are at least six values, two thirds or more of the successive differences turn
    the other way, and the mean step is above ``share`` of the mean value.
    """
    if len(losses) < 6:
        return False
    steps = [after - before for before, after in itertools.pairwise(losses)]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(steps))
    mean_step = sum(map(abs, steps)) / len(steps)
    # Noise around a settled loss turns as often, but by little: the swings must be large too.
    return 3 * turns >= 2 * (len(steps) - 1) and mean_step > share * sum(losses) / len(losses)


def _least_gap(cos_shuffled: float | int) -> float:
    """The smallest gap that still means something above this baseline."""
    return max(LEAST_GAP, LEAST_GAP_SHARE * (1.0 - cos_shuffled))
