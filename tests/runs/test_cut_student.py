"""A student that holds the record of a cut: its layer maps, and a whole run without a projector."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.config.file import parse_config
from kava_jax.errors import KavaError
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.cut_record import CutRecord, read_cut_record, write_cut_record
from kava_jax.hf.load import read_spec
from kava_jax.runs.find_models import Found, Models
from kava_jax.runs.layer_maps import layer_map_of
from kava_jax.runs.smoke import smoke_config
from tests.tiny import CONFIG, GEOMETRY, kava, write_config, write_model, write_rows
from tests.tolerances import TOL


def record(depth: int, *layers: int) -> CutRecord:
    heads = ((0,), (1,))
    return CutRecord(
        teacher="the/teacher", fingerprint="", teacher_layers=depth, layers=layers, kv_heads=heads
    )


def chosen(setting: Any, cut: CutRecord | None, teacher: int = 6, student: int = 3):
    """Layers and note for a student of three layers under a second teacher of six."""
    specs = [
        spec_from_config(GEOMETRY | {"num_hidden_layers": n}, where="") for n in (student, teacher)
    ]
    config = parse_config(CONFIG | {"teachers": [{"path": "t", "layer_map": setting}]})
    models = Models(Found(Path(), specs[0], cut), {"teacher": Found(Path(), specs[1])})
    layer_map, rule, note = layer_map_of(1, config.teachers[0], models)
    assert rule == config.teachers[0].layer_map or note is None or f": {rule}, because" in note
    return [row[0] for row in layer_map.teacher_layers], note


CUT = record(6, 0, 1, 4)
FIELD = "teachers.1.layer_map"


@pytest.mark.parametrize(
    ("setting", "cut", "layers", "said"),
    [
        (None, CUT, [0, 1, 4], f"{FIELD}: origin, because the student's layers were cut from the/"),
        (None, None, [0, 3, 5], None),
        (
            None,
            record(7, 0, 1, 4),
            [0, 3, 5],
            f"{FIELD}: ratio, because the student's record is of",
        ),
        (
            None,
            record(6, 0, 1),
            [0, 3, 5],
            "from 6 to 2 layers, but the teacher has 6 and the stud",
        ),
        ("origin", CUT, [0, 1, 4], None),
        ("straddle", CUT, [0, 3, 5], None),
        ("ratio", CUT, [0, 3, 5], f"{FIELD}='ratio' pairs layers with others than they came from"),
        ("ratio", record(6, 0, 3, 5), [0, 3, 5], None),  # they came from these
        ("ratio", record(7, 0, 1, 4), [0, 3, 5], None),
        ("ratio", None, [0, 3, 5], None),
        ("last", CUT, [3, 4, 5], None),
        (((5, 0), (1, 1)), CUT, [5, 1], None),
    ],
)
def test_which_map_a_student_gets_and_what_is_said(setting, cut, layers, said) -> None:
    found, note = chosen(setting, cut)
    assert found == layers
    assert (note is None) == (said is None)
    assert said is None or said in note


@pytest.mark.parametrize("setting", ["origin", "straddle"])
@pytest.mark.parametrize("cut", [None, record(7, 0, 1, 4), record(6, 0, 1)])
def test_a_map_by_origin_without_fitting_origins_is_refused(setting, cut) -> None:
    with pytest.raises(KavaError, match=rf"^{FIELD}='{setting}': .*; use 'ratio' or a list of"):
        chosen(setting, cut)


def test_smoke_thins_the_origins_with_the_models(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher", num_hidden_layers=24)
    write_model(tmp_path / "student", num_hidden_layers=12)
    write_rows(tmp_path / "data.jsonl", 88)
    write_cut_record(tmp_path / "student", record(24, 0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22, 23))
    write_model(tmp_path / "third", num_hidden_layers=6)
    teachers = [{"name": name, "path": name} for name in ("teacher", "third")]
    config = parse_config(CONFIG | {"teachers": teachers})
    for _ in range(2):  # the second one finds the files of the first
        smoke = smoke_config(config)
        student = Path(str(smoke.student.path))
        assert smoke.teachers[0].layer_map is None
        depths = [read_spec(Path(one)).num_layers for one in (smoke.teachers[0].path, student)]
        # 24, 12 and 6 layers have 6 in common: every sixth of the twelve, a sixth as deep.
        assert depths == [4, 2]
        cut = read_cut_record(student)
        assert cut is not None
        assert (cut.teacher_layers, cut.layers) == (4, (0, 1))
    # A cut from a depth that no teacher has says nothing of these teachers, thinned or not.
    write_cut_record(tmp_path / "student", record(25, *range(12)))
    assert read_cut_record(Path(str(smoke_config(config).student.path))) is None


ALONE = {
    "projector": {"kind": "identity"},
    "loss": {
        "ce_weight": 0,
        "kl_weight": {"start": 0.5, "end": 1},
        "kv_weight": {"share": 0.5, "every": 1},
    },
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A cut student under a teacher of four layers, trained by KL and its own teacher's cache."""
    work = tmp_path_factory.mktemp("cut")
    write_model(work / "teacher", seed=1, num_hidden_layers=4)
    write_model(work / "student", seed=2)
    write_cut_record(work / "student", record(4, 0, 2))
    write_rows(work / "data.jsonl", 88)
    write_config(work / "tiny.yaml", **ALONE)
    return work


