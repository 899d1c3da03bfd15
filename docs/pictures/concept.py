"""Draw the pictures of docs/concept.md and docs/concept.zh.md.

    python docs/pictures/concept.py [DIRECTORY]      beside this file when absent; no GPU needed

Narrow, with large letters and few lines, so that they can be read on a phone and in grey: lines
differ in style and carry their own names. What is drawn comes from ``concept_numbers``.
"""

import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import concept_numbers as numbers
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

WIDTH, DPI = 5.2, 150
INK, FAINT = "#222222", "#8a8a8a"
# Okabe and Ito: dark enough on white, and apart in grey as well.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw(directory: Path) -> list[Path]:
    """Write every picture into ``directory`` and return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in PICTURES.items():
        path, drawn = directory / f"{name}.png", BytesIO()
        make().savefig(drawn, dpi=DPI)
        # A few dozen shades are enough for lines, and a quarter of the bytes.
        Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)
        written.append(path)
    return written


def _figure(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11, colors=INK)
    return figure, panels


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, color=INK)


def _named(axes: Axes, x: float, y: float, text: str, colour: str = INK, **options: Any) -> None:
    axes.text(x, y, text, color=colour, fontsize=11, **options)


def length_and_angle() -> Figure:
    """MSE and Mercator loss against the angle, for students of several lengths."""
    ratios = (0.5, 1.0, 2.0)
    found = numbers.by_angle(ratios)
    styles = (("--", GREEN), ("-", BLUE), ("-.", RED))
    figure, (upper, lower) = _figure(6.2, 2, sharex=True)
    for row, ratio, (style, colour) in zip(found.mse, ratios, styles, strict=True):
        upper.plot(found.degrees, row, style, color=colour, linewidth=2)
        _named(upper, 183, row[-1], f"{ratio:g} x", colour, va="center")
    upper.plot([0, 60], [found.mse[2][0], found.mse[0][30]], "o", color=INK, clip_on=False)
    _named(upper, 3, found.mse[2][0] + 0.15, "A", fontweight="bold")
    _named(upper, 64, 0.03, "B", fontweight="bold")
    words = "A: twice as long, 0° off\nB: half as long, 60° off\nB has the lower loss"
    _named(upper, 4, 3.1, words)
    _title(upper, "MSE: one curve for each length")
    for row, (style, colour) in zip(found.mercator, styles, strict=True):
        lower.plot(found.degrees, row, style, color=colour, linewidth=2)
    _named(lower, 183, 2.0, "all", va="center")
    _title(lower, "Mercator, 1 - cos: one curve for all lengths")
    lower.set_xlabel("angle between student and target (degrees)", fontsize=12)
    for axes in (upper, lower):
        axes.set_ylabel("loss", fontsize=12)
        axes.set_ylim(0)
        axes.set_xlim(0, 180)
        axes.set_xticks(range(0, 181, 30))
    return figure


def loss_surfaces() -> Figure:
    """Contours and downhill arrows of MSE and of Mercator."""
    panels = (
        ("MSE: circles around the target", "mse", [0.1, 0.5, 1, 2, 3, 5]),
        ("Mercator: rays, and every arrow turns", "mercator", [0.05, 0.2, 0.5, 1, 1.5, 1.9]),
    )
    figure, axes = _figure(9.9, 2)
    for ax, (title, loss, levels) in zip(axes, panels, strict=True):
        found = numbers.surface(loss)
        lines = ax.contour(
            found.axis, found.axis, found.values, levels, colors=FAINT, linewidths=1.2
        )
        ax.clabel(lines, fmt="%g", fontsize=11, colors=INK)
        few = slice(10, None, 23)
        arrows = found.downhill[few, few]
        length = np.linalg.norm(arrows, axis=-1, keepdims=True)
        arrows = arrows / np.maximum(length, 1e-9) * np.clip(length, 0, 1.5) ** 0.5
        x, y = np.meshgrid(found.axis[few], found.axis[few])
        ax.quiver(x, y, *np.moveaxis(arrows, -1, 0), color=BLUE, scale=19, width=0.006)
        ax.plot(*numbers.TARGET, "*", color=RED, markersize=17)
        ax.plot(0, 0, "+", color=INK, markersize=12, markeredgewidth=2)
        _named(ax, 1.28, 1.15, "target", RED, fontweight="bold")
        ax.set_aspect("equal")
        ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        _title(ax, title)
    return figure


def magnitude_term() -> Figure:
    """The length term beside the direction term's largest value."""
    ratios = np.geomspace(0.05, 20.0, 121)
    betas = (0.01, 0.05, 0.1)
    figure, (axes,) = _figure(3.6)
    styles = ((BLUE, "-"), (GREEN, "--"), (RED, "-."))
    for beta, row, (colour, style) in zip(
        betas, numbers.by_ratio(ratios, betas), styles, strict=True
    ):
        axes.plot(ratios, row, style, color=colour, linewidth=2)
        _named(axes, 21, row[-1], f"beta {beta:g}", colour, va="center")
    axes.axvspan(0.5, 2.0, color="#e6e6e6", linewidth=0)
    _named(axes, 1.0, 0.52, "0.5 to 2:\nno alarm", ha="center")
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.5, 1, 2, 10], ["0.1", "0.5", "1", "2", "10"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("length of student / length of target", fontsize=12)
    axes.set_ylabel("added to the loss", fontsize=12)
    axes.set_xlim(0.05, 20)
    axes.set_ylim(0)
    _title(axes, "beta x (difference of log lengths)²")
    return figure


# Where the globe is seen from: rows are right, up and towards the reader.
_TILT, _TURN = np.radians(25), np.radians(20)
VIEW = np.array(
    [
        [np.cos(_TURN), np.sin(_TURN), 0],
        [-np.sin(_TILT) * np.sin(_TURN), np.sin(_TILT) * np.cos(_TURN), np.cos(_TILT)],
        [np.cos(_TILT) * np.sin(_TURN), -np.cos(_TILT) * np.cos(_TURN), np.sin(_TILT)],
    ]
)


def _globe(axes: Axes) -> None:
    """Outline, meridians and parallels of the near side."""
    turn = np.linspace(0, 2 * np.pi, 361)
    axes.plot(np.cos(turn), np.sin(turn), color=FAINT, linewidth=1.2)
    circles = [(np.full(361, lat), turn) for lat in np.radians((-60, -30, 0, 30, 60))]
    circles += [(turn, np.full(361, lon)) for lon in np.radians(range(0, 180, 30))]
    for lat, lon in circles:
        points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
        x, y, depth = VIEW @ points
        axes.plot(*np.where(depth > 0, (x, y), np.nan), color="#d5d5d5", linewidth=0.8)


# Where students start and what they aim at, as seen on the globe's near side, and their lengths.
STARTS = ((-0.75, 0.1), (-0.25, 0.2), (0.15, 0.85), (0.8, 0.05), (0.2, -0.3), (-0.5, -0.7))
AIMS = ((-0.35, 0.75), (0.35, 0.35), (0.72, 0.5), (0.55, -0.6), (-0.55, -0.3), (0.05, -0.85))
LENGTHS = (0.7, 1.4, 1.0, 0.8, 1.2, 1.5)


def _near_side(seen: Sequence[tuple[float, float]]) -> np.ndarray:
    """Points of the globe [n, 3] that are seen at these places."""
    flat = np.array(seen, np.float32)
    depth = np.sqrt(1 - (flat**2).sum(axis=1, keepdims=True))
    return np.concatenate([flat, depth], axis=1) @ VIEW


def sphere() -> Figure:
    """Directions before and after gradient descent, and the great circles they walked along."""
    starts = _near_side(STARTS) * np.array(LENGTHS)[:, None]
    found = numbers.paths(starts.astype(np.float32), _near_side(AIMS))
    figure, (axes,) = _figure(5.9)
    _globe(axes)
    for point in range(len(STARTS)):
        x, y, _ = VIEW @ found.directions[:, point].T
        axes.plot(x, y, color=BLUE, linewidth=2)
        axes.plot(x[0], y[0], "o", color=BLUE, markerfacecolor="white", markersize=9)
        axes.plot(x[-1], y[-1], "o", color=BLUE, markersize=11)
        aim = VIEW @ found.targets[point]
        axes.plot(*aim[:2], "*", color="white", markersize=8, zorder=4)
    handles = [
        axes.plot([], [], "o", color=BLUE, markerfacecolor="white", markersize=9)[0],
        axes.plot([], [], "o-", color=BLUE, markersize=11)[0],
    ]
    names = ["student, before", "after; the target is the star inside"]
    axes.legend(
        handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=11, frameon=False
    )
    axes.set_aspect("equal")
    axes.set_axis_off()
    _title(axes, "Down the Mercator loss: along great circles")
    return figure


def offset() -> Figure:
    """What unrelated keys score once they share an offset: measured, and by formula."""
    ratios = np.array([0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0])
    found = numbers.offsets(ratios)
    fine = np.geomspace(0.1, 10, 101)
    figure, (axes,) = _figure(4.4)
    curves = (
        (found.unrelated, fine**2 / (1 + fine**2), "o", "-", BLUE),
        (found.constant, fine / np.sqrt(1 + fine**2), "s", "--", RED),
        (found.centred, np.zeros_like(fine), "^", ":", GREEN),
    )
    for measured, formula, marker, style, colour in curves:
        axes.plot(fine, formula, style, color=colour, linewidth=2)
        axes.plot(ratios, measured, marker, color=colour, markersize=8, clip_on=False)
    _named(axes, 0.11, 0.62, "best constant vector\nr / sqrt(1 + r²)", RED)
    _named(axes, 1.5, 0.50, "two unrelated keys\nr² / (1 + r²)", BLUE)
    _named(axes, 1.5, 0.05, "the same, centred", GREEN)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("r = length of shared offset / of content", fontsize=12)
    axes.set_ylabel("cosine", fontsize=12)
    axes.set_ylim(-0.03, 1.03)
    _title(axes, "Nothing in common, and a cosine of 0.9")
    return figure


def collapse() -> Figure:
    """Joint training against pure noise: the projector on the teacher's side, and on the other."""
    figure, panels = _figure(6.2, 2, sharex=True, sharey=True)
    titles = {
        "teacher_to_student": "Projector on the teacher's side: collapse",
        "student_to_teacher": "Projector on the student's side: honest",
    }
    for axes, (direction, title) in zip(panels, titles.items(), strict=True):
        course = numbers.joint_training(direction)
        axes.plot(course.cos, color=BLUE, linewidth=2.2)
        axes.plot(course.cos_shuffled, "--", color=RED, linewidth=1.8)
        axes.set_ylabel("cosine", fontsize=12)
        axes.set_ylim(-0.3, 1.08)
        _title(axes, title)
    upper, lower = panels
    _named(upper, 110, 0.60, "cosine = 1 with noise\nshuffled = 1 as well\ngap = 0", INK)
    _named(lower, 60, 0.35, "nothing to learn,\nand the cosine says so", INK)
    lower.plot([], [], color=BLUE, linewidth=2.2, label="cosine")
    lower.plot([], [], "--", color=RED, linewidth=1.8, label="cosine, shuffled")
    lower.legend(fontsize=11, frameon=False, loc="upper right")
    lower.set_xlabel("step", fontsize=12)
    return figure


def sides() -> Figure:
    """Three ways to place the projector, and what moves."""
    rows = (
        (
            "original",
            ("teacher", "projector", "target", "student"),
            ("fixed", "learns", "MOVES", "learns"),
        ),
        (
            "anchored",
            ("teacher\n= target", "compared", "projector", "student"),
            ("fixed", "", "learns, is\ndropped", "learns"),
        ),
        (
            "calibrated",
            ("teacher", "projector", "target", "student"),
            ("fixed", "fitted,\nfrozen", "fixed", "learns"),
        ),
    )
    figure, (axes,) = _figure(5.6)
    axes.set_xlim(-0.03, 4.15)
    axes.set_ylim(-0.05, 3.25)
    axes.set_axis_off()
    for level, (name, boxes, notes) in zip((2.25, 1.15, 0.05), rows, strict=True):
        _named(axes, 0.02, level + 0.83, name, fontweight="bold")
        for place, (text, note) in enumerate(zip(boxes, notes, strict=True)):
            _box(axes, place * 1.1 + 0.02, level + 0.3, text, note)
        _arrows(axes, level + 0.52, anchored=name == "anchored")
    return figure


def _box(axes: Axes, x: float, y: float, text: str, note: str) -> None:
    moves = note.startswith(("learns", "MOVES"))
    bare = not note
    if not bare:
        axes.add_patch(
            FancyBboxPatch(
                (x, y),
                0.76,
                0.44,
                boxstyle="round,pad=0.02",
                facecolor="#dcebf5" if moves else "white",
                edgecolor=BLUE if moves else INK,
                linestyle="--" if moves else "-",
                linewidth=1.5,
            )
        )
    height = y + 0.30 if bare else y + 0.22
    _named(axes, x + 0.38, height, text, ha="center", va="center")
    colour, weight = (RED, "bold") if note == "MOVES" else (INK, "normal")
    _named(axes, x + 0.38, y - 0.05, note, colour, ha="center", va="top", fontweight=weight)


def _arrows(axes: Axes, y: float, *, anchored: bool) -> None:
    gaps = [(0.82, 1.09), (1.92, 2.19), (3.02, 3.29)]
    styles = ["-|>", "-|>", "<->"]
    if anchored:
        gaps, styles = [(0.82, 2.19), (3.02, 3.29)], ["<->", "<|-"]
    for (start, end), style in zip(gaps, styles, strict=True):
        axes.add_patch(
            FancyArrowPatch((start, y), (end, y), arrowstyle=style, mutation_scale=11, color=INK)
        )


def rope() -> Figure:
    """One key and itself some positions later, in two models of different head dims."""
    distances = np.arange(0, 129)
    figure, (axes,) = _figure(4.0)
    axes.axhline(1.0, color=INK, linewidth=2, linestyle=":")
    _named(axes, 128, 1.02, "before RoPE", ha="right")
    for model, name, colour, style in (
        ("Qwen/Qwen2.5-1.5B", "after RoPE, head dim 128", BLUE, "-"),
        ("Qwen/Qwen2.5-0.5B", "after RoPE, head dim 64", RED, "--"),
    ):
        cosines = numbers.turned_keys(model, distances)
        axes.plot(distances, cosines, style, color=colour, linewidth=1.8, label=name)
    axes.set_xlabel("positions later", fontsize=12)
    axes.set_ylabel("cosine with itself", fontsize=12)
    axes.set_ylim(0.4, 1.07)
    axes.set_xlim(0, 128)
    axes.legend(fontsize=11, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.88))
    _title(axes, "The same key, at another position")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "length_and_angle": length_and_angle,
    "loss_surfaces": loss_surfaces,
    "magnitude_term": magnitude_term,
    "sphere": sphere,
    "offset": offset,
    "collapse": collapse,
    "projector_sides": sides,
    "rope": rope,
}


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent):
        print(path)
