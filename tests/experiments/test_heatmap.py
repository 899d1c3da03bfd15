"""The heat map: every number stands in its cell, readable in grey, and nothing overlaps."""

import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from kava_jax.errors import KavaError
from kava_jax.experiments.heatmap import COLUMNS, heat_map

SIX = [
    "centred cosine",
    "CKA",
    "retrieval",
    "retrieval, centred",
    "rank, student / target",
    "best constant vector",
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def figures_of(layers: int, teacher: str = "big", seed: int = 0):
    rng = np.random.default_rng(seed)
    result = {}
    for part in "kv":
        for name in ("cos_centered", "cka", "retrieval", "retrieval_centered", "cos_constant"):
            result[f"{teacher}/{name}_{part}"] = rng.uniform(0, 1, layers).tolist()
        result[f"{teacher}/student_rank_{part}"] = [3.0] * layers
        result[f"{teacher}/target_rank_{part}"] = [6.0] * layers
        result[f"{teacher}/student_min_std_{part}"] = [77.0] * layers
    return result | {f"{teacher}/attention_cos": rng.uniform(0, 1, layers).tolist()}


def panels(figure):
    """Title, row names, column names and cells (as written) of each panel."""
    found = []
    for axes in figure.axes[:-1]:  # the last one is the colour bar
        rows = [label.get_text() for label in axes.get_yticklabels()]
        columns = [label.get_text() for label in axes.get_xticklabels()]
        cells = np.array([text.get_text() for text in axes.texts]).reshape(len(rows), len(columns))
        found.append((axes.get_title(loc="left"), rows, columns, cells))
    return found


def test_every_cell_holds_its_number(tmp_path, drawn):
    layers = figures_of(3)
    layers["big/cka_k"] = [0.254, None, -0.07]
    layers["big/target_rank_v"] = [6.0, 0.0, None]  # no rank to divide by
    layers |= figures_of(3, "other", seed=1)
    heat_map(layers, "big", (0, 2, 5), tmp_path / "new" / "heat.png")
    assert (tmp_path / "new" / "heat.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    keys, values, both = panels(figure)
    assert [panel[0].partition(",")[0] for panel in (keys, values, both)] == [
        *("Keys", "Values", "Both")
    ]
    assert keys[1] == values[1] == SIX
    assert keys[2] == values[2] == both[2] == ["0", "2", "5"]
    assert keys[3][1].tolist() == ["0.25", "\N{EN DASH}", "-0.07"]
    assert keys[3][4].tolist() == ["0.50"] * 3
    assert values[3][4].tolist() == ["0.50", "\N{EN DASH}", "\N{EN DASH}"]
    assert both[1] == ["attention output"]
    assert both[3][0].tolist() == [f"{x:.2f}" for x in layers["big/attention_cos"]]
    cells = figure.axes[0].images[0]
    assert cells.get_clim() == (0.0, 1.0)
    assert cells.get_array()[0].tolist() == layers["big/cos_centered_k"]


def test_a_teacher_without_attention_figures_has_two_panels(tmp_path, drawn):
    layers = {key: row for key, row in figures_of(2).items() if "retrieval" in key}
    heat_map(layers, "big", range(2), tmp_path / "heat.png")
    assert [panel[1] for panel in panels(drawn[0])] == [["retrieval", "retrieval, centred"]] * 2


def boxes(texts):
    return [text.get_window_extent() for text in texts]


@pytest.mark.parametrize("count", [1, 14, 28])
def test_many_layers_stay_readable(count, tmp_path, drawn):
    heat_map(figures_of(count), "big", range(count), tmp_path / "heat.png")
    (figure,) = drawn
    found = panels(figure)
    for part in range(3):
        blocks = found[part * len(found) // 3 : (part + 1) * len(found) // 3]
        numbers = [column for block in blocks for column in block[2]]
        assert numbers == list(map(str, range(count)))
        assert all(len(block[2]) <= COLUMNS for block in blocks)
    width, height = figure.bbox.size
    for axes in figure.axes[:-1]:
        columns = len(axes.get_xticklabels())
        drawn_boxes = boxes(axes.texts)
        cells = [drawn_boxes[i : i + columns] for i in range(0, len(drawn_boxes), columns)]
        for row in cells:
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(row))
        for column in zip(*cells, strict=True):
            assert all(a.y0 > b.y1 for a, b in itertools.pairwise(column))
        outside = boxes([*axes.get_yticklabels(), *axes.get_xticklabels()])
        assert all(
            box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in outside
        )
        assert min(text.get_fontsize() for text in axes.texts) >= 7


def luminance(colour) -> float:
    """Relative luminance after WCAG 2."""
    c = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_numbers_and_colours_hold_in_grey(tmp_path, drawn):
    """Contrast of at least 4.5 on every colour, and lightness that only grows with the value."""
    values = np.linspace(0, 1, 42)
    names = ("big/cka_k", "big/retrieval_k", "big/retrieval_centered_k")
    layers = dict(zip(names, values.reshape(3, 14).tolist(), strict=True))
    heat_map(layers, "big", range(14), tmp_path / "heat.png")
    axes = drawn[0].axes[0]
    image = axes.images[0]
    lights = []
    for text, value in zip(axes.texts, values, strict=True):
        below = luminance(image.cmap(image.norm(value))[:3])
        high, low = sorted((below, luminance(text.get_color())), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5
        lights.append(below)
    assert lights == sorted(lights)


def test_what_cannot_be_drawn_is_named(tmp_path):
    out = tmp_path / "heat.png"
    with pytest.raises(KavaError, match="teacher='small' has no per-layer figures"):
        heat_map(figures_of(2), "small", range(2), out)
    with pytest.raises(KavaError, match="has 2 numbers for 3 student layers"):
        heat_map(figures_of(2), "big", range(3), out)
    assert not out.exists()
