"""The experiment record: filled in from the run itself, and a person's words are kept."""

import math
from datetime import date

import pytest
import yaml

from kava_jax.config.file import dump_config, parse_config
from kava_jax.errors import KavaError
from kava_jax.journal.manifest import Hardware, write_manifest
from kava_jax.runs.prepare import fingerprints_of, load_dataset, prepare
from kava_jax.runs.record import write_record
from tests.tiny import CONFIG, kava, write_config, write_workspace

EVALUATION = {
    "eval_loss": 1.23456789,
    "eval_cos_sim": 0.97,
    "eval_cos_shuffled": 0.4,
    "eval_alignment_gap": 0.57,
    "exact_match_strict": math.nan,
    "old/exact_match_strict": 0.25,
    "old/exact_match_rows": 256.0,
    "eval_cka": 0.5,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("record"))


@pytest.fixture
def started(tiny, tmp_path, monkeypatch):
    """A run that has a manifest and has trained nothing."""
    monkeypatch.chdir(tiny)

    def start(**sections):
        raw = CONFIG | {"run": {"name": "tiny", "dir": str(tmp_path / "run")}} | sections
        config = parse_config(raw)
        run = prepare(config)
        dataset = load_dataset(run)
        write_manifest(
            run.directory,
            command=["kava", "train", "tiny.yaml"],
            config=dump_config(config),
            fingerprints=fingerprints_of(run, dataset),
            today=date(2026, 1, 2),
            hardware=Hardware(1, 8, "cpu"),
        )
        return run, dataset

    return start


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_what_was_done_with_what_and_what_came_out(started):
    run, dataset = started(loss={"kl_weight": 0.5}, optimizer={"projector_lr": 0.002})
    path = write_record(run, dataset, EVALUATION)
    assert path == run.directory / "record.yaml"
    found = read(path)
    assert found["name"] == "tiny"
    assert found["date"].startswith("20")
    (teacher,) = found["teachers"]
    assert (teacher["name"], teacher["path"], teacher["control"]) == ("big", "teacher", "none")
    assert len(teacher["fingerprint"]) == len(found["student"]["fingerprint"]) == 64
    assert teacher["geometry"]["layers"] == 3
    assert found["student"]["geometry"] == {
        "family": "qwen2",
        "layers": 2,
        "hidden_size": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "vocabulary": 512,
    }
    assert teacher["layer_map"] == {0: "0", 1: "2"}  # first meets first, last meets last
    assert found["recipe"] == "anchored"
    assert found["projector"]["kind"] == "elastic"
    weights = {key: found["loss"][key] for key in ("kv", "kv_weight", "ce_weight", "kl_weight")}
    faded = {"start": 1.0, "end": 0.0, "over": 1.0}
    kv = {"kind": "mercator", "beta": 0.01}
    assert weights == {"kv": kv, "kv_weight": faded, "ce_weight": 1.0, "kl_weight": 0.5}
    # 88 rows, of which 8 are held out.
    data = {key: found["data"][key] for key in ("path", "rows", "held_out_rows")}
    assert data == {"path": "data.jsonl", "rows": 80, "held_out_rows": 8}
    assert len(found["data"]["fingerprint"]) == 64
    assert (found["steps"], found["batch_size"], found["seed"]) == (2, 8, 0)
    assert found["learning_rates"] == {"student": 5e-5, "projector": 0.002}
    assert found["hardware"] == {"hosts": 1, "devices": 8, "device_kind": "cpu"}
    assert {"python", "jax", "flax"} <= found["versions"].keys()
    assert found["results"] == {
        "held_out_loss": 1.23457,
        "exact_match": None,
        "cosine": 0.97,
        "cosine_of_unrelated_examples": 0.4,
        "alignment_gap": 0.57,
        "old/exact_match_strict": 0.25,
        "verdict": "Excellent",
    }
    assert found["command"] == "kava train tiny.yaml"
    assert found["conclusion"] == ""
    assert list(found)[-1] == "conclusion"


def test_a_high_cosine_without_a_gap_is_called_collapsed(started):
    figures = EVALUATION | {"eval_cos_shuffled": 0.96, "eval_alignment_gap": 0.01}
    assert read(write_record(*started(), figures))["results"]["verdict"] == "collapsed"


def test_a_persons_conclusion_is_kept_and_nothing_else(started):
    run, dataset = started()
    path = write_record(run, dataset, EVALUATION)
    own = 'Raised the score: see "findings".\nAgain with 8 seeds. \N{GREEK SMALL LETTER BETA}'
    written = read(path) | {"conclusion": own, "name": "changed"}
    path.write_text(yaml.safe_dump(written))
    again = read(write_record(run, dataset, EVALUATION | {"eval_loss": 1.0}))
    assert again["conclusion"] == own
    assert again["name"] == "tiny"
    assert again["results"]["held_out_loss"] == 1.0
    path.write_text(path.read_text().replace("conclusion:", "conclusion: ["))
    with pytest.raises(KavaError, match=r"record.yaml' cannot be read .* mend or remove it"):
        write_record(run, dataset, EVALUATION)


def test_a_run_leaves_its_record_at_the_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    path = write_config(
        tmp_path / "alone.yaml",
        run={"name": "alone", "dir": str(tmp_path / "run")},
        teachers=[],
        train={"steps": 1, "log_every": 1},
        eval={"max_new_tokens": 0},
    )
    ended = kava(capsys, "train", str(path))
    assert ended.code == 0, ended.err
    found = read(tmp_path / "run" / "record.yaml")
    assert found["teachers"] == []
    assert found["loss"] == {"ce_weight": 1.0}
    assert found["learning_rates"] == {"student": 5e-5}
    assert "projector" not in found
    assert found["results"]["held_out_loss"] > 0
    assert found["results"]["verdict"] is None
    assert "kava train" in found["command"]
