"""What a cosine alone hides: its baselines, and the words and warnings built on them.

A cosine of 0.95 can mean nothing: a shared offset r times as long as the content gives *unrelated*
vectors r^2 / (1 + r^2). So every cosine is reported beside those of pairs that should not agree.

Left out on purpose: printing and logging (``training.monitor``).
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from kava_jax.geometry import Mean, center, cosine, magnitude, masked_mean, unit

# Lower ends of the original method's bands; below the last one it is "Poor".
EXCELLENT, GOOD, ACCEPTABLE = 0.95, 0.80, 0.50
# The word is withdrawn when the gap, or its share of what was left to gain, is below these.
LEAST_GAP, LEAST_GAP_SHARE = 0.05, 0.1


class Alignment(NamedTuple):
    """How well the student's vectors point where the target's do, with the baselines.

    cos            the student's vector and its target, the headline
    cos_shuffled   the student's vector and the target at the same position of the *next* example
    cos_constant   the target and the best constant vector of its layer and head
    cos_centered   after subtracting each side's mean over tokens, per layer and head
    s_magnitude, t_magnitude   lengths
    """

    cos: Mean
    cos_shuffled: Mean
    cos_constant: Mean
    cos_centered: Mean
    s_magnitude: Mean
    t_magnitude: Mean


def alignment(
    student: Float[Array, "L B T K H"],
    target: Float[Array, "L B T K H"],
    mask: Shaped[Array, "B T"],
    *,
    per_layer: bool = False,
) -> Alignment:
    """Alignment of one batch of keys (or values), each entry a scalar, or [L] if ``per_layer``.

    Only vectors of tokens whose mask is not zero count; what the others hold does not matter.
    ``cos_shuffled`` counts a token where both examples have one, and nothing in a batch of one.
    ``cos_constant`` takes, per layer and head, the direction of the mean unit target, the vector
    with the highest mean cosine to all targets. ``cos_centered`` takes means over this batch.
    """
    keep = (mask != 0)[None, :, :, None, None]
    s, t = (jnp.where(keep, x.astype(jnp.float32), 0.0) for x in (student, target))

    def mean(values: Float[Array, "L B T K"], counted: Array) -> Mean:
        return masked_mean(values, counted[..., 0], (1, 2, 3) if per_layer else None)

    both = keep & jnp.roll(keep, -1, axis=1) & (mask.shape[0] > 1)
    next_target = jnp.roll(t, -1, axis=1)
    unit_mean = jnp.expand_dims(masked_mean(unit(t), keep, (1, 2)).value, (1, 2))
    constant = jnp.broadcast_to(unit(unit_mean), t.shape)
    return Alignment(
        cos=mean(cosine(s, t), keep),
        cos_shuffled=mean(cosine(s, next_target), both),
        cos_constant=mean(cosine(constant, t), keep),
        cos_centered=mean(cosine(center(s, keep, (1, 2)), center(t, keep, (1, 2))), keep),
        s_magnitude=mean(magnitude(s), keep),
        t_magnitude=mean(magnitude(t), keep),
    )


def alignment_gap(cos: float, cos_shuffled: float | None) -> float | None:
    """``cos - cos_shuffled``, the headline; None where there is no baseline (None or NaN)."""
    if cos_shuffled is None or math.isnan(cos_shuffled):
        return None
    return cos - cos_shuffled


def verdict(cos: float, cos_shuffled: float | None = None) -> str:
    """The original's word for a cosine, or "collapsed" where unrelated pairs do as well.

    Excellent above 0.95, Good from 0.80, Acceptable from 0.50, else Poor. "collapsed" when the gap
    is below 0.05 or below a tenth of ``1 - cos_shuffled``; never without a baseline.
    """
    gap = alignment_gap(cos, cos_shuffled)
    if cos_shuffled is not None and gap is not None:
        possible = 1.0 - cos_shuffled
        if gap < LEAST_GAP or gap < LEAST_GAP_SHARE * possible:
            return "collapsed"
    if cos > EXCELLENT:
        return "Excellent"
    if cos >= GOOD:
        return "Good"
    return "Acceptable" if cos >= ACCEPTABLE else "Poor"


def alarms(*, mag_ratio: float, mag_loss: float, dir_losses: Sequence[float] = ()) -> list[str]:
    """One sentence, with its remedy, for each thing the original method warns of.

    Args:
        mag_ratio: mean|s| / mean|t|; alarming outside 0.5 to 2.0, abnormal outside 0.1 to 10.
        mag_loss: the magnitude term before its weight beta; alarming above 1.
        dir_losses: the last few logged direction losses, oldest first (see ``oscillates``).
    """
    found = []
    if not 0.1 <= mag_ratio <= 10.0:
        what = "has exploded" if mag_ratio > 10.0 else "has collapsed"
        found.append(
            f"The student's magnitude {what} (ratio {mag_ratio:.3g}); "
            "stop, lower the learning rates and set beta to 0.01."
        )
    elif not 0.5 <= mag_ratio <= 2.0:
        found.append(
            f"The magnitude ratio {mag_ratio:.3g} is outside 0.5 to 2.0; "
            "set beta to 0.01, or raise it a little (0.05 at most)."
        )
    if oscillates(dir_losses):
        found.append("The direction loss oscillates; halve the learning rates.")
    if mag_loss > 1.0:
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
    return 3 * turns >= 2 * (len(steps) - 1) and mean_step > share * sum(losses) / len(losses)
