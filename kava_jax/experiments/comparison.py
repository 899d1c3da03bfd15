"""The results of an experiment grid, arm beside arm: figures, differences, and how sure they are.

Two arms are compared over the seeds that both have, because runs with the same seed share their
data, their questions and the student's start.

Left out on purpose: reading (``results``), and any text or picture (``grid_report``).
"""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from kava_jax.errors import KavaError
from kava_jax.experiments.grid import Grid
from kava_jax.experiments.outcome import Outcome, unpack
from kava_jax.experiments.results import Arm, Results
from kava_jax.experiments.statistics import (
    Contrast,
    Interval,
    RankCorrelation,
    holm,
    interval_of_mean,
    paired_difference,
    paired_values,
    rank_correlation,
    steps_to_reach,
)
from kava_jax.runs.evaluate import MAIN_SET

LOSS, EXACT_MATCH = "eval_loss", "exact_match_strict"
COSINE, GAP = "eval_cos_sim", "eval_alignment_gap"


class Measured(NamedTuple):
    """Mean of a figure over an arm's seeds; no interval where there is but one.

    Exact match is a fraction with the hierarchical bootstrap over seeds and questions, a loss has
    Student's interval over seeds. Seeds whose loss was not finite are left out, and named.
    """

    mean: float
    interval: Interval | None
    per_seed: dict[int, float]
    diverged: tuple[int, ...]


class Difference(NamedTuple):
    """An arm minus the baseline over the seeds that both have.

    Below two such seeds there is no ``contrast``. ``by_seeds`` is Student's interval of the seeds'
    accuracies, which is wider than the bootstrap's where seeds are few; None for a loss, whose
    ``contrast`` is Student's already. ``p_holm`` is corrected over all arms but the declared one.
    """

    mean: float
    seeds: tuple[int, ...]
    contrast: Contrast | None
    by_seeds: Interval | None
    p_holm: float | None = None


class Reached(NamedTuple):
    """When a curve reached the final score of the baseline's run with the same seed.

    ``steps`` is the mean over seeds, None unless all of them did; ``seeds`` did, of ``of``.
    """

    steps: float | None
    seeds: int
    of: int


class Compared(NamedTuple):
    """One arm beside the baseline; None is what was not measured, or what it has no part in."""

    score: Measured | None
    difference: Difference | None
    loss: float | None
    cosine: float | None
    gap: float | None
    sets: dict[str, float]
    """Means of the further held-out sets, ``old/exact_match_strict`` and ``old/eval_loss``."""
    set_differences: dict[str, Difference]
    """By set: its exact match minus the baseline's, a fraction."""
    relative_time: float | None
    """Median seconds of a step, the baseline's being 1."""
    gradient_spread: float | None
    """Standard deviation of the logarithm of the student's gradient norm, mean over seeds."""
    reached: Reached | None


class Point(NamedTuple):
    """One run: its figure and its score."""

    arm: str
    seed: int
    figure: float
    score: float


class Correlation(NamedTuple):
    """Does a figure rank the runs as the score does? ``rank`` is None below two runs."""

    points: list[Point]
    rank: RankCorrelation | None


class Comparison(NamedTuple):
    """Every arm that was run, and what the cosine and the gap say of the score.

    ``further`` are the differences that the grid asks for ``against`` other arms than the baseline,
    by both arms.
    """

    arms: dict[str, Compared]
    declared: Difference | None
    further: dict[tuple[str, str], Difference]
    cosine: Correlation
    gap: Correlation


def compare(results: Results) -> Comparison:
    """Compare every arm with the grid's baseline.

    Raises:
        KavaError: the score is exact match and an arm answered no questions, or other numbers of
            them from seed to seed or from arm to arm.
    """
    grid, baseline = results.grid, results.arms.get(results.grid.baseline)
    compared = {name: _compared(arm, baseline, grid) for name, arm in results.arms.items()}
    pairs = {(name, grid.baseline): arm.difference for name, arm in compared.items()}
    pairs |= {
        (name, other): _compared(results.arms[name], results.arms[other], grid).difference
        for name, other in grid.pairs
        if {name, other} <= results.arms.keys()
    }
    corrected = _corrected(pairs, grid)
    return Comparison(
        {
            name: arm._replace(difference=corrected[name, grid.baseline])
            for name, arm in compared.items()
        },
        corrected.get((grid.contrast, grid.baseline)) if grid.contrast else None,
        {pair: found for pair in grid.pairs if (found := corrected.get(pair))},
        *(_correlation(results, compared, figure) for figure in (COSINE, GAP)),
    )


