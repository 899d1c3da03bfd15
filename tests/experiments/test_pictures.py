"""The pictures: made from what a run writes, without a window, with every line in the legend."""

import json
import math
import subprocess
import sys

from kava_jax.experiments.pictures import (
    Chart,
    Line,
    alignment_chart,
    gradient_chart,
    loss_chart,
    number,
    read_log,
)


def write_run(path, *, teacher=True, best=1.0):
    records = []
    for step in range(10, 401, 10):
        pull = 1 - math.exp(-step / 80)
        train = {"step": step, "kind": "train", "ce": best + 2 * math.exp(-step / 100)}
        if teacher:
            train |= {"cos_running": 0.9 * pull, "gap_running": 0.4 * pull}
            train |= {"cos_sim": 0.92 * pull, "cos_shuffled": 0.5 * pull, "alignment_gap": None}
        records.append(train)
        if step % 100 == 0:
            held_out = {"step": step, "kind": "eval", "eval_loss": train["ce"] + 0.05}
            if teacher:
                held_out |= {"eval_cos_sim": 0.88 * pull, "eval_cos_shuffled": 0.52 * pull}
                held_out |= {"eval_alignment_gap": 0.36 * pull}
            records.append(held_out)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def named(figure):
    """The lines that the legend names, by name."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    return dict(zip(labels, handles, strict=True))


def test_the_loss_chart_names_every_line_and_draws_what_was_logged(tmp_path):
    runs = {
        "aligned": write_run(tmp_path / "a.jsonl"),
        "cross-entropy only": write_run(tmp_path / "b.jsonl", teacher=False, best=1.01),
    }
    figure = loss_chart({name: read_log(path) for name, path in runs.items()}).figure()
    lines = named(figure)
    assert list(lines) == [f"{name}, {what}" for name in runs for what in ("training", "held out")]
    assert [len(line.get_xdata()) for line in lines.values()] == [40, 4, 40, 4]
    training, held_out, other, _ = lines.values()
    assert training.get_ydata()[0] == 1.0 + 2 * math.exp(-0.1)
    assert training.get_linestyle() != other.get_linestyle()
    assert training.get_linewidth() < held_out.get_linewidth()
    assert held_out.get_marker() == "o"
    assert figure.axes[0].get_yscale() == "log"


def test_the_alignment_chart_has_all_lines_and_the_verdicts(tmp_path):
    chart = alignment_chart(read_log(write_run(tmp_path / "a.jsonl")))
    figure = chart.figure()
    lines = named(figure)
    assert list(lines) == [
        f"{name}, {what}"
        for name in ("cosine", "shuffled", "gap")
        for what in ("training", "held out")
    ]
    # The running mean, not the cosine of one batch.
    assert lines["cosine, training"].get_ydata()[-1] == 0.9 * (1 - math.exp(-5))
    assert list(lines["cosine, held out"].get_xdata()) == [100, 200, 300, 400]
    levels = {text.get_text(): text.xy[1] for text in figure.axes[0].texts}
    assert levels == {"Acceptable": 0.5, "Good": 0.8, "Excellent": 0.95, "least gap": 0.05}


def test_a_step_evaluated_twice_counts_as_it_was_last(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"step": 1, "kind": "eval", "eval_loss": 3.0}\n'
        '{"step": 1, "kind": "eval", "eval_loss": 2.0}\n'
    )
    chart = loss_chart({"a": read_log(path)})
    assert chart.drawn == [Line("a, held out", {1: 2.0})]
    assert "a, held out: 2 at step 1." in chart.words()


def test_both_figures_of_the_gradients_are_drawn():
    probes = [
        {"step": 0, "kv_gradient_share": 40.0, "kv_gradient_cosine": -0.5},
        {"step": 1, "kv_gradient_share": 0.0, "kv_gradient_cosine": None},
        {"step": 2, "kv_gradient_share": None, "kv_gradient_cosine": 0.25},
        {"step": 2, "kv_gradient_share": 0.2, "kv_gradient_cosine": 0.75},
    ]
    figure = gradient_chart({"diagnostics": probes}).figure()
    share, cosine = named(figure).values()
    assert share.get_xydata().tolist() == [[0, 40.0], [1, 0.0], [2, 0.2]]
    assert cosine.get_xydata().tolist() == [[0, -0.5], [2, 0.75]]
    assert share.get_marker() != cosine.get_marker()
    low, high = figure.axes[0].get_ylim()  # nothing is out of sight, 0 and below too
    assert low < -0.5
    assert high > 40


def test_what_was_not_logged_is_left_out(tmp_path):
    without = alignment_chart(read_log(write_run(tmp_path / "a.jsonl", teacher=False)))
    assert without.drawn == []
    assert loss_chart({"a": read_log(tmp_path / "none.jsonl")}).drawn == []
    nothing = [{"step": 0, "kv_gradient_share": None, "kv_gradient_cosine": None}]
    assert gradient_chart({"diagnostics": nothing}).drawn == []


def test_a_band_is_drawn_and_told():
    ends = {0: (1.0, 3.0), 10: (0.5, 1.5)}
    chart = Chart("loss", [Line("kv", {0: 2.0, 10: 1.0}, 1, ends=ends)])
    assert chart.words() == (
        "Curves of loss. kv: 2 at step 0, 1 at step 10, between 0.500 and 1.500."
    )
    (band,) = chart.figure().axes[0].collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert {(0, 1.0), (0, 3.0), (10, 0.5), (10, 1.5)} <= corners


def test_short_logarithmic_axes_have_plain_numbers():
    for values in ({0: 1.02, 9: 1.31}, {0: 0.013, 9: 7.5}):
        figure = Chart("loss", [Line("a", values)], "log").figure()
        figure.draw_without_rendering()
        axis, (low, high) = figure.axes[0].yaxis, figure.axes[0].get_ylim()
        shown = [
            label.get_text()
            for label, at in zip(axis.get_ticklabels(), axis.get_majorticklocs(), strict=True)
            if low <= at <= high
        ]
        assert len(shown) >= 2
        assert all(text == f"{float(text):g}" for text in shown)


def test_numbers_are_short():
    values = (None, 0, 3.0, 0.5, 0.01, 0.00123456, -0.98765, 123456.789)
    assert [number(value) for value in values] == [
        *("\N{EN DASH}", "0", "3", "0.500", "0.010", "0.00123", "-0.988", "1.23e+05")
    ]


def test_drawing_leaves_pyplot_alone(tmp_path):
    path = write_run(tmp_path / "a.jsonl")
    program = (
        "import sys, pathlib\n"
        "from kava_jax.experiments.pictures import alignment_chart, read_log\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"chart = alignment_chart(read_log(pathlib.Path({str(path)!r})))\n"
        f"chart.figure().savefig({str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
