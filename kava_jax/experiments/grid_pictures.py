"""Pictures of an experiment grid: curves over seeds, the arms' scores, a figure beside the score.

Arms are told apart by line style or marker and by name, so the pictures survive grey printing and
colour blindness, and all are narrow enough for a phone.

Left out on purpose: which arms are drawn and what the numbers mean (``grid_report``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kava_jax.errors import KavaError
from kava_jax.experiments.curves import (
    COLOURS,
    DPI,
    FAINT,
    INK,
    MARKERS,
    STYLES,
    label_ends,
    plain_ticks,
    shade_bands,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches: the pictures, one arm's line of the scores, and what stands above and below them.
WIDTH, HEIGHT = 4.6, 3.4
LINE, MARGINS = 0.23, 0.75
# The markers as letters, so that a name that was moved off its line still says which it is.
SIGNS = "\N{BLACK CIRCLE}\N{BLACK SQUARE}\N{BLACK UP-POINTING TRIANGLE}\N{BLACK DIAMOND}"
SIGNS += "\N{BLACK DOWN-POINTING TRIANGLE}\N{HEAVY GREEK CROSS}"
# More arms than this cannot be told apart in one picture.
MOST = len(STYLES)


class Band(NamedTuple):
    """One arm's curve: the mean over seeds at each step, and the ends of a band around it.

    ``low`` and ``high`` are empty where there is but one seed.
    """

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Dot(NamedTuple):
    """One arm's score with the ends of its interval, None where there is none."""

    arm: str
    mean: float
    low: float | None
    high: float | None


def band_curves(
    bands: Mapping[str, Band],
    styles: Mapping[str, int],
    y_label: str,
    out: Path,
    *,
    logarithmic: bool = False,
    verdicts: bool = False,
    least: float | None = None,
) -> None:
    """Draw one line with its band per arm, named at its end.

    Args:
        bands: by arm.
        styles: each arm's place among the line styles, the same in all pictures of a page.
        y_label: of the values, with their unit.
        out: the picture; its directory is made.
        logarithmic: whether the y axis is.
        verdicts: shade the verdict bands of a cosine.
        least: a value to mark, below which a figure means nothing.

    Raises:
        KavaError: no arm, or more than can be told apart.
    """
    from matplotlib.ticker import MaxNLocator

    if not 1 <= len(bands) <= MOST:
        raise KavaError(f"bands={len(bands)} arms cannot be drawn together; give 1 to {MOST}")
    figure, axes = _figure(HEIGHT)
    if verdicts:
        shade_bands(axes, min(0.0, *(min(band.low or band.mean) for band in bands.values())))
    ends = []
    for arm, band in bands.items():
        place = styles[arm]
        axes.plot(
            band.steps,
            band.mean,
            color=COLOURS[place],
            linestyle=STYLES[place],
            marker=MARKERS[place],
            markersize=4,
            linewidth=1.8,
        )
        if band.low:
            axes.fill_between(
                band.steps, band.low, band.high, color=COLOURS[place], alpha=0.15, linewidth=0
            )
        name = f"{SIGNS[place]} {arm}"
        ends.append((band.steps[-1], band.mean[-1], name, _darker(COLOURS[place])))
    if least is not None:
        axes.axhline(least, color=FAINT, linewidth=1.0, linestyle=(0, (2, 2)))
    if logarithmic:
        axes.set_yscale("log")
        plain_ticks(axes)
    label_ends(axes, ends)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    _save(figure, axes, out)


def score_dots(
    dots: Sequence[Dot], baseline: str | None, contrast: str | None, x_label: str, out: Path
) -> None:
    """Draw every arm's score as a dot with its interval, the first arm at the top.

    The baseline is a square with a dashed line through all arms, the declared contrast a diamond.

    Raises:
        KavaError: there is no arm.
    """
    if not dots:
        raise KavaError("dots=0: no arm has a score; let a run of the grid finish")
    figure, axes = _figure(MARGINS + LINE * len(dots))
    for place, dot in enumerate(dots):
        special = dot.arm in (baseline, contrast)
        colour = INK if special else COLOURS[0]
        if dot.low is not None and dot.high is not None:
            axes.hlines(place, dot.low, dot.high, color=colour, linewidth=1.6)
        marker = "s" if dot.arm == baseline else "D" if dot.arm == contrast else "o"
        axes.plot(dot.mean, place, marker=marker, color=colour, markersize=6)
        if dot.arm == baseline:
            axes.axvline(dot.mean, color=FAINT, linewidth=1.0, linestyle="--", zorder=0)
        axes.annotate(
            f"{dot.mean:.3g}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    names = [
        f"{dot.arm} (baseline)"
        if dot.arm == baseline
        else f"{dot.arm} (declared)"
        if dot.arm == contrast
        else dot.arm
        for dot in dots
    ]
    axes.set_yticks(range(len(dots)), names, fontsize=9.5)
    axes.set_ylim(len(dots) - 0.4, -0.6)
    axes.set_xlabel(x_label, color=INK)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.spines["left"].set_visible(False)
    _save(figure, axes, out)


def scatter(
    points: Mapping[str, Sequence[tuple[float, float]]],
    styles: Mapping[str, int],
    x_label: str,
    y_label: str,
    out: Path,
) -> None:
    """Draw every run as a dot; arms that have a style are marked and named, the others grey.

    Args:
        points: by arm, (figure, score) of each of its runs.
        styles: each named arm's place among the markers.
        x_label, y_label: what is drawn, with units.
        out: the picture; its directory is made.

    Raises:
        KavaError: there is no run.
    """
    if not any(points.values()):
        raise KavaError("points=0: no run has both figures; evaluate runs that have a teacher")
    figure, axes = _figure(HEIGHT)
    rest = [point for arm, own in points.items() if arm not in styles for point in own]
    if rest:
        axes.plot(*np.array(rest).T, "o", color="#aaaaaa", markersize=5, label="other arms")
    for arm, own in points.items():
        if arm not in styles or not own:
            continue
        place = styles[arm]
        axes.plot(
            *np.array(own).T,
            linestyle="",
            marker=MARKERS[place],
            color=COLOURS[place],
            markeredgecolor="white",
            markersize=8,
            label=arm,
        )
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    _save(figure, axes, out)


def _darker(colour: str) -> tuple[float, float, float]:
    """For letters, which are too thin to be read in a light colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.6 * red, 0.6 * green, 0.6 * blue


def _figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _save(figure: "Figure", axes: "Axes", out: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.set_axisbelow(True)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
