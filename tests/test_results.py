"""The figures in the README are those of the committed JSON files, written by named commands."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _section(name: str) -> str:
    found = re.search(rf"<!-- results:{name} -->\n(.*?)<!-- /results:{name} -->", README, re.S)
    assert found, f"README has no section results:{name}"
    return found[1]


def _result(name: str) -> dict:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


def test_demo_table_is_the_committed_result() -> None:
    section, result = _section("demo"), _result("demo")
    for model in result["models"]:
        row = next(
            line for line in section.splitlines() if line.startswith(f"| {model['model']} |")
        )
        _, _, parameters, loss, accuracy, _ = (cell.strip() for cell in row.split("|"))
        assert _numbers(parameters) == [model["parameters"]]
        assert _numbers(loss) == [round(model["loss"], 4)]
        expected = [round(100 * model["exact_match"], 1), round(100 * model["standard_error"], 1)]
        assert _numbers(accuracy) == expected
    sentence = section.splitlines()[-1]
    expected = [
        result["questions"],
        result["steps"],
        round(result["cosine"], 3),
        round(result["alignment_gap"], 3),
        round(result["seconds"]),
    ]
    assert _numbers(sentence.replace("2 cores", "")) == expected
    assert result["reimport_identical"] is True


def test_tinystories_table_is_the_committed_result() -> None:
    section, result = _section("tinystories_260k"), _result("tinystories_260k")
    rows = {
        "held-out loss": ("eval_loss_before", "eval_loss_distilled"),
        "cosine": ("cosine_before", "cosine_after"),
        "alignment gap": ("alignment_gap_before", "alignment_gap_after"),
    }
    for heading, keys in rows.items():
        row = next(line for line in section.splitlines() if line.startswith(f"| {heading} |"))
        assert _numbers(row) == [round(result[key], 3) for key in keys]
    sentence = section.splitlines()[-1]
    assert _numbers(sentence) == [
        round(result["eval_loss_cross_entropy_only"], 3),
        result["steps"],
    ]


# Tables stand in the pages between markers, as docs/results/tables.py writes them.
BY_HAND = {"demo", "tinystories_260k"}
WRITTEN = [
    (str(path.relative_to(ROOT)), name)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for name in re.findall(r"<!-- results:(\w+) -->", path.read_text(encoding="utf-8"))
    if name not in BY_HAND
]


TABLES = ROOT / "docs" / "results" / "tables.py"


@pytest.fixture(scope="module")
def table():
    """What the script writes for a result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TABLES.parent))
        return runpy.run_path(str(TABLES))["table"]


@pytest.mark.parametrize(("page", "name"), WRITTEN)
def test_the_docs_hold_the_table_that_the_result_gives(table, page: str, name: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- results:{name} -->\n(.*?)\n<!-- /results:{name} -->", text, re.S)
    assert found, f"{page} has no end of the section results:{name}"
    assert found[1] == table(name), "python docs/results/tables.py brings it up to date"


def test_the_script_prints_the_table_that_it_is_asked_for(table) -> None:
    done = subprocess.run(
        [sys.executable, str(TABLES), "confirmed"], capture_output=True, text=True, check=True
    )
    assert done.stdout == table("confirmed") + "\n"


def test_every_grid_with_results_has_its_table() -> None:
    grids = {path.parent.name for path in (ROOT / "docs" / "results").glob("*/grid.json")}
    assert {"scratch", "pretrained"} <= grids
    assert grids <= {name for _, name in WRITTEN}


def test_looking_costs_at_most_a_twentieth_of_the_time() -> None:
    assert _result("bench_diagnostics")["share_of_step"] <= 0.05


def test_a_measured_share_holds() -> None:
    found = _result("auto_share")
    assert found["asked"] / 2 <= found["least_window"]
    assert found["most_window"] <= 2 * found["asked"]


@pytest.fixture
def cut_students(tmp_path, monkeypatch):
    """The tables of cut students, with files of their own."""
    monkeypatch.syspath_prepend(str(TABLES.parent))
    module = importlib.import_module("real_pair_table")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "arms.jsonl")
    monkeypatch.setattr(module, "SECONDS", tmp_path / "seconds.json")
    # The steps 0, 1, 2, 4, 8, 16, 20 and 40 measure the weight.
    own = {"kl": {"step": {"median": 10.0}}}
    own["kl+mse"] = own["kl"] | {"measuring_step": {"median": 40.0}}
    module.SECONDS.write_text(json.dumps({"seconds": {"half": own}}))
    return module