def _corrected(
    pairs: Mapping[tuple[str, str], Difference | None], grid: Grid
) -> dict[tuple[str, str], Difference | None]:
    """The differences with their p-values corrected for each other, but for the declared one."""
    tested = {
        f"{arm} minus {other}": found.contrast.p_value
        for (arm, other), found in pairs.items()
        if found and found.contrast and (arm, other) != (grid.contrast, grid.baseline)
    }
    p_values = holm(tested)
    return {
        (arm, other): found and found._replace(p_holm=p_values.get(f"{arm} minus {other}"))
        for (arm, other), found in pairs.items()
    }


def _compared(arm: Arm, baseline: Arm | None, grid: Grid) -> Compared:
    runs = arm.runs
    other = baseline if baseline is not None and baseline.name != arm.name else None
    known = {} if other is None else other.runs
    asked = [name for run in runs.values() for name in run.correct if name != MAIN_SET]
    sets = [
        key
        for run in runs.values()
        for key in run.values
        if key.endswith((f"/{EXACT_MATCH}", f"/{LOSS}")) and not key.startswith("eval_")
    ]
    if grid.score == LOSS:
        score = _measured_loss(runs)
        difference = _difference_of_losses(runs, known)
    else:
        score = _measured_answers(_answers(runs, MAIN_SET, arm.name))
        difference = _difference_of_answers(
            _answers(runs, MAIN_SET, arm.name),
            {} if other is None else _answers(known, MAIN_SET, other.name),
            arm.name,
        )
    differences = {
        name: _difference_of_answers(
            _answered(runs, name), _answered(known, name), f"{arm.name}, set {name}"
        )
        for name in dict.fromkeys(asked)
    }
    means = {key: _mean(_known(runs, key)) for key in dict.fromkeys(sets)}
    return Compared(
        score=score,
        difference=difference,
        loss=_mean(_known(runs, LOSS)),
        cosine=_mean(_known(runs, COSINE)),
        gap=_mean(_known(runs, GAP)),
        sets={key: mean for key, mean in means.items() if mean is not None},
        set_differences={name: found for name, found in differences.items() if found},
        relative_time=_relative_time(runs, known),
        gradient_spread=_mean(
            {s: run.gradient_norm["log_std"] for s, run in runs.items() if run.gradient_norm}
        ),
        reached=_reached(runs, known, grid),
    )


def _measured_answers(correct: Mapping[int, np.ndarray]) -> Measured | None:
    if not correct:
        return None
    per_seed = {seed: float(bits.mean()) for seed, bits in correct.items()}
    interval = interval_of_mean(np.stack(list(correct.values()))) if len(correct) > 1 else None
    return Measured(statistics.fmean(per_seed.values()), interval, per_seed, ())


def _measured_loss(runs: Mapping[int, Outcome]) -> Measured | None:
    per_seed = _known(runs, LOSS)
    mean = _mean(per_seed)
    if mean is None:
        return None
    values_S = np.array(list(per_seed.values()), np.float64)
    # One sample is a pair with nothing: the difference to zero.
    one = paired_values(values_S, np.zeros_like(values_S)) if len(values_S) > 1 else None
    diverged = tuple(seed for seed in runs if seed not in per_seed)
    return Measured(mean, one.difference if one else None, per_seed, diverged)


def _difference_of_answers(
    arm: Mapping[int, np.ndarray], baseline: Mapping[int, np.ndarray], where: str
) -> Difference | None:
    seeds = tuple(seed for seed in arm if seed in baseline)
    if not seeds:
        return None
    sizes = {len(side[seed]) for side in (arm, baseline) for seed in seeds}
    if len(sizes) > 1:
        raise KavaError(
            f"arms.{where}: {sorted(sizes)} questions were answered with the same seeds as the "
            f"baseline; remove its record and its runs, and run `kava ablate` again"
        )
    arm_SQ, baseline_SQ = (np.stack([side[seed] for seed in seeds]) for side in (arm, baseline))
    mean = float(arm_SQ.mean() - baseline_SQ.mean())
    if len(seeds) < 2:
        return Difference(mean, seeds, None, None)
    by_seeds = paired_values(arm_SQ.mean(axis=1), baseline_SQ.mean(axis=1))
    return Difference(mean, seeds, paired_difference(arm_SQ, baseline_SQ), by_seeds.difference)


