"""What an experiment grid's pictures show, as numbers and as words: bands of curves, dots, points.

Left out on purpose: drawing (``grid_pictures``), and where pictures stand (``grid_report``).
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kava_jax.experiments.comparison import (
    COSINE,
    EXACT_MATCH,
    GAP,
    LOSS,
    Comparison,
    Correlation,
)
from kava_jax.experiments.grid import Grid
from kava_jax.experiments.grid_pictures import (
    MOST,
    Band,
    Dot,
    band_curves,
    scatter,
    score_dots,
)
from kava_jax.experiments.page import Picture, number, picture
from kava_jax.experiments.results import Arm, Results
from kava_jax.experiments.statistics import paired_values
from kava_jax.verdict import LEAST_GAP

# Exact match is shown in percent.
SCALE = {EXACT_MATCH: 100}
AXES = {EXACT_MATCH: "exact match (%)", LOSS: "held-out loss (nats per token)"}
# Student's interval of fewer seeds is wider than any picture: their range is drawn.
FEWEST_SEEDS = 3


def chosen_arms(results: Results, comparison: Comparison) -> dict[str, int]:
    """Which arms are drawn as lines, with their places among the styles.

    The baseline, the declared contrast, and those with the best scores; six at most.
    """
    grid = results.grid
    first = [name for name in (grid.baseline, grid.contrast) if name in results.arms]
    rest = [name for name in by_score(grid, comparison) if name not in first]
    return {str(name): place for place, name in enumerate([*first, *rest][:MOST])}


def by_score(grid: Grid, comparison: Comparison) -> list[str]:
    """Arms by their score, the best at the front; those without one at the end, in order."""
    sign = -1 if grid.higher_is_better else 1

    def key(name: str) -> tuple[bool, float]:
        score = comparison.arms[name].score
        return (score is None, sign * score.mean if score else 0.0)

    return sorted(comparison.arms, key=key)


def band(arm: Arm, key: str) -> Band | None:
    """Mean of a curve over seeds, at the steps that all seeds have, with a band around it.

    From three seeds on the band is Student's 95 % interval of the mean, of two their range. None
    where the arm has no such figure. Exact match is in percent, and its band ends at 0 and 100.
    """
    curves = [
        {int(p["step"] or 0): p[key] for p in run.curve if p.get(key) is not None}
        for run in arm.runs.values()
    ]
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    if not steps:
        return None
    scale = SCALE.get(key, 1)
    values_PS = scale * np.array([[curve[step] for curve in curves] for step in steps], np.float64)
    mean = values_PS.mean(axis=1).tolist()
    if len(curves) == 1:
        return Band(steps, mean, [], [])
    if len(curves) < FEWEST_SEEDS:
        ends_P2 = np.stack([values_PS.min(axis=1), values_PS.max(axis=1)], axis=1)
    else:
        ends_P2 = np.array([paired_values(row, 0 * row).difference[1:3] for row in values_PS])
    low, high = np.clip(ends_P2, 0, 100).T.tolist() if key == EXACT_MATCH else ends_P2.T.tolist()
    return Band(steps, mean, low, high)


def curve_pictures(
    results: Results, styles: Mapping[str, int], keys: Sequence[str]
) -> list[Picture]:
    """One picture per figure that was evaluated more than once on the way."""
    named: dict[str, tuple[str, dict[str, Any]]] = {
        LOSS: (AXES[LOSS], {"logarithmic": True}),
        EXACT_MATCH: (AXES[EXACT_MATCH], {}),
        COSINE: ("held-out cosine", {"verdicts": True}),
        GAP: ("held-out alignment gap", {"least": LEAST_GAP}),
    }
    found = []
    for key in keys:
        label, options = named[key]
        bands = {arm: band(results.arms[arm], key) for arm in styles}
        drawn = {arm: own for arm, own in bands.items() if own and len(own.steps) > 1}
        if not drawn:
            continue
        more = {
            COSINE: " Grey bands are the verdicts of the original method.",
            GAP: f" Below the dotted line at {LEAST_GAP:g} a cosine means nothing.",
        }
        found.append(
            picture(
                partial(_draw_bands, drawn, dict(styles), label, options),
                f"Curves of {label}. {' '.join(_band_in_words(*item) for item in drawn.items())}",
                f"{label[0].upper()}{label[1:]} over the steps, {_band_is(results, drawn)}."
                f"{more.get(key, '')}",
            )
        )
    return found


def score_picture(results: Results, comparison: Comparison) -> Picture | None:
    """All arms' scores, the best at the top; None before the first."""
    grid = results.grid
    scale = SCALE.get(grid.score, 1)
    dots = []
    for arm in by_score(grid, comparison):
        if score := comparison.arms[arm].score:
            ends = score.interval[1:3] if score.interval else (None, None)
            dots.append(Dot(arm, scale * score.mean, *(e and scale * e for e in ends)))
    if not dots:
        return None
    order = "highest" if grid.higher_is_better else "lowest"
    return picture(
        partial(score_dots, dots, grid.baseline, grid.contrast, AXES[grid.score]),
        f"Score of every arm, {AXES[grid.score]}, {order} first. "
        f"{'; '.join(map(_dot_in_words, dots))}.",
        f"Mean over seeds, {order} first{_interval_is(grid, dots)}. Square and dashed line: the "
        f"baseline. Differences to it are paired, and stand in the table.",
    )