@pytest.mark.long
def test_a_whole_run_without_parameters_between_the_caches(workspace, monkeypatch, capsys) -> None:
    monkeypatch.chdir(workspace)
    said = kava(capsys, "train", "tiny.yaml")
    assert said.code == 0, said.err
    because = "teachers.0.layer_map: origin, because the student's layers were cut from the/teacher"
    assert because in said.err
    manifest = yaml.safe_load(Path("run/manifest.yaml").read_text())
    assert manifest["models"]["teachers"]["big"]["layer_map"] == {"0": "0", "1": "2"}
    again = kava(capsys, "train", "tiny.yaml", "train.steps=4", "mesh.fsdp=2")
    assert again.code == 0, again.err
    assert "continuing from the checkpoint at step 2" in again.err
    assert "kl_weight 1 -> 0.8333" in again.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert all(line["grad_norm_projector"] == 0 < line["grad_norm_student"] for line in trained)
    assert all("cos_running" in line for line in trained)
    # Before its first step, the share of a KV loss that weighs as much as KL.
    first = next(line for line in lines if line["kind"] == "diagnostics")
    unweighted = first["kv_gradient_share"] / 0.5
    assert trained[0]["kv_weight"] == pytest.approx(0.5 / unweighted, rel=TOL["float32"])
    projector = KVDimensionProjector.load(Path("run/projector.safetensors"))
    assert (projector.kind, projector.count_parameters()) == ("identity", 0)
    explained = kava(capsys, "explain", "tiny.yaml").out
    assert because in explained
    evaluated = kava(capsys, "eval", "run", "--data", "data.jsonl", "--json")
    assert evaluated.code == 0, evaluated.err
    assert {"eval_cos_sim", "eval_kl", "eval_loss"} <= json.loads(evaluated.out).keys()
    exported = kava(capsys, "export", "run", "--out", "exported")
    assert exported.code == 0, exported.err
    # Without its record the same student would meet other layers, so the run does not go on.
    Path("student/kava_cut.json").rename("elsewhere.json")
    refused = kava(capsys, "train", "tiny.yaml", "train.steps=4")
    Path("elsewhere.json").rename("student/kava_cut.json")
    assert refused.code == 2
    assert "other files: student weights" in refused.err


@pytest.mark.long
def test_maps_that_are_measured_stay_what_they_are(workspace, monkeypatch, capsys) -> None:
    monkeypatch.chdir(workspace)
    fields = ["recipe=calibrated", "teachers.0.layer_map=null", "run.dir=fitted"]
    fields += ["projector.kind=linear", "loss.remove_key_bias=false"]
    ended = kava(capsys, "calibrate", "tiny.yaml", *fields)
    assert ended.code == 0, ended.err
    found = json.loads(Path("fitted/calibration/calibration.json").read_text())
    layer_map = found["teachers"]["big"]["layer_map"]
    assert layer_map == {"student_layers": [0, 1], "teacher_layers": [[0], [2]]}


def test_an_empty_list_of_pairs_is_not_taken_for_none() -> None:
    with pytest.raises(KavaError, match=rf"^{FIELD}: it holds no pairs"):
        chosen([], CUT)
