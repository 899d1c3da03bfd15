"""Compares the arms of an experiment grid: figures, differences, and how sure they are.

Two arms are compared over the seeds that both have, because runs with the same seed share their
data, their questions and the student's start. ``tables`` and ``report`` show what is found here.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kava_jax.errors import KavaError
from kava_jax.experiments.grid import Grid
from kava_jax.experiments.results import Outcome, Results
from kava_jax.experiments.statistics import (
    Estimate,
    RankCorrelation,
    estimate,
    holm,
    rank_correlation,
    steps_to_reach,
)
from kava_jax.runs.evaluate import MAIN_SET

LOSS, EXACT_MATCH = "eval_loss", "exact_match_strict"
COSINE, GAP = "eval_cos_sim", "eval_alignment_gap"
Arm = Mapping[int, Outcome]
Pair = tuple[str, str]


class Compared(NamedTuple):
    """One arm compared with the baseline; None is what was not measured or does not apply."""

    score: Estimate | None
    difference: Estimate | None
    loss: float | None
    cosine: float | None
    gap: float | None
    sets: dict[str, float]
    """Means of the further held-out sets, ``old/exact_match_strict`` and ``old/eval_loss``."""
    set_differences: dict[str, Estimate]
    """By set: its exact match minus the baseline's."""
    relative_time: float | None
    """Median seconds of a step, the baseline's being 1."""
    gradient_spread: float | None
    """Standard deviation of the logarithm of the student's gradient norm, mean over seeds."""
    reached: list[float | None]
    """By seed, the step at which the curve reached the final score of the baseline's run."""


class Comparison(NamedTuple):
    """Every arm that was run, and whether the cosine and the gap rank the runs as the score does.

    ``further`` are the differences that the grid asks for ``against`` other arms than the baseline.
    All p-values are corrected for each other, but for that of the declared difference.
    """

    arms: dict[str, Compared]
    declared: Estimate | None
    further: dict[Pair, Estimate]
    cosine: RankCorrelation
    gap: RankCorrelation


def compare(results: Results) -> Comparison:
    """Compare every arm with the grid's baseline.

    Raises KavaError: the score is exact match and an arm answered no questions, or other numbers of
    them from seed to seed or from arm to arm.
    """
    grid, arms = results.grid, results.arms
    scores = {name: _scores(name, arm, grid) for name, arm in arms.items()}
    pairs = [(name, grid.baseline) for name in arms if name != grid.baseline] + grid.pairs
    tried = {pair: _difference(pair[0], *(scores.get(name, {}) for name in pair)) for pair in pairs}
    found = {pair: own for pair, own in tried.items() if own}
    declared = (grid.contrast or "", grid.baseline)
    # The declared difference was named before the runs. It is one test, and takes no correction.
    p_values = holm({k: own.p_value for k, own in found.items() if own.p_value and k != declared})
    found = {pair: own._replace(p_holm=p_values.get(pair)) for pair, own in found.items()}
    return Comparison(
        {
            name: _compared(results, name, estimate(own), found.get((name, grid.baseline)))
            for name, own in scores.items()
        },
        found.get(declared),
        {pair: found[pair] for pair in grid.pairs if pair in found},
        *(_ranked(figure_points(results, figure)) for figure in (COSINE, GAP)),
    )


def figure_points(results: Results, figure: str) -> list[tuple[int, float, float]]:
    """Seed, figure and score of all runs that have both.

    Without a KV loss the projector has learnt nothing, and its cosine says nothing.
    """
    grid, found = results.grid, []
    for name, arm in results.arms.items():
        if (grid.set | grid.arms[name]).get("loss.kv_weight") != 0:
            figures, scores = _known(arm, figure), _scores(name, arm, grid)
            found += [(s, figures[s], float(scores[s].mean())) for s in figures if s in scores]
    return found


def _ranked(points: Sequence[tuple[int, float, float]]) -> RankCorrelation:
    return rank_correlation([x for _, x, _ in points], [y for *_, y in points])