def _interval_is(grid: Grid, dots: Sequence[Dot]) -> str:
    if all(dot.low is None for dot in dots):
        return "; there is one seed of each, and so no interval"
    if grid.score == EXACT_MATCH:
        return ", with the 95 % interval of a hierarchical bootstrap over seeds and questions"
    return ", with Student's 95 % interval over seeds"


def scatter_pictures(
    results: Results, comparison: Comparison, styles: Mapping[str, int]
) -> list[Picture]:
    """The score of every run beside its cosine, and beside its gap."""
    grid, found = results.grid, []
    scale = SCALE.get(grid.score, 1)
    for name, label, correlation in (
        ("cosine", "held-out cosine", comparison.cosine),
        ("gap", "held-out alignment gap", comparison.gap),
    ):
        if not correlation.points:
            continue
        points: dict[str, list[tuple[float, float]]] = {}
        for point in correlation.points:
            points.setdefault(point.arm, []).append((point.figure, scale * point.score))
        means = "; ".join(
            f"{arm} {number(statistics.fmean(x for x, _ in own))}, "
            f"{number(statistics.fmean(y for _, y in own))}"
            for arm, own in points.items()
        )
        words = correlation_in_words(correlation)
        found.append(
            picture(
                partial(scatter, points, dict(styles), label, AXES[grid.score]),
                f"Score beside the {name}, one dot per run. {words} Means of {name} and score by "
                f"arm: {means}.",
                f"One dot per run. {words}",
            )
        )
    return found


def correlation_in_words(correlation: Correlation) -> str:
    """Spearman's rho with its interval, and what to hold of it."""
    rank, runs = correlation.rank, len(correlation.points)
    if rank is None or rank.rho is None:
        return f"No rank correlation: {runs} runs, or all alike."
    words = f"Rank correlation (Spearman's rho) {rank.rho:.2f} over {runs} runs"
    if rank.low is None or rank.high is None:
        return f"{words}, too few for an interval."
    return (
        f"{words}, 95 % interval {rank.low:.2f} to {rank.high:.2f}; it takes runs for independent, "
        f"which those of one arm are not, so it is too narrow."
    )


def _draw_bands(
    bands: dict[str, Band], styles: dict[str, int], label: str, options: dict[str, Any], out: Any
) -> None:
    band_curves(bands, styles, label, out, **options)


def _band_is(results: Results, drawn: Mapping[str, Band]) -> str:
    counts = {len(results.arms[arm].runs) for arm in drawn}
    words = []
    if counts & {1}:
        words.append("one seed has no band")
    if counts & {2}:
        words.append("of two seeds the band is their range")
    if max(counts) >= FEWEST_SEEDS:
        words.append("the band is Student's 95 % interval")
    return f"mean over seeds; {'; '.join(words)}"


def _band_in_words(arm: str, own: Band) -> str:
    ends = f" ({number(own.low[-1])} to {number(own.high[-1])})" if own.low else ""
    return (
        f"{arm}: {number(own.mean[0])} at step {own.steps[0]}, {number(own.mean[-1])}{ends} at "
        f"step {own.steps[-1]}."
    )


def _dot_in_words(dot: Dot) -> str:
    if dot.low is None or dot.high is None:
        return f"{dot.arm} {dot.mean:.3g}"
    return f"{dot.arm} {dot.mean:.3g} ({dot.low:.3g} to {dot.high:.3g})"
