"""Pictures for pages and files: curves over the steps of training.

Lines are told apart by style, marker and name, so that pictures survive grey printing and colour
blindness; they are narrow enough for a phone. Only Figure objects are used: no global pyplot state,
no display, no window. Nothing is smoothed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kava_jax.journal.metrics_file import Kind, read_metrics
from kava_jax.journal.verdict import ACCEPTABLE, EXCELLENT, GOOD, LEAST_GAP
from kava_jax.storage import Place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT = "#333333", "#777777"
LOOKS = {
    "marked": {"markersize": 4.5, "linewidth": 1.8},
    "plain": {"marker": "", "linewidth": 1.8},
    "thin": {"marker": "", "linewidth": 0.8, "alpha": 0.45},
    "dots": {"markersize": 6, "linewidth": 0},
}
WIDTH, HEIGHT, DPI = 5.0, 3.6, 150  # in inches
VERDICTS = {"Acceptable": ACCEPTABLE, "Good": GOOD, "Excellent": EXCELLENT}
LEAST = {"least gap": LEAST_GAP}

Log = dict[Kind, list[dict[str, Any]]]


class Line(NamedTuple):
    """A curve: values by step, and, where given, the ends of a band around each.

    ``place`` chooses colour, style and marker.
    """

    name: str
    points: Mapping[int, float]
    place: int = 0
    look: Literal["marked", "plain", "thin", "dots"] = "marked"
    ends: Mapping[int, tuple[float, float]] = {}

    def words(self) -> str:
        """Its first and its last point."""
        steps = list(dict.fromkeys([min(self.points), max(self.points)]))
        told = [f"{number(self.points[step])} at step {step}" for step in steps]
        if steps[-1] in self.ends:
            told.append("between {} and {}".format(*map(number, self.ends[steps[-1]])))
        return f"{self.name}: {', '.join(told)}."


class Chart(NamedTuple):
    """Lines over the steps; those without a point are left out. ``levels`` are marked by name."""

    y_label: str
    lines: Sequence[Line]
    scale: Literal["linear", "log", "symlog"] = "linear"
    levels: Mapping[str, float] = {}

    @property
    def drawn(self) -> list[Line]:
        """The lines that have a point."""
        return [line for line in self.lines if line.points]

    def words(self) -> str:
        """What the lines are, and where they begin and end."""
        return " ".join([f"Curves of {self.y_label}.", *(line.words() for line in self.drawn)])

    def figure(self) -> "Figure":
        """The picture."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(self.y_label, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        for line in self.drawn:
            _draw(axes, line)
        for name, level in self.levels.items():
            axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=":")
            # Placed by axes fraction, a name keeps to the left edge whatever the steps are.
            at = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8}
            axes.annotate(name, (0.005, level), color=FAINT, **at)
        if self.scale == "symlog":  # nothing (0) has a place too
            axes.set_yscale("symlog", linthresh=0.01)
            axes.yaxis.set_major_formatter("{x:g}")
        elif self.scale == "log":  # 4.5 and not 4.5 x 10^0, on a short axis too
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        return figure


def _draw(axes: "Axes", line: Line) -> None:
    colour = COLOURS[line.place]
    style = {"linestyle": STYLES[line.place], "marker": MARKERS[line.place], **LOOKS[line.look]}
    axes.plot(*zip(*line.points.items(), strict=True), color=colour, label=line.name, **style)
    if line.ends:
        low, high = zip(*line.ends.values(), strict=True)
        axes.fill_between(list(line.ends), low, high, color=colour, alpha=0.15, linewidth=0)


def read_log(metrics: Place) -> Log:
    """The records of a run by kind; a run that has only begun has no file."""
    kinds: tuple[Kind, ...] = ("train", "eval", "diagnostics")
    return {kind: read_metrics(metrics, kind) if metrics.exists() else [] for kind in kinds}


def course(records: Sequence[Mapping[str, Any]], *keys: str) -> dict[int, float]:
    """By step, the first of the metrics that was logged as a number.

    A step that was logged twice (before and after a resume) counts as it was last.
    """
    found = ({r["step"]: r[key] for r in records if r.get(key) is not None} for key in keys)
    return next(filter(None, found), {})


def loss_chart(logs: Mapping[str, Log]) -> Chart:
    """Training cross-entropy (thin) and held-out loss (marked) of up to six runs, by label."""
    lines = []
    for place, (label, log) in enumerate(logs.items()):
        lines += [Line(f"{label}, training", course(log["train"], "ce"), place, "thin")]
        lines += [Line(f"{label}, held out", course(log["eval"], "eval_loss"), place)]
    return Chart("cross-entropy (nats per token)", lines, "log")


def alignment_chart(log: Log) -> Chart:
    """Cosine, cosine of unrelated examples, and their gap: in training, and held out (dots).

    In training the running means are drawn where they were logged.
    """
    lines = []
    for place, (name, held_out, *keys) in enumerate(
        (
            ("cosine", "eval_cos_sim", "cos_running", "cos_sim"),
            ("shuffled", "eval_cos_shuffled", "cos_shuffled"),
            ("gap", "eval_alignment_gap", "gap_running", "alignment_gap"),
        )
    ):
        lines += [Line(f"{name}, training", course(log["train"], *keys), place, "plain")]
        lines += [Line(f"{name}, held out", course(log["eval"], held_out), place, "dots")]
    return Chart("cosine", lines, levels=VERDICTS | LEAST)


def gradient_chart(log: Log) -> Chart:
    """The KV gradient compared with the language loss's: length, and whether both pull together."""
    named = {"KV / language": "kv_gradient_share", "cosine of the two": "kv_gradient_cosine"}
    points = {name: course(log["diagnostics"], key) for name, key in named.items()}
    lines = [Line(name, own, place) for place, (name, own) in enumerate(points.items())]
    return Chart("gradients of the student", lines, "symlog", {"equally long": 1.0})


def number(value: float | int | None) -> str:
    """Three decimals, or three digits where those say too little; a dash for no finite number."""
    if value is None:
        return "\N{EN DASH}"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"
