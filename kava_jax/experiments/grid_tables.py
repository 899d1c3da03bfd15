"""The comparison of a grid's arms as tables for a page.

Exact match is in percent and its differences in points; other figures are in their own unit.
Left out on purpose: Markdown tables for the docs, and pictures (``grid_curves``).
"""

from kava_jax.experiments.comparison import EXACT_MATCH, LOSS, Compared, Comparison, Difference
from kava_jax.experiments.grid import Grid
from kava_jax.experiments.grid_curves import by_score
from kava_jax.experiments.page import Row, Table, number
from kava_jax.experiments.results import Results
from kava_jax.experiments.statistics import Interval, in_words

DASH = "\N{EN DASH}"


def score_table(results: Results, comparison: Comparison) -> Table:
    """Score and difference to the baseline of all arms that have a run, sorted by score."""
    grid = results.grid
    answers = grid.score == EXACT_MATCH
    heads = [
        "arm",
        "seeds",
        "exact match, %" if answers else "held-out loss",
        "95 % interval",
        "minus baseline" + (", points" if answers else ""),
        "95 % interval",
        *(["Student's 95 % interval"] if answers else []),
        "p",
    ]
    rows = []
    for arm in by_score(grid, comparison):
        own, runs = comparison.arms[arm], len(results.arms[arm].runs)
        rows.append(Row(_marked(arm, grid), _scores(own, runs, arm == grid.contrast, answers)))
    return Table(f"Scores, {_order(grid)} first", heads, rows)


def figures_table(results: Results, comparison: Comparison) -> Table:
    """What else was measured of all arms, in the same order."""
    grid = results.grid
    # In a grid that is scored by it, the loss is in the other table.
    loss = grid.score != LOSS
    heads = [
        "arm",
        *(["held-out loss"] if loss else []),
        "cosine",
        "gap",
        "time of a step",
        "gradient spread",
        "steps to the baseline's score",
    ]
    rows = []
    for arm in by_score(grid, comparison):
        own = comparison.arms[arm]
        cells = [number(own.loss)] if loss else []
        cells += [number(own.cosine), number(own.gap)]
        cells += [DASH if own.relative_time is None else f"{own.relative_time:.2f}"]
        cells += [number(own.gradient_spread), _steps(own)]
        rows.append(Row(_marked(arm, grid), cells))
    return Table(f"Other figures, {_order(grid)} score first", heads, rows)


def further_notes(comparison: Comparison) -> list[str]:
    """What the grid asks for besides the differences to its baseline, one sentence each."""
    return [
        f"{in_words(found.contrast, *pair)}, {found.p_holm:.3f} after Holm's correction."
        for pair, found in comparison.further.items()
        if found.contrast and found.p_holm is not None
    ]


def score_notes(grid: Grid) -> list[str]:
    """What the columns of the scores are."""
    seeds = len(grid.seeds)
    least = f"; with {seeds} seeds it cannot go below {2 / 2**seeds:.2g}" if seeds > 1 else ""
    found = [
        f"Differences are paired by seed, over the seeds that an arm shares with the baseline; a "
        f"dash stands where there is but one. p is the sign-flip test's, corrected by Holm's "
        f"method over all arms but the declared one, which is tested alone{least}."
    ]
    if grid.score == EXACT_MATCH:
        found.append(
            "The first interval of a difference is a hierarchical bootstrap over seeds and "
            "questions, which is too narrow where seeds are few and differ; Student's, of the "
            "seeds' accuracies, stands beside it."
        )
    return found


FIGURES_NOTE = (
    "Time of a step: its median, the baseline's being 1. Gradient spread: standard deviation of "
    "the logarithm of the student's gradient norm after the first quarter. Steps to the baseline's "
    "score: when the curve reached the final score of the baseline's run with the same seed, mean "
    "over seeds, or how many of them did; a curve that is there when first evaluated counts as "
    "reaching it then."
)


def sets_table(results: Results, comparison: Comparison) -> Table | None:
    """Further held-out sets: exact match (or loss) of every arm, and its difference."""
    grid = results.grid
    keys = dict.fromkeys(key for arm in comparison.arms.values() for key in arm.sets)
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    if not names:
        return None
    heads = ["arm"]
    for name in names:
        if f"{name}/{EXACT_MATCH}" in keys:
            heads += [f"{name}: exact match, %", "minus baseline, points", "95 % interval"]
        if f"{name}/{LOSS}" in keys:
            heads += [f"{name}: loss"]
    rows = []
    for arm in by_score(grid, comparison):
        own, cells = comparison.arms[arm], []
        for name in names:
            if f"{name}/{EXACT_MATCH}" in keys:
                cells.append(_percent(own.sets.get(f"{name}/{EXACT_MATCH}")))
                cells += _difference(own.set_differences.get(name), answers=True)
            if f"{name}/{LOSS}" in keys:
                cells.append(number(own.sets.get(f"{name}/{LOSS}")))
        rows.append(Row(_marked(arm, grid), cells))
    return Table(f"By set, {_order(grid)} score first", heads, rows)


def _marked(arm: str, grid: Grid) -> str:
    marks = {grid.baseline: " (baseline)", grid.contrast: " (declared)"}
    steps = grid.arms[arm].get("train.steps")
    return arm + marks.get(arm, "") + (f" ({steps} steps)" if steps else "")


def _order(grid: Grid) -> str:
    return "highest" if grid.higher_is_better else "lowest"


def _scores(own: Compared, runs: int, declared: bool, answers: bool) -> list[str]:
    score, found = own.score, own.difference
    lost = f", {len(score.diverged)} diverged" if score and score.diverged else ""
    mean = score.mean if score else None
    cells = [
        f"{runs}{lost}",
        _percent(mean) if answers else number(mean),
        _interval(score.interval if score else None, answers, signed=False),
        *_difference(found, answers),
    ]
    if answers:
        cells.append(_interval(found.by_seeds if found else None, answers, signed=True))
    return [*cells, _p(found, declared)]


def _difference(found: Difference | None, answers: bool) -> list[str]:
    """The mean, and its interval where there is one."""
    if found is None:
        return [DASH, DASH]
    interval = found.contrast.difference if found.contrast else None
    return [_signed(found.mean, answers), _interval(interval, answers, signed=True)]


def _interval(found: Interval | None, answers: bool, signed: bool) -> str:
    if found is None:
        return DASH
    ends = found.low, found.high
    if signed:
        return " to ".join(_signed(end, answers) for end in ends)
    return " to ".join(_percent(end) if answers else number(end) for end in ends)


def _signed(value: float, answers: bool) -> str:
    return f"{100 * value:+z.1f}" if answers else f"{value:+z.3g}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def _p(found: Difference | None, declared: bool) -> str:
    if found is None or found.contrast is None:
        return DASH
    p = found.contrast.p_value if declared or found.p_holm is None else found.p_holm
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _steps(own: Compared) -> str:
    reached = own.reached
    if reached is None:
        return DASH
    if reached.steps is None:
        return f"{reached.seeds} of {reached.of} seeds"
    return f"{reached.steps:.0f}"