def _difference_of_losses(
    arm: Mapping[int, Outcome], baseline: Mapping[int, Outcome]
) -> Difference | None:
    ours, theirs = _known(arm, LOSS), _known(baseline, LOSS)
    seeds = tuple(seed for seed in ours if seed in theirs)
    if not seeds:
        return None
    arm_S, baseline_S = (
        np.array([side[seed] for seed in seeds], np.float64) for side in (ours, theirs)
    )
    contrast = paired_values(arm_S, baseline_S) if len(seeds) > 1 else None
    return Difference(float(np.mean(arm_S - baseline_S)), seeds, contrast, None)


def _relative_time(arm: Mapping[int, Outcome], baseline: Mapping[int, Outcome]) -> float | None:
    """Over common seeds; the baseline, which is compared with nothing, has none."""
    times = [
        (run.step_seconds, baseline[seed].step_seconds)
        for seed, run in arm.items()
        if seed in baseline
    ]
    pairs = [(ours, theirs) for ours, theirs in times if ours and theirs]
    if not pairs:
        return None
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ours / theirs


def _reached(
    arm: Mapping[int, Outcome], baseline: Mapping[int, Outcome], grid: Grid
) -> Reached | None:
    """Curves of one evaluation say nothing of when, and are left out."""
    found = []
    for seed, run in arm.items():
        target = baseline[seed].values.get(grid.score) if seed in baseline else None
        points = [(p["step"], p[grid.score]) for p in run.curve if p.get(grid.score) is not None]
        if target is None or len(points) < 2:
            continue
        steps, values = zip(*points, strict=True)
        whole = [int(step) for step in steps]
        found.append(steps_to_reach(whole, values, target, grid.higher_is_better))
    if not found:
        return None
    there = [steps for steps in found if steps is not None]
    mean = statistics.fmean(there) if len(there) == len(found) else None
    return Reached(mean, len(there), len(found))


def _correlation(results: Results, compared: Mapping[str, Compared], figure: str) -> Correlation:
    """Over all runs that have both; without a KV loss the projector has learnt nothing, and its
    cosine says nothing."""
    points = []
    for name, arm in results.arms.items():
        if (results.grid.set | arm.fields).get("loss.kv_weight") == 0:
            continue
        score, figures = compared[name].score, _known(arm.runs, figure)
        own = score.per_seed if score else {}
        points += [Point(name, seed, figures[seed], own[seed]) for seed in figures if seed in own]
    if len(points) < 2:
        return Correlation(points, None)
    x, y = (np.array(side, np.float64) for side in zip(*(p[2:] for p in points), strict=True))
    return Correlation(points, rank_correlation(x, y))


def _answers(runs: Mapping[int, Outcome], name: str, arm: str) -> dict[int, Bool[np.ndarray, "Q"]]:
    """Which of a set's questions every run answered rightly."""
    found = _answered(runs, name)
    if missing := [seed for seed in runs if seed not in found]:
        raise KavaError(
            f"arms.{arm}: no answers with seeds {missing}; set score: {LOSS}, or let the runs "
            f"answer (eval.exact_match=true, rows with answers)"
        )
    if len(sizes := {len(bits) for bits in found.values()}) > 1:
        raise KavaError(
            f"arms.{arm}: {sorted(sizes)} questions from seed to seed; remove its record and its "
            f"runs, and run `kava ablate` again"
        )
    return found


def _answered(runs: Mapping[int, Outcome], name: str) -> dict[int, Bool[np.ndarray, "_"]]:
    return {seed: unpack(run.correct[name]) for seed, run in runs.items() if name in run.correct}


def _known(runs: Mapping[int, Outcome], key: str) -> dict[int, float]:
    """A figure of the last evaluation by seed, where it is a number."""
    found = {seed: run.values.get(key) for seed, run in runs.items()}
    return {seed: float(value) for seed, value in found.items() if value is not None}


def _mean(by_seed: Mapping[int, float]) -> float | None:
    return statistics.fmean(by_seed.values()) if by_seed else None
