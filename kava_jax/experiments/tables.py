"""The comparison of a grid's arms as tables, for its page and for the docs.

Exact match is in percent and its differences in points; other figures are in their own unit.
"""

from statistics import fmean
from typing import NamedTuple

from kava_jax.experiments.contrasts import EXACT_MATCH, LOSS, Comparison
from kava_jax.experiments.grid import Grid
from kava_jax.experiments.pictures import number
from kava_jax.experiments.results import Results
from kava_jax.experiments.statistics import Ends, Estimate, in_words

DASH = "\N{EN DASH}"


class Table(NamedTuple):
    """A table; the first cell of a row is its head."""

    caption: str
    heads: list[str]
    rows: list[list[str]]


def by_score(grid: Grid, comparison: Comparison) -> list[str]:
    """Arms by their score, the best at the front; those without one at the end, in order."""
    scores = {name: own.score.mean for name, own in comparison.arms.items() if own.score}
    ordered = sorted(scores, key=scores.__getitem__, reverse=grid.higher_is_better)
    return ordered + [name for name in comparison.arms if name not in scores]


def marks(grid: Grid) -> dict[str | None, str]:
    """What is said of the arms that are not like the others."""
    return {grid.contrast: "declared", grid.baseline: "baseline"}


def score_table(results: Results, comparison: Comparison) -> Table:
    """Score and difference to the baseline of all arms that have a run, sorted by score."""
    grid = results.grid
    answers = grid.score == EXACT_MATCH
    heads = ["arm", "seeds", "exact match, %" if answers else "held-out loss", "95 % interval"]
    heads += ["minus baseline" + (", points" if answers else ""), "95 % interval"]
    heads += ["Student's 95 % interval", "p"] if answers else ["p"]
    rows = []
    for arm in by_score(grid, comparison):
        score, found = comparison.arms[arm].score, comparison.arms[arm].difference
        # A run whose loss is not finite has no score.
        lost = len(results.arms[arm]) - len(score.per_seed) if score else 0
        cells = [f"{len(results.arms[arm])}" + (f", {lost} diverged" if lost else "")]
        cells += [*_estimate(score, answers), *_estimate(found, answers, signed=True)]
        cells += [_ends(found.student if found else None, answers, signed=True)] if answers else []
        rows.append([_named(arm, grid), *cells, p_value(found)])
    return Table(f"Scores, {order(grid)} first", heads, rows)


def figures_table(results: Results, comparison: Comparison) -> Table:
    """What else was measured of all arms, in the same order."""
    grid = results.grid
    # In a grid that is scored by it, the loss is in the other table.
    loss = ["held-out loss"] if grid.score != LOSS else []
    heads = ["arm", *loss, "cosine", "gap", "time of a step", "gradient spread"]
    rows = []
    for arm in by_score(grid, comparison):
        own = comparison.arms[arm]
        cells = [number(own.loss)] if loss else []
        cells += [number(own.cosine), number(own.gap)]
        cells += [DASH if own.relative_time is None else f"{own.relative_time:.2f}"]
        cells += [number(own.gradient_spread), DASH]
        if own.reached:
            there = [step for step in own.reached if step is not None]
            whole = len(there) == len(own.reached)
            some = f"{len(there)} of {len(own.reached)} seeds"
            cells[-1] = f"{fmean(there):.0f}" if whole else some
        rows.append([_named(arm, grid), *cells])
    heads += ["steps to the baseline's score"]
    return Table(f"Other figures, {order(grid)} score first", heads, rows)


def sets_table(results: Results, comparison: Comparison) -> Table | None:
    """Further held-out sets: exact match (or loss) of every arm, and its difference."""
    grid = results.grid
    keys = dict.fromkeys(key for arm in comparison.arms.values() for key in arm.sets)
    heads, columns = ["arm"], []
    for name in dict.fromkeys(key.rpartition("/")[0] for key in keys):
        if f"{name}/{EXACT_MATCH}" in keys:
            heads += [f"{name}: exact match, %", "minus baseline, points", "95 % interval"]
            columns += [(name, EXACT_MATCH)]
        if f"{name}/{LOSS}" in keys:
            heads += [f"{name}: loss"]
            columns += [(name, LOSS)]
    rows = []
    for arm in by_score(grid, comparison):
        own, cells = comparison.arms[arm], [_named(arm, grid)]
        for name, figure in columns:
            answers = figure == EXACT_MATCH
            cells += [_figure(own.sets.get(f"{name}/{figure}"), answers)]
            cells += _estimate(own.set_differences.get(name), True, signed=True) if answers else []
        rows.append(cells)
    return Table(f"By set, {order(grid)} score first", heads, rows) if columns else None


def further_notes(comparison: Comparison) -> list[str]:
    """What the grid asks for apart from the differences to its baseline, one sentence each."""
    return [
        f"{in_words(found, *pair)}, {found.p_holm:.3f} after Holm's correction."
        for pair, found in comparison.further.items()
        if found.p_holm is not None
    ]


def order(grid: Grid) -> str:
    """Which scores come first."""
    return "highest" if grid.higher_is_better else "lowest"


def p_value(found: Estimate | None) -> str:
    """Corrected, but for the declared difference, which is tested alone."""
    p = None if found is None else found.p_value if found.p_holm is None else found.p_holm
    return DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _named(arm: str, grid: Grid) -> str:
    mark, steps = marks(grid).get(arm), grid.arms[arm].get("train.steps")
    return arm + (f" ({mark})" if mark else "") + (f" ({steps} steps)" if steps else "")


def _estimate(found: Estimate | None, answers: bool, signed: bool = False) -> list[str]:
    """The mean, and its interval where there is one."""
    mean, ends = (found.mean, found.interval) if found else (None, None)
    return [_figure(mean, answers, signed), _ends(ends, answers, signed)]


def _ends(found: Ends | None, answers: bool, signed: bool = False) -> str:
    return DASH if found is None else " to ".join(_figure(end, answers, signed) for end in found)


def _figure(value: float | None, answers: bool, signed: bool = False) -> str:
    if value is None or not (answers or signed):
        return number(value)
    return f"{100 * value:{'+z.1f' if signed else '.1f'}}" if answers else f"{value:+z.3g}"
