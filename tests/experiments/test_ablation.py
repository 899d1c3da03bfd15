"""A grid through real processes, and what happens when it is called again, changed or refused."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from kava_jax.errors import KavaError
from kava_jax.experiments import ablation
from kava_jax.experiments.ablation import Ablation, Job
from kava_jax.experiments.grid import PRETRAINED, load_grid, run_config
from kava_jax.experiments.results import Outcome, pack, read_runs, unpack
from kava_jax.journal.manifest import read_manifest
from tests.tiny import CONFIG, GEOMETRY, kava, write_model, write_rows
from tests.tolerances import TOL

GRID: dict[str, Any] = {
    "name": "tiny",
    "config": "base.yaml",
    "set": {
        "train.steps": 4,
        "train.eval_every": 1,
        "eval.exact_match_every": 2,
        "eval.sets": {"again": {"path": "data.jsonl", "rows": 4}},
    },
    "pretrain": {"train.steps": 2, "student.path": None, "student.geometry": GEOMETRY},
    "seeds": [3],
    "score": "eval_loss",
    "baseline": "ce",
    "contrast": "kv",
    "arms": {"ce": {"teachers": []}, "kv": {"loss.kv_weight": 2}},
}


def write_grid(path: Path, **changed: Any) -> Path:
    path.write_text(yaml.safe_dump(GRID | changed, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the grid has run to its end, by its own command."""
    place = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("JAX_PLATFORMS", "cpu")
        write_model(Path("teacher"), seed=1)
        write_rows(Path("data.jsonl"), 48)
        base = CONFIG | {"student": {"path": "student", "tokenizer": "builtin:tokenizer"}}
        Path("base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
        grid, raw = load_grid(write_grid(Path("grid.yaml")))
        # It was begun on 9 September 2001.
        Path("out").mkdir()
        Path("out/grid.json").write_text('{"started": 1000000000}')
        said: list[str] = []
        failed = Ablation(grid, raw, Path("out")).run(2, said.append)
        logs = {path.name: path.read_text() for path in Path("out/logs").iterdir()}
        assert not failed, logs
        assert said[0] == "1/3  pretrain seed 3: finished"
        assert {line.partition("  ")[2] for line in said[1:]} == {
            "ce seed 3: finished",
            "kv seed 3: finished",
        }
    return place


def process_over(code: int) -> SimpleNamespace:
    """A process that is over already."""
    return SimpleNamespace(poll=lambda: code, wait=lambda: code, returncode=code)


def run_of(place: Path, arm: str) -> Outcome:
    return read_runs(place / "out")[arm, 3]


def test_arms_share_start_and_data_and_differ_in_their_own_fields(finished: Path) -> None:
    ce, kv = (run_of(finished, arm) for arm in ("ce", "kv"))
    assert ce.data == kv.data
    starts = [run.curve[0] for run in (ce, kv)]
    assert [start["step"] for start in starts] == [0, 0]
    np.testing.assert_allclose(
        starts[0]["eval_loss"], starts[1]["eval_loss"], rtol=TOL["rearranged"]
    )
    assert ce.curve[-1]["step"] == kv.curve[-1]["step"] == 4
    assert ce.curve[-1]["eval_loss"] != kv.curve[-1]["eval_loss"]
    assert "eval_cos_sim" in kv.values
    assert "eval_cos_sim" not in ce.values
    grid = json.loads((finished / "out" / "grid.json").read_text())["grid"]
    assert grid["arms"]["kv"] == {"loss.kv_weight": 2}


def test_all_runs_have_the_day_on_which_the_grid_was_begun(finished: Path) -> None:
    manifests = list((finished / "out" / "runs").rglob("manifest.yaml"))
    assert len(manifests) == 3
    assert {read_manifest(path.parent)["date"] for path in manifests} == {"2001-09-09"}
    assert json.loads((finished / "out" / "grid.json").read_text())["started"] == 10**9


def test_both_arms_start_from_the_pretrained_student_and_not_from_chance(finished: Path) -> None:
    out = finished / "out"
    pretrained = json.loads(
        (out / "runs" / PRETRAINED / "seed3" / "metrics.jsonl").read_text().splitlines()[-1]
    )
    assert pretrained["kind"] == "eval"
    start = run_of(finished, "kv").curve[0]["eval_loss"]
    np.testing.assert_allclose(start, pretrained["eval_loss"], rtol=TOL["float32"])


def test_a_record_holds_every_answer_of_every_set(finished: Path) -> None:
    run = run_of(finished, "kv")
    lines = (finished / "out/runs/kv/seed3/answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for name in ("held_out", "again"):
        own = [row["strict"] for row in rows if row["set"] == name]
        assert run.answers(name).tolist() == own
        assert len(own) == 4
    assert run.values["again/exact_match_strict"] is not None
    answered = {point["step"] for point in run.curve if "exact_match_strict" in point}
    assert answered == {2, 4}
    assert [point["step"] for point in run.curve] == [0, 1, 2, 3, 4]
    assert run.samples[0]["question"] == rows[0]["question"]


def test_the_table_is_by_arm_and_seed_and_has_nothing_twice(finished: Path, monkeypatch, tmp_path):
    """Whichever run ends first, and although a run that was kept is kept again."""
    monkeypatch.chdir(finished)
    grid, raw = load_grid(write_grid(finished / "grid.yaml"))
    ablation_, kept = Ablation(grid, raw, tmp_path), (("kv", 3), ("ce", 3), ("kv", 3))
    monkeypatch.setattr(
        ablation, "run_directory", lambda out, *job: Path("out/runs") / job[0] / "seed3"
    )
    for job in kept:
        ablation_._keep(job)
    assert (tmp_path / "runs.jsonl").read_text() == Path("out/runs.jsonl").read_text()
    lines = Path("out/runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["ce", "kv"]


def test_files_of_an_earlier_version_are_made_into_the_table(finished: Path, tmp_path, capsys):
    """One file per arm, as they were; every figure stays, and the table is what it would be."""
    script = Path(__file__).resolve().parents[2] / "docs" / "results" / "one_table.py"
    for arm in ("ce", "kv"):
        run = run_of(finished, arm)._asdict()
        content = {"arm": run.pop("arm"), "fields": {}, "runs": [run]}
        (tmp_path / f"{arm}.json").write_text(json.dumps(content))
    with pytest.raises(
        KavaError, match=r"ce.json is no part of a grid's results, or was written by"
    ):
        read_runs(tmp_path)
    runpy.run_path(str(script))["main"](tmp_path)
    assert (tmp_path / "runs.jsonl").read_bytes() == (finished / "out/runs.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]
    assert "2 runs of 2 arms" in capsys.readouterr().out


def test_a_finished_grid_runs_nothing_again(finished: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr(ablation.subprocess, "Popen", None)
    ended = kava(capsys, "ablate", "grid.yaml", "--out", "out")
    assert ended.code == 0
    assert ended.err.count("known") == 2


def test_the_records_alone_are_enough_to_go_on_from(finished: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(finished)
    calls: list[Job] = []
    monkeypatch.setattr(
        Ablation, "_call", lambda self, job, *_: calls.append(job) or process_over(1)
    )
    grid, raw = load_grid(write_grid(finished / "more.yaml", seeds=[3, 4]))
    (tmp_path / "runs.jsonl").write_bytes((finished / "out" / "runs.jsonl").read_bytes())
    failed = Ablation(grid, raw, tmp_path).run(1, lambda words: None)
    assert calls == failed == [(PRETRAINED, 4)]  # and no arm without its start


def test_a_changed_arm_is_refused(finished: Path, monkeypatch) -> None:
    monkeypatch.chdir(finished)
    arms: Mapping[str, Any] = {"ce": {"teachers": []}, "kv": {"loss.kv_weight": 3}}
    grid, raw = load_grid(write_grid(finished / "changed.yaml", arms=arms))
    with pytest.raises(KavaError, match=r"arms.kv: out/runs.jsonl was made by another grid file"):
        Ablation(grid, raw, Path("out")).run(1, lambda words: None)


def test_a_run_that_is_refused_says_so_in_its_own_words(finished: Path, monkeypatch, tmp_path):
    monkeypatch.chdir(finished)
    (finished / "broken.jsonl").write_text("{}\n")
    changed = {"pretrain": None, "set": {"data.path": "broken.jsonl"}, "arms": {"ce": {}}}
    changed["set"]["student"] = {"geometry": GEOMETRY, "tokenizer": "builtin:tokenizer"}
    grid, raw = load_grid(write_grid(finished / "bad.yaml", contrast=None, **changed))
    with pytest.raises(KavaError, match=r"arms.ce, seed 3: data.path='broken.jsonl' has 1 broken"):
        Ablation(grid, raw, tmp_path).run(1, lambda words: None)


def test_a_run_that_fails_is_told_and_the_others_go_on(finished: Path, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    write_grid(finished / "two.yaml", pretrain=None, seeds=[3, 4])
    monkeypatch.setattr(Ablation, "_call", lambda self, job, *_: process_over(int(job[0] == "kv")))
    kept: list[Job] = []
    monkeypatch.setattr(Ablation, "_keep", lambda self, job: kept.append(job))
    ended = kava(capsys, "ablate", "two.yaml", "--out", "elsewhere")
    assert ended.code == 1
    assert kept == [("ce", 3), ("ce", 4)]
    assert "failed: kv (seed 3), kv (seed 4); their words are in elsewhere/logs" in ended.err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"baseline": "none"}, "baseline=none is not an arm; use one of ce, kv"),
        ({"against": {"kv": "none"}}, "against=none is not an arm; use one of ce, kv"),
        ({"against": {"ce": "kv"}}, "against=ce: kv says nothing; name another arm"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] repeat"),
        ({"arms": {"ce": {"data.rows": 3}}, "contrast": None}, "arms.ce sets data.rows"),
        ({"arms": {"ce": {"loss.kvv": 3}}, "contrast": None}, "arms.ce: .*did you mean loss.kv"),
        ({"arms": {"a b": {}}}, "arms.a b"),
        ({"arms": {"ce": {}}, "pretrain": 3, "contrast": None}, "pretrain: Input should be"),
        ({"arms": {"ce": {}, "pretrain": {}}, "contrast": None}, "cannot be called pretrain"),
        ({"colour": 3}, "colour: Extra inputs"),
        ({"config": "none.yaml"}, "config='none.yaml' is not among the shipped configs"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(finished, monkeypatch, changed, said):
    monkeypatch.chdir(finished)
    with pytest.raises(KavaError, match=said):
        load_grid(write_grid(finished / "wrong.yaml", **changed))


def test_jobs_must_be_positive(finished: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished)
    ended = kava(capsys, "ablate", "grid.yaml", "--jobs", "0")
    assert ended.code == 2
    assert "jobs=0 is not positive" in ended.err


def test_the_shipped_grids_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "grids"
    for path in folder.glob("*.yaml"):
        grid, raw = load_grid(path)
        assert grid.baseline in ("ce", "default")
        for arm in grid.arms:
            config = run_config(grid, raw, arm, grid.seeds[-1], Path("out"))
            assert config.data.eval_rows >= 128
            assert config.run.seed == grid.seeds[-1]


def test_bits_come_back() -> None:
    for count in (1, 7, 8, 9, 100):
        bits = (np.arange(count) * 7 % 3 == 1).tolist()
        assert unpack(pack(bits)).tolist() == bits
    assert pack([True, False, True]) == "3:a0"
