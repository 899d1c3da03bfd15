"""The per-layer figures of one evaluation as a heat map: where in the student alignment holds.

One column per mapped student layer, one row per figure, keys and values as panels of their own. The
number stands in every cell, so the picture needs no colour; the colours are those of cividis, whose
lightness grows evenly and which the colour-blind see like everybody else.

Left out on purpose: figures without a common scale (standard deviations, lengths), which a table
shows better.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kava_jax.errors import KavaError
from kava_jax.experiments.curves import DPI, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Figures from 0 to 1 that keys and values have apart. All but the last two are better when higher.
FIGURES = {
    "cos_centered": "centred cosine",
    "cka": "CKA",
    "retrieval": "retrieval",
    "retrieval_centered": "retrieval, centred",
    "rank_share": "rank, student / target",
    "cos_constant": "best constant vector",
}
TITLES = {"k": "Keys", "v": "Values"}
# More columns than this go on below: a phone shows no narrower cells.
COLUMNS = 14
# In inches: the picture, what stands beside the cells, one row of them, the layers' numbers above
# them, a title above those, and the colour bar at the bottom.
WIDTH, LEFT, RIGHT = 5.6, 1.66, 0.08
ROW, NUMBERS, TITLE, BAR = 0.25, 0.3, 0.28, 0.55
COLOURS = "cividis"
# Of white and black numbers, the ones with more contrast on cividis.
WHITE_BELOW = 0.47

Layers = Mapping[str, Sequence[float | int | None]]


class Panel(NamedTuple):
    """A block of cells: values [rows, columns], NaN where there is no number.

    ``title`` is None where the block goes on with the layers of the one above.
    """

    title: str | None
    rows: list[str]
    columns: list[int]
    values: np.ndarray

    @property
    def height(self) -> float:
        """In inches, with what stands above the cells."""
        return ROW * len(self.rows) + NUMBERS + (0 if self.title is None else TITLE)


def heat_map(layers: Layers, teacher: str, student_layers: Sequence[int], out: Path) -> None:
    """Draw the figures of one teacher in one evaluation as a PNG.

    Colours end at 0 and 1; a number outside is written as it is and drawn in the nearest colour.

    Args:
        layers: "layers" of an evaluation or diagnostics record: ``teacher/figure_k`` to one number
            per mapped student layer, None where it was not finite.
        teacher: the teacher's name, which is the part before the slash.
        student_layers: numbers of the mapped layers, the columns.
        out: the picture; its directory is made.

    Raises:
        KavaError: the teacher has none of the figures, or not one number per layer.
    """
    from matplotlib.figure import Figure

    panels = _panels(layers, teacher, list(student_layers))
    height = sum(panel.height for panel in panels) + BAR
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    widest = max(len(panel.columns) for panel in panels)
    top = height
    for panel in panels:
        top -= panel.height
        _draw(_axes(figure, top, ROW * len(panel.rows)), panel, widest)
    _draw_bar(_axes(figure, BAR - 0.25, 0.12))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def _panels(layers: Layers, teacher: str, columns: list[int]) -> list[Panel]:
    """Keys, values, and what belongs to a layer as a whole, each cut where it grows too wide."""
    found = {
        title: {
            label: row
            for figure, label in FIGURES.items()
            if (row := _row(layers, teacher, figure, part, len(columns))) is not None
        }
        for part, title in TITLES.items()
    }
    attention = _given(layers, f"{teacher}/attention_cos", len(columns))
    found["Both"] = {} if attention is None else {"attention output": attention}
    panels = [
        Panel(
            None if cut.start else f"{title}, by student layer",
            list(rows),
            columns[cut],
            np.stack(list(rows.values()))[:, cut],
        )
        for title, rows in found.items()
        for cut in _cuts(len(columns))
        if rows
    ]
    if not panels:
        raise KavaError(f"teacher={teacher!r} has no per-layer figures; name one with {TITLES}")
    return panels


def _row(layers: Layers, teacher: str, figure: str, part: str, length: int) -> np.ndarray | None:
    """One figure of keys or values; None where it was not measured."""
    if figure != "rank_share":
        return _given(layers, f"{teacher}/{figure}_{part}", length)
    student = _given(layers, f"{teacher}/student_rank_{part}", length)
    target = _given(layers, f"{teacher}/target_rank_{part}", length)
    if student is None or target is None:
        return None
    return np.divide(student, target, out=np.full(length, np.nan), where=target > 0)


def _given(layers: Layers, key: str, length: int) -> np.ndarray | None:
    if key not in layers:
        return None
    row = np.array([np.nan if value is None else value for value in layers[key]], np.float64)
    if len(row) != length:
        raise KavaError(
            f"{key} has {len(row)} numbers for {length} student layers; give the layers of its map"
        )
    return row


def _cuts(columns: int) -> list[slice]:
    """As few blocks as fit, of nearly the same width."""
    blocks = -(-columns // COLUMNS)
    size = -(-columns // blocks)
    return [slice(start, start + size) for start in range(0, columns, size)]


def _axes(figure: "Figure", bottom: float, height: float) -> "Axes":
    """Axes of the panels' width at a height, in inches."""
    full = figure.get_figheight()
    width = WIDTH - LEFT - RIGHT
    return figure.add_axes((LEFT / WIDTH, bottom / full, width / WIDTH, height / full))


def _draw(axes: "Axes", panel: Panel, widest: int) -> None:
    """Cells with their numbers, layers above and figures on the left."""
    image = axes.imshow(panel.values, cmap=COLOURS, vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(panel.values):
        axes.text(
            column,
            row,
            "\N{EN DASH}" if np.isnan(value) else f"{value:.2f}",
            ha="center",
            va="center_baseline",
            fontsize=7.5 if widest > 10 else 9,
            color="white" if value < WHITE_BELOW else "black",
        )
    image.axes.set_xlim(-0.5, widest - 0.5)  # cells are equally wide in all panels
    axes.set_xticks(range(len(panel.columns)), map(str, panel.columns), fontsize=8, color=INK)
    axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=9, color=INK)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(0.5, len(panel.columns) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(panel.rows) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    if panel.title is not None:
        axes.set_title(panel.title, loc="left", fontsize=10, color=INK)


def _draw_bar(axes: "Axes") -> None:
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=COLOURS, aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=8, color=INK)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
