"""The three published tables: they hold, and the check can fail."""

import io
import json
import math

import pytest
from rich.console import Console

from kava_jax import verify
from kava_jax.verify import TableRow, as_dict, render, run_verification


@pytest.fixture(scope="module")
def verification() -> tuple[list[TableRow], list[str]]:
    return run_verification()


def test_every_row_holds_and_none_is_missing(verification) -> None:
    rows, _ = verification
    assert all(row.holds for row in rows)
    assert [row.label for row in rows if row.table == "scale"] == [
        "MSE",
        "Mercator loss",
        "cosine",
    ]
    angles = [row for row in rows if row.table == "angles"]
    mixed, rotated = angles[0::2], angles[1::2]
    degrees = [0, 15, 30, 45, 60, 90, 180]
    assert [row.label for row in mixed] == [row.label for row in rotated]
    assert [row.label for row in mixed] == [f"{d}°" for d in degrees]
    for row, d in zip(rotated, degrees, strict=True):
        assert row.computed == pytest.approx(math.cos(math.radians(d)), abs=5e-5)
    assert f"{rows[0].computed:.4f}" == f"{99**2 / 128:.4f}"
    assert [f"{row.computed:.6f}" for row in rows if row.table == "beta"] == [
        "0.000000",
        "0.212076",
        "2.120759",
    ]


@pytest.mark.parametrize("index", range(20))
def test_a_wrong_figure_makes_its_row_fail(verification, index: int) -> None:
    rows, notes = list(verification[0]), verification[1]
    assert len(rows) == 20
    for wrong in (rows[index].computed + 2.1 * rows[index].tolerance, math.nan):
        rows[index] = rows[index]._replace(computed=wrong)
        assert [row.holds for row in rows].count(False) == 1
        assert not as_dict(rows, notes)["holds"]


def test_a_broken_loss_makes_the_tables_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify.mse
    monkeypatch.setattr(verify, "mse", lambda s, t: real(s, 0.99 * t))
    broken, _ = run_verification()
    assert [row.label for row in broken if not row.holds] == ["MSE"]
    monkeypatch.setattr(verify, "geodesic_rotate", lambda x, towards, angle: x)
    failed = [row.label for row in run_verification()[0] if not row.holds]
    assert failed == ["MSE", "15°", "30°", "45°", "60°", "90°", "180°"]


def test_the_notes_explain_in_one_sentence_each(verification) -> None:
    why, labels, draw, own_check = verification[1]
    assert "0.66°" in why
    assert "0.8660" in why
    assert '60° "Good" (its cosine 0.5000 is Acceptable)' in labels
    assert '90° "Acceptable" (its cosine 0.0000 is Poor)' in labels
    assert "one draw" in draw
    assert "fails by its own check" in own_check


def test_json_and_terminal(verification) -> None:
    data = json.loads(json.dumps(as_dict(*verification)))
    assert data["rows"][0] == {
        "table": "scale",
        "label": "MSE",
        "quantity": "mean",
        "computed": pytest.approx(99**2 / 128),
        "expected": 76.57,
        "source": "published",
        "published": 76.57,
        "tolerance": 0.005,
        "decimals": 2,
        "holds": True,
    }
    out = io.StringIO()
    Console(file=out, width=100).print(render(*verification))
    assert "Every row holds." in out.getvalue()
    assert "0.8660" in out.getvalue()
    rows = (verification[0][0]._replace(computed=1.0), *verification[0][1:])
    Console(file=out, width=100).print(render(rows, ()))
    assert "Rows that do not hold: MSE (mean)." in out.getvalue()
