"""The picture of a layer map: a line for every pair that counts, a box for every layer."""

import itertools

import pytest
from matplotlib.figure import Figure

from kava_jax.alignment.layer_map import LayerMap, make_layer_map
from kava_jax.errors import KavaError
from kava_jax.experiments.layer_picture import layer_picture
from tests.tolerances import TOL


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws, and gives the figure as it was saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        figures.append(figure)

    def drawn(*args, **kwargs):
        out = tmp_path / "new" / "map.png"
        layer_picture(*args, out, **kwargs)
        assert out.read_bytes().startswith(b"\x89PNG")
        return figures.pop()

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def lines(figure):
    """The lines between the models; the cut is not one."""
    return [line for line in figure.axes[0].get_lines() if max(line.get_xdata()) > 0.5]


def pairs(figure, teacher_layers, student_layers):
    """(teacher layer, student layer) of every line, from where it starts and ends."""
    return [
        (start * (teacher_layers - 1), end * (student_layers - 1))
        for start, end in (line.get_ydata() for line in lines(figure))
    ]


def boxes(figure):
    """Layer number, whether mapped, of teacher and student, from the top."""
    columns = {0.0: [], 1.0: []}
    for text in figure.axes[0].texts:
        if text.get_bbox_patch() is not None:
            x, _ = text.get_position()
            columns[x].append((int(text.get_text()), text.get_color() == "white"))
    return columns[0.0], columns[1.0]


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts if text.get_bbox_patch() is None]


def close(found, expected):
    return [pytest.approx(pair, abs=TOL["float32"]) for pair in expected] == found


def test_a_deep_map_has_a_line_for_every_row(draw):
    figure = draw(make_layer_map("skip", 48, 28), 48, 28)
    expected = [(s * 48 // 28, s) for s in range(28)]
    assert close(pairs(figure, 48, 28), expected)
    teacher, student = boxes(figure)
    mapped = {t for t, _ in expected}
    assert teacher == [(layer, layer in mapped) for layer in range(48)]
    assert student == [(layer, True) for layer in range(28)]
    assert words(figure) == ["teacher, 48 layers", "student, 28 layers", "cut after 46"]


def test_rows_are_told_apart_by_more_than_colour(draw):
    figure = draw(make_layer_map("ratio", 6, 4), 6, 4)
    styles = [line.get_linestyle() for line in lines(figure)]
    assert all(a != b for a, b in itertools.pairwise(styles))


def test_boxes_of_a_deep_model_do_not_touch(draw):
    figure = draw(make_layer_map("ratio", 48, 28), 48, 28)
    for x in (0.0, 1.0):
        column = [
            text.get_bbox_patch().get_window_extent()
            for text in figure.axes[0].texts
            if text.get_bbox_patch() is not None and text.get_position()[0] == x
        ]
        assert len(column) > 20
        assert all(above.y0 > below.y1 for above, below in itertools.pairwise(column))
    width, height = figure.bbox.size
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


def test_a_weighted_mean_is_as_wide_as_its_weights(draw):
    weighted = LayerMap((0, 1), ((0, 1), (2, 3)), ((0.25, 0.75), (1.0, 0.0)))
    figure = draw(weighted, 4, 2)
    assert close(pairs(figure, 4, 2), [(0, 0), (1, 0), (2, 1)])  # a weight of 0 has no line
    quarter, three_quarters, whole = (line.get_linewidth() for line in lines(figure))
    assert quarter < three_quarters < whole
    assert three_quarters - quarter == pytest.approx(2 * (whole - three_quarters))


def test_layers_side_by_side_have_a_line_each(draw):
    figure = draw(LayerMap((0, 1), ((0, 1, 2), (1, 2, 4))), 6, 2)
    assert close(pairs(figure, 6, 2), [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (4, 1)])
    assert len({line.get_linewidth() for line in lines(figure)}) == 1


def test_the_cut_is_after_the_last_needed_layer(draw):
    given = make_layer_map([(1, 0), (3, 2)], 6, 4)
    figure = draw(given, 6, 4)
    (cut,) = set(figure.axes[0].get_lines()) - set(lines(figure))
    assert 3 / 5 < cut.get_ydata()[0] < 4 / 5
    assert "cut after 3" in words(figure)
    teacher, student = boxes(figure)
    assert [layer for layer, mapped in teacher if mapped] == [1, 3]
    assert [layer for layer, mapped in student if mapped] == [0, 2]
    # Nothing is cut where logits need the whole teacher, or the last layer is mapped.
    assert not [word for word in words(draw(given, 6, 4, cut=False)) if "cut" in word]
    whole = draw(make_layer_map("ratio", 6, 4), 6, 4)
    assert not [word for word in words(whole) if "cut" in word]


def test_models_of_one_layer(draw):
    assert len(lines(draw(make_layer_map("ratio", 1, 1), 1, 1))) == 1


def test_a_map_of_other_models_is_refused(draw):
    with pytest.raises(KavaError, match="reads teacher layer 5 of 5"):
        draw(make_layer_map("ratio", 6, 4), 5, 4)
    with pytest.raises(KavaError, match="reads student layer 3 of 3"):
        draw(make_layer_map("ratio", 6, 4), 6, 3)
