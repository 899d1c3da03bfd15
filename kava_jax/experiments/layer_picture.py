"""A layer map as a picture: which teacher layers each student layer is compared with.

The teacher's layers stand on the left, the student's on the right, both from the first at the top
to the last at the bottom of the same height. Rows are told apart by line style and colour in turn,
so that neighbours stay apart in grey too.

Left out on purpose: how well the layers fit (``heatmap`` and tables say that).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.errors import KavaError
from kava_jax.experiments.curves import COLOURS, DPI, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches: of the picture, of one layer of the deeper model, and of what stands above and below.
WIDTH, LAYER, MARGINS = 4.4, 0.185, 0.75
LEAST_HEIGHT = 2.2
TEACHER, STUDENT = 0.0, 1.0
BOX = 0.075  # half the width of a layer's box


def layer_picture(
    layer_map: LayerMap, teacher_layers: int, student_layers: int, out: Path, *, cut: bool = True
) -> None:
    """Draw a map between models of the given depths as a PNG.

    Layers side by side have a line each. Of a weighted mean the line's width is the weight, and a
    weight of 0 has none.

    Args:
        layer_map: what is compared with what.
        teacher_layers, student_layers: depths of the two models.
        out: the picture; its directory is made.
        cut: whether the teacher ends after the last layer that is needed (its logits are not used).

    Raises:
        KavaError: the map reads a layer that a model of these depths does not have.
    """
    from matplotlib.figure import Figure

    _check(layer_map, teacher_layers, student_layers)
    deepest = max(teacher_layers, student_layers)
    height = max(LEAST_HEIGHT, MARGINS + LAYER * deepest)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.55, 1.3)
    # Half a layer of room above the first; y grows downwards.
    room = 0.75 / deepest
    axes.set_ylim(1 + room, -room)
    teacher, student = _places(teacher_layers), _places(student_layers)
    _draw_lines(axes, layer_map, teacher, student)
    mapped = {layer for row in layer_map.teacher_layers for layer in row}
    last = layer_map.last_teacher_layer if cut else teacher_layers - 1
    _draw_layers(axes, TEACHER, teacher, mapped, last)
    _draw_layers(axes, STUDENT, student, set(layer_map.student_layers), student_layers - 1)
    for x, name, depth in (
        (TEACHER, "teacher", teacher_layers),
        (STUDENT, "student", student_layers),
    ):
        axes.annotate(
            f"{name}, {depth} layers",
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=10,
            color=INK,
        )
    if last < teacher_layers - 1:
        _draw_cut(axes, (teacher[last] + teacher[last + 1]) / 2, last)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def _check(layer_map: LayerMap, teacher_layers: int, student_layers: int) -> None:
    read = max(max(row) for row in layer_map.teacher_layers), layer_map.student_layers[-1]
    for side, layer, depth in zip(
        ("teacher", "student"), read, (teacher_layers, student_layers), strict=True
    ):
        if layer >= depth:
            raise KavaError(
                f"layer map: it reads {side} layer {layer} of {depth}; give its models' depths"
            )


def _places(depth: int) -> list[float]:
    """Heights of the layers: from 0 for the first to 1 for the last, a lone one in the middle."""
    return [layer / (depth - 1) for layer in range(depth)] if depth > 1 else [0.5]


def _draw_lines(
    axes: "Axes", layer_map: LayerMap, teacher: list[float], student: list[float]
) -> None:
    """One line per pair that counts; rows in turn solid and dashed."""
    for p, (layer, sources) in enumerate(
        zip(layer_map.student_layers, layer_map.teacher_layers, strict=True)
    ):
        weights = [1.0] * len(sources) if layer_map.weights is None else layer_map.weights[p]
        for source, weight in zip(sources, weights, strict=True):
            if weight == 0:
                continue
            axes.plot(
                (TEACHER + BOX, STUDENT - BOX),
                (teacher[source], student[layer]),
                color=COLOURS[p % 2],
                linestyle=("-", (0, (4, 1.2)))[p % 2],
                linewidth=1.2 if layer_map.weights is None else 0.3 + 2.4 * abs(weight),
                zorder=1,
            )


def _draw_layers(axes: "Axes", x: float, places: list[float], mapped: set[int], last: int) -> None:
    """A numbered box per layer: dark if mapped, faint if not, dotted if it does not run at all."""
    for layer, y in enumerate(places):
        used = layer in mapped
        axes.text(
            x,
            y,
            f"{layer:{len(str(len(places) - 1))}d}",  # all boxes are equally wide
            ha="center",
            va="center",
            family="monospace",
            fontsize=7.5,
            color="white" if used else FAINT,
            bbox={
                "boxstyle": "round,pad=0.18",
                "facecolor": INK if used else "white",
                "edgecolor": INK if used else "#bbbbbb",
                "linewidth": 0.8,
                "linestyle": "-" if layer <= last else ":",
            },
            zorder=2,
        )


def _draw_cut(axes: "Axes", y: float, last: int) -> None:
    """A dashed line across the teacher after its last needed layer, named on its left."""
    axes.plot(
        (-0.5, TEACHER + 2 * BOX), (y, y), color=INK, linestyle=(0, (3, 2)), linewidth=1.2, zorder=3
    )
    axes.annotate(
        f"cut after {last}",
        (-0.5, y),
        xytext=(0, -3),
        textcoords="offset points",
        va="top",
        fontsize=8.5,
        color=INK,
    )
