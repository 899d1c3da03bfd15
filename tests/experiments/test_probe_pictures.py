"""Gradient shares over time, and lengths by layer: what was logged is what is drawn."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from kava_jax.errors import KavaError
from kava_jax.experiments.probe_pictures import gradient_curve, magnitude_ratios


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def write(path, *records):
    path.write_text("".join(json.dumps({"kind": "diagnostics", **r}) + "\n" for r in records))
    return path


def test_both_figures_of_the_gradients_are_drawn(tmp_path, drawn):
    path = write(
        tmp_path / "metrics.jsonl",
        {"step": 0, "kv_gradient_share": 40.0, "kv_gradient_cosine": -0.5},
        {"step": 1, "kv_gradient_share": 0.0, "kv_gradient_cosine": None},
        {"step": 2, "kv_gradient_share": None, "kv_gradient_cosine": 0.25},
        {"step": 2, "kv_gradient_share": 0.2, "kv_gradient_cosine": 0.75},
    )
    gradient_curve(path, tmp_path / "new" / "gradients.png")
    assert (tmp_path / "new" / "gradients.png").read_bytes().startswith(b"\x89PNG")
    share, cosine = drawn[0].axes
    assert share.get_lines()[0].get_xydata().tolist() == [[0, 40.0], [1, 0.0], [2, 0.2]]
    assert cosine.get_lines()[0].get_xydata().tolist() == [[0, -0.5], [2, 0.75]]
    assert share.get_ylim()[0] == 0  # no share is out of sight
    assert share.get_ylim()[1] > 40
    markers = {axes.get_lines()[0].get_marker() for axes in (share, cosine)}
    assert len(markers) == 2


def test_a_run_without_probes_is_named(tmp_path):
    path = write(tmp_path / "metrics.jsonl", {"step": 0, "kv_gradient_share": None})
    with pytest.raises(KavaError, match="holds no gradient shares"):
        gradient_curve(path, tmp_path / "gradients.png")
    assert not (tmp_path / "gradients.png").exists()


def ratios(**rows):
    plain = {
        f"big/mag_ratio_{quantile}_{part}": [value, value]
        for part in "kv"
        for quantile, value in (("q10", 0.9), ("q50", 1.0), ("q90", 1.1))
    }
    return plain | {f"big/mag_ratio_{name}": row for name, row in rows.items()}


def test_bars_reach_from_quantile_to_quantile(tmp_path, drawn):
    layers = ratios(q10_k=[0.5, 0.1], q50_k=[0.75, 0.25], q90_k=[4.0, 0.5])
    magnitude_ratios(layers, "big", (0, 3), tmp_path / "new" / "lengths.png")
    (axes,) = drawn[0].axes
    keys, values = axes.collections
    assert [bar[:, 1].tolist() for bar in keys.get_segments()] == [[0.5, 4.0], [0.1, 0.5]]
    assert [bar[:, 1].tolist() for bar in values.get_segments()] == [[0.9, 1.1]] * 2
    assert axes.get_lines()[0].get_ydata().tolist() == [0.75, 0.25]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3"]
    low, high = axes.get_ylim()
    assert low < 0.1
    assert high > 4.0


def test_what_is_missing_or_zero_is_left_out(tmp_path, drawn):
    none = {key: [None, 0.0] for key in ratios()}
    magnitude_ratios(none, "big", (0, 1), tmp_path / "lengths.png")
    assert np.isnan(drawn[0].axes[0].get_lines()[0].get_ydata()).all()
    with pytest.raises(KavaError, match="has 2 numbers for 3 student layers"):
        magnitude_ratios(ratios(), "big", range(3), tmp_path / "other.png")
    with pytest.raises(KavaError, match="small/mag_ratio_q10_k has 0 numbers"):
        magnitude_ratios(ratios(), "small", range(2), tmp_path / "other.png")
