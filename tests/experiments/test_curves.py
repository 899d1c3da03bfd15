"""The pictures: made from what a run writes, without a window, and with every line named."""

import json
import math
import subprocess
import sys

import pytest

from kava_jax.errors import KavaError
from kava_jax.experiments import curves
from kava_jax.experiments.curves import alignment_curve, learning_curve

PNG = b"\x89PNG\r\n\x1a\n"


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


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved."""
    figures, save = [], curves._save

    def keep(figure, out_png):
        figures.append(figure)
        save(figure, out_png)

    monkeypatch.setattr(curves, "_save", keep)
    return figures


def words(figure):
    return {text.get_text() for text in figure.axes[0].texts}


def test_the_learning_curve_names_every_run_and_draws_what_was_logged(tmp_path, drawn):
    runs = {
        "aligned": write_run(tmp_path / "a.jsonl"),
        "cross-entropy only": write_run(tmp_path / "b.jsonl", teacher=False, best=1.01),
    }
    learning_curve(runs, tmp_path / "pictures" / "learning.png")
    assert (tmp_path / "pictures" / "learning.png").read_bytes().startswith(PNG)
    (figure,) = drawn
    assert words(figure) == {"aligned", "cross-entropy only"}
    lines = figure.axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [40, 4, 40, 4]
    assert lines[0].get_ydata()[0] == 1.0 + 2 * math.exp(-0.1)
    assert lines[0].get_linestyle() != lines[2].get_linestyle()
    assert figure.axes[0].get_yscale() == "log"
    heights = sorted(math.log(text.xy[1]) for text in figure.axes[0].texts)
    low, high = map(math.log, figure.axes[0].get_ylim())
    assert heights[1] - heights[0] > 0.04 * (high - low)  # names of lines that end together


def test_the_alignment_curve_names_lines_and_bands(tmp_path, drawn):
    alignment_curve(write_run(tmp_path / "a.jsonl"), tmp_path / "alignment.png")
    assert (tmp_path / "alignment.png").read_bytes().startswith(PNG)
    (figure,) = drawn
    assert words(figure) == {
        *("cosine", "cosine, shuffled", "gap"),
        *("Poor", "Acceptable", "Good", "Excellent"),
    }
    cosine, held_out, *_ = figure.axes[0].get_lines()
    assert list(cosine.get_ydata())[-1] == 0.9 * (1 - math.exp(-5))  # the running mean
    assert list(held_out.get_xdata()) == [100, 200, 300, 400]


def test_a_step_evaluated_twice_counts_as_it_was_last(tmp_path, drawn):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"step": 1, "kind": "eval", "eval_loss": 3.0}\n'
        '{"step": 1, "kind": "eval", "eval_loss": 2.0}\n'
    )
    learning_curve({"a": path}, tmp_path / "a.png")
    assert list(drawn[0].axes[0].get_lines()[1].get_ydata()) == [2.0]


def test_what_cannot_be_drawn_is_named(tmp_path):
    out = tmp_path / "out.png"
    without = write_run(tmp_path / "a.jsonl", teacher=False)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(KavaError, match="holds no cosine"):
        alignment_curve(without, out)
    with pytest.raises(KavaError, match="holds no loss"):
        learning_curve({"a": empty}, out)
    with pytest.raises(KavaError, match="is missing"):
        learning_curve({"a": tmp_path / "none.jsonl"}, out)
    with pytest.raises(KavaError, match="runs=0 cannot be drawn"):
        learning_curve({}, out)
    assert not out.exists()


def test_drawing_leaves_pyplot_alone(tmp_path):
    path = write_run(tmp_path / "a.jsonl")
    program = (
        "import sys, pathlib\n"
        "from kava_jax.experiments.curves import alignment_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"alignment_curve(pathlib.Path({str(path)!r}), pathlib.Path({str(path)!r} + '.png'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