def _arm(losses: str, seed: int, shift: float) -> dict:
    blocks = [2.0 + shift, 3.0 + shift, 4.0 + 4 * shift]
    figures = {"loss": 3 + shift, "kl": 1.0, "block_loss": blocks}
    curve = [{"step": 0, "eval_loss": 6.0}, {"step": 60, "eval_loss": 3.0 + shift}]
    line = {"arm": f"half/{losses}", "seed": seed, "steps": 60, "cut": "half", "losses": losses}
    line |= {"changes": [], "text": "gsm8k", "curve": curve}
    return line | {"figures": {"gsm8k": figures, "tinystories": figures}}


def test_arms_are_compared_with_the_one_without_matching(cut_students) -> None:
    for seed in range(3):
        cut_students.append(_arm("kl", seed, 0.0), "")
        cut_students.append(_arm("kl+mse", seed, -0.1 * (1 + seed)), "")
    told = cut_students.real_pair()
    rows = [line for line in told if line.startswith("| half/kl+mse |")]
    cells, fresh = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    # 52 steps of 10 seconds and 8 of 40. Blocks differ by -0.1, -0.1 and -0.4: a mean of
    # -0.2 and a deviation of 0.1732, over the root of 3. The curve falls from 6 by 3.1 in 60 steps.
    assert cells[2:6] == ["60", "14.0", "2.900", "-0.200 ± 0.100"]
    assert cells[-1] == f"{60 * 3 / 3.1:.0f}"
    # Seeds 1 and 2 in one row: blocks differ by -0.4 and by -0.6, curves fall by 3.2 and by 3.3.
    assert fresh[1:6] == ["1, 2", "60", "14.0", "2.750", "-0.500 ± 0.100"]
    assert fresh[-1] == f"{60 * 3 / 3.3:.0f} to {60 * 3 / 3.2:.0f}"
    # Seeds 1 and 2 alone, -0.2 and -0.3.
    said = "Loss on GSM8K after 60 steps, half/kl+mse minus half/kl: -0.25 ("
    assert any(line.startswith(said) for line in told)
    # KL's 600 seconds hold 39 steps, 7 of them long.
    assert cut_students.affordable("half", "kl+mse", 60) == 39


def test_the_student_that_was_handed_a_cache_is_compared_with_one_that_read_alone(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.syspath_prepend(str(TABLES.parent))
    module = importlib.import_module("handoff_pair_table")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "arms.jsonl")
    monkeypatch.setattr(module, "HANDOFF_SECONDS", tmp_path / "seconds.json")
    own = {"alone": {"step": {"median": 3.0}}, "both": {"step": {"median": 4.8}}}
    module.HANDOFF_SECONDS.write_text(json.dumps({"seconds": own}))

    def arm(mode: str, seed: int, steps: int, handed: list[float]) -> dict:
        rows = {"row_alone": [1.0, 2.0], "row_handed": handed}
        losses = {"alone": 1.5, "handed": sum(handed) / 2, "wrong": 4.0, "none": 5.0}
        if not seed:
            losses |= {"long alone": 1.2, "long handed": 1.1}
            rows |= {"row_long alone": [1.0, 1.4], "row_long handed": [1.2, 1.0]}
        line = {"arm": f"kl/{mode}", "seed": seed, "healed": "kl", "mode": mode, "steps": steps}
        return line | {"changes": [], "figures": losses | rows | {"teacher": 0.5}}

    lines = [
        line
        for seed in range(3)
        for line in (
            arm("alone", seed, 40, [6.0, 6.0]),
            arm("both", seed, 40, [0.8 - 0.1 * seed, 1.6]),
            arm("both", seed, 26, [1.1 + 0.1 * seed, 2.1]),
        )
    ]
    module.RESULTS.write_text("\n".join(map(json.dumps, lines)))
    told = module.handoff_pair()
    rows = [line for line in told if line.startswith("| kl | both |")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")][2:] for row in rows]
    # Rows differ from those read alone by 0.1 and 0.1, or by -0.2 and -0.4. Over seeds 1 and 2 the
    # means are 0.15 and 0.2, or -0.35 and -0.4.
    assert cells == [
        ["0", "26", "2.1", "1.500", "1.600", "+0.100 ± 0.000", "4.000", "5.000"],
        ["1, 2", "26", "2.1", "1.500", "1.675", "+0.175 ± 0.025", "4.000", "5.000"],
        ["0", "40", "3.2", "1.500", "1.200", "-0.300 ± 0.100", "4.000", "5.000"],
        ["1, 2", "40", "3.2", "1.500", "1.125", "-0.375 ± 0.025", "4.000", "5.000"],
    ]
    text = " ".join(told)
    assert "the teacher has 0.500" in text
    after = "kl/both from the teacher's cache after {} steps minus kl/alone after 40: {} (95 %"
    assert after.format(26, "+0.175") in text
    assert after.format(40, "-0.375") in text
    # Over the rows: +0.2 and -0.4.
    long = "kl/both from the teacher's cache 1.100 minus kl/alone 1.200: -0.100 ± 0.300 (seed 0"
    assert long in text
