"""Pictures of what is measured beside the cosine: who pulls the student, and how long vectors are.

Left out on purpose: the cosines themselves (``curves``) and figures by layer from 0 to 1
(``heatmap``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kava_jax.errors import KavaError
from kava_jax.experiments.curves import COLOURS, DPI, FAINT, INK, MARKERS
from kava_jax.experiments.heatmap import Layers
from kava_jax.storage import Place
from kava_jax.training.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.6
# Below this a share is drawn on a linear scale, so that nothing (0) has a place too.
LEAST_SHARE = 0.01
QUANTILES = ("q10", "q50", "q90")


def gradient_curve(metrics_jsonl: Place, out: Path) -> None:
    """Draw how strongly the KV gradient pulls beside that of cross-entropy, and whether together.

    Above: ``kv_gradient_share``, logarithmic from 0.01, with 1 marked. Below:
    ``kv_gradient_cosine``, 1 for together, -1 for against each other.

    Raises:
        KavaError: the file is missing or broken, or holds no such figure.
    """
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics_jsonl, "diagnostics")
    keys = ("kv_gradient_share", "kv_gradient_cosine")
    points = [{r["step"]: r[key] for r in records if r.get(key) is not None} for key in keys]
    if not all(points):
        raise KavaError(f"{metrics_jsonl} holds no gradient shares; set train.diagnose_every")
    figure = _figure(4.0)
    share, cosine = figure.subplots(2, 1, sharex=True)
    for axes, values, colour, marker in zip(
        (share, cosine), points, COLOURS, MARKERS, strict=False
    ):
        axes.plot(*zip(*values.items(), strict=True), color=colour, marker=marker, markersize=4)
    share.set_yscale("symlog", linthresh=LEAST_SHARE)
    share.yaxis.set_major_formatter("{x:g}")
    share.set_ylim(0, 2 * max(1.0, *points[0].values()))
    share.axhline(1.0, color=FAINT, linewidth=0.8, linestyle="--")
    share.set_title("KV gradient / cross-entropy gradient", loc="left", fontsize=10, color=INK)
    cosine.axhline(0.0, color=FAINT, linewidth=0.8, linestyle="--")
    cosine.set_ylim(-1.05, 1.05)
    cosine.set_title("Cosine of the two gradients", loc="left", fontsize=10, color=INK)
    cosine.set_xlabel("step", color=INK)
    cosine.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, (share, cosine), out)


def magnitude_ratios(
    layers: Layers, teacher: str, student_layers: Sequence[int], out: Path
) -> None:
    """Draw |student| / |target| by mapped layer: a bar from quantile 0.1 to 0.9, a mark at 0.5.

    Args:
        layers: "layers" of an evaluation or diagnostics record.
        teacher: the teacher's name.
        student_layers: numbers of the mapped layers.
        out: the picture; its directory is made.

    Raises:
        KavaError: the teacher has no such figures, or not one number per layer.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    figure = _figure(2.6)
    axes = figure.subplots()
    places, drawn = np.arange(len(student_layers)), [0.5, 2.0]
    for part, name, shift, colour, marker in (
        ("k", "keys", -0.15, COLOURS[0], "o"),
        ("v", "values", 0.15, COLOURS[1], "s"),
    ):
        low, middle, high = (_quantile(layers, teacher, q, part, len(places)) for q in QUANTILES)
        drawn += [*low, *high]
        axes.vlines(places + shift, low, high, color=colour, linewidth=2)
        axes.plot(places + shift, middle, linestyle="", color=colour, marker=marker, label=name)
    axes.axhline(1.0, color=FAINT, linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    # A half and twice are always in sight, so that what is near 1 looks near.
    axes.set_ylim(0.9 * np.nanmin(drawn), 1.1 * np.nanmax(drawn))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(places, map(str, student_layers), fontsize=8 if len(places) > 20 else 9)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_xlabel("student layer", color=INK)
    axes.set_title("Length of student vectors / of targets", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    _save(figure, (axes,), out)


def _quantile(layers: Layers, teacher: str, quantile: str, part: str, length: int) -> np.ndarray:
    key = f"{teacher}/mag_ratio_{quantile}_{part}"
    values = layers.get(key, ())
    if len(values) != length:
        raise KavaError(
            f"{key} has {len(values)} numbers for {length} student layers; give the layers of its "
            f"map"
        )
    # A ratio of 0 has no place on a logarithmic scale.
    return np.array([value or np.nan for value in values], np.float64)


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _save(figure: "Figure", panels: "Sequence[Axes | Any]", out: Path) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
