"""Pictures of a run, drawn from its ``metrics.jsonl``: what it learned and how well it is aligned.

Lines are told apart by style and a label at their end, so the pictures survive grey printing and
colour blindness. Only Figure objects are used: no global pyplot state, no display, no window.

Left out on purpose: reports and tables (a picture is all this makes), smoothing (what was logged
is what is drawn).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kava_jax.errors import KavaError
from kava_jax.storage import Place
from kava_jax.training.metrics_file import read_metrics
from kava_jax.verdict import ACCEPTABLE, EXCELLENT, GOOD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT = "#333333", "#888888"
WIDTH, HEIGHT, DPI = 8.0, 4.2, 150


class Curve(NamedTuple):
    """Steps and values of one metric, only where it was logged as a number."""

    steps: list[int]
    values: list[float]


def learning_curve(runs: Mapping[str, Place], out_png: Path) -> None:
    """Draw training cross-entropy (thin) and held-out loss (marked) of several runs.

    Args:
        runs: label of each run and its ``metrics.jsonl``; six at most can be told apart.
        out_png: the picture; its directory is made.

    Raises:
        KavaError: a file is missing or broken, or holds no loss.
    """
    if not 1 <= len(runs) <= len(STYLES):
        raise KavaError(f"runs={len(runs)} cannot be drawn in one picture; give 1 to {len(STYLES)}")
    figure, axes = _figure("cross-entropy (nats per token)")
    ends = []
    for (label, path), colour, style, marker in zip(
        runs.items(), COLOURS, STYLES, MARKERS, strict=False
    ):
        train, held_out = _curve(path, "train", "ce"), _curve(path, "eval", "eval_loss")
        last = held_out if held_out.steps else train
        if not last.steps:
            raise KavaError(f"{path} holds no loss; let the run reach its first logged step")
        axes.plot(*train, color=colour, linestyle=style, linewidth=0.8, alpha=0.45)
        axes.plot(
            *held_out, color=colour, linestyle=style, linewidth=1.8, marker=marker, markersize=5
        )
        ends.append((last.steps[-1], last.values[-1], label, colour))
    axes.set_yscale("log")
    plain_ticks(axes)
    label_ends(axes, ends)
    axes.set_title(
        "Thin: training. Marked: held-out. Logarithmic scale.", loc="left", fontsize=10, color=FAINT
    )
    _save(figure, out_png)


def alignment_curve(metrics_jsonl: Place, out_png: Path) -> None:
    """Draw cosine, shuffled cosine (dashed) and their gap over the verdict bands of one run.

    Lines are what training logged (the running mean where there is one), dots are evaluations on
    held-out data.

    Raises:
        KavaError: the file is missing or broken, or holds no cosine (a run without a teacher).
    """
    cosine = _curve(metrics_jsonl, "train", "cos_running", "cos_sim")
    gap = _curve(metrics_jsonl, "train", "gap_running", "alignment_gap")
    shuffled = _curve(metrics_jsonl, "train", "cos_shuffled")
    if not cosine.steps:
        raise KavaError(f"{metrics_jsonl} holds no cosine; name a run that has a teacher")
    figure, axes = _figure("cosine")
    shade_bands(axes, lowest=min(0.0, *cosine.values, *gap.values, *shuffled.values))
    ends = []
    for curve, key, label, colour, style, marker in (
        (cosine, "eval_cos_sim", "cosine", COLOURS[0], "-", "o"),
        (shuffled, "eval_cos_shuffled", "cosine, shuffled", COLOURS[1], "--", "s"),
        (gap, "eval_alignment_gap", "gap", COLOURS[2], "-.", "^"),
    ):
        if not curve.steps:
            continue
        axes.plot(*curve, color=colour, linestyle=style, linewidth=1.8)
        held_out = _curve(metrics_jsonl, "eval", key)
        axes.plot(*held_out, color=colour, linestyle="", marker=marker, markersize=6)
        ends.append((curve.steps[-1], curve.values[-1], label, colour))
    label_ends(axes, ends)
    axes.set_title(
        "Lines: training. Dots: held-out. Gap: cosine above that of unrelated examples.",
        loc="left",
        fontsize=10,
        color=FAINT,
    )
    _save(figure, out_png)


def _curve(path: Place, kind: Any, *keys: str) -> Curve:
    """The first of ``keys`` that has numbers."""
    records = read_metrics(path, kind)
    for key in keys:
        # A step that was evaluated twice (before and after a resume) counts as it was last.
        points = {r["step"]: r[key] for r in records if r.get(key) is not None}
        if points:
            return Curve(list(points), list(points.values()))
    return Curve([], [])


def _figure(y_label: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def plain_ticks(axes: "Axes") -> None:
    """4.5 and not 4.5 x 10^0, 0.2 and not 2e-01, on the minor ticks too where there are few."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.4)))


def shade_bands(axes: "Axes", lowest: float) -> None:
    """The original method's verdicts as grey bands, named on the left."""
    bands = (
        (lowest, ACCEPTABLE, "Poor", 0.00),
        (ACCEPTABLE, GOOD, "Acceptable", 0.05),
        (GOOD, EXCELLENT, "Good", 0.10),
        (EXCELLENT, 1.0, "Excellent", 0.16),
    )
    for low, high, name, grey in bands:
        axes.axhspan(low, high, color="black", alpha=grey, linewidth=0, zorder=0)
        axes.annotate(
            name,
            (0.005, (low + high) / 2),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=FAINT if grey < 0.1 else INK,
        )
    axes.set_ylim(lowest, 1.0)


def label_ends(axes: "Axes", ends: Sequence[tuple[int, float, str, Any]]) -> None:
    """Name every line at its end, moving names apart where lines end together."""
    axes.autoscale_view()
    # Distances between names are distances on paper, so they are taken after the axis' own scale.
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(axes.get_ylim())
    right = max(step for step, *_ in ends)
    placed = low - (high - low)
    for _, value, label, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(scale.transform(value), placed + 0.05 * (high - low))
        axes.annotate(
            label,
            (right, scale.inverted().transform(placed)),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=colour,
            annotation_clip=False,
        )


def _save(figure: "Figure", out_png: Path) -> None:
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, format="png")