def _scores(name: str, arm: Arm, grid: Grid) -> dict[int, np.ndarray]:
    """By seed: the held-out loss [], or for each question [Q] whether it was answered rightly."""
    if grid.score == LOSS:
        return {seed: np.array(loss) for seed, loss in _known(arm, LOSS).items()}
    found = _answers(arm, MAIN_SET)
    if missing := [seed for seed in arm if seed not in found]:
        raise KavaError(
            f"arms.{name}: no answers with seeds {missing}; set score: {LOSS}, or let the runs "
            f"answer (eval.max_new_tokens above 0, rows with answers)"
        )
    _check_sizes(name, found)
    return found


def _answers(arm: Arm, name: str) -> dict[int, np.ndarray]:
    bits = {seed: run.answers(name) for seed, run in arm.items()}
    # numpy refuses to subtract booleans, and a difference can be -1.
    return {seed: own.astype(np.int8) for seed, own in bits.items() if own is not None}


def _difference(
    where: str, arm: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]
) -> Estimate | None:
    """Over common seeds, question by question; None without one."""
    seeds = [seed for seed in arm if seed in other]
    _check_sizes(where, *({seed: side[seed] for seed in seeds} for side in (arm, other)))
    return estimate({seed: arm[seed] - other[seed] for seed in seeds})


def _check_sizes(where: str, *answered: Mapping[int, np.ndarray]) -> None:
    sizes = {bits.size for side in answered for bits in side.values()}
    if len(sizes) > 1:
        raise KavaError(
            f"arms.{where}: {sorted(sizes)} questions were answered, by seed or in the other "
            f"arm; remove its lines and its runs, and run `kava ablate` again"
        )


def _compared(
    results: Results, name: str, score: Estimate | None, difference: Estimate | None
) -> Compared:
    grid, arm = results.grid, results.arms[name]
    # The baseline minus itself is 0 by construction, which would read like a result.
    other = {} if name == grid.baseline else results.arms.get(grid.baseline, {})
    asked = dict.fromkeys(s for run in arm.values() for s in run.correct if s != MAIN_SET)
    differences = {
        s: _difference(f"{name}, set {s}", _answers(arm, s), _answers(other, s)) for s in asked
    }
    last = dict.fromkeys(key for run in arm.values() for key in run.values)
    # Figures by set begin with the set's name, figures by teacher with ``eval_``.
    sets = [k for k in last if k.endswith((f"/{EXACT_MATCH}", f"/{LOSS}")) and k[:5] != "eval_"]
    times = [
        (run.step_seconds, other[seed].step_seconds)
        for seed, run in arm.items()
        if seed in other and run.step_seconds and other[seed].step_seconds
    ]
    ours, theirs = map(statistics.median, zip(*times, strict=True)) if times else (None, None)
    return Compared(
        score,
        difference,
        *(_mean(_known(arm, key).values()) for key in (LOSS, COSINE, GAP)),
        sets={key: mean for key in sets if (mean := _mean(_known(arm, key).values())) is not None},
        set_differences={name: found for name, found in differences.items() if found},
        relative_time=ours / theirs if ours and theirs else None,
        gradient_spread=_mean(r.gradient_norm["log_std"] for r in arm.values() if r.gradient_norm),
        reached=_reached(arm, other, grid),
    )


def _reached(arm: Arm, baseline: Arm, grid: Grid) -> list[float | None]:
    """Curves of one evaluation say nothing of when, and are left out."""
    found = []
    for seed, run in arm.items():
        target = baseline[seed].values.get(grid.score) if seed in baseline else None
        points = [(p["step"], p[grid.score]) for p in run.curve if p.get(grid.score) is not None]
        if target is not None and len(points) > 1:
            found.append(steps_to_reach(points, target, grid.higher_is_better))
    return found


def _known(arm: Arm, key: str) -> dict[int, float]:
    """A figure of the last evaluation by seed, where it is a number."""
    return {seed: float(x) for seed, run in arm.items() if (x := run.values.get(key)) is not None}


def _mean(values: Iterable[float]) -> float | None:
    return statistics.fmean(known) if (known := list(values)) else None
