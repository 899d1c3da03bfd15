"""What a manifest says for people, filled in from the run itself."""

import math

import pytest

from kava_jax.config.file import parse_config
from kava_jax.journal.manifest import read_manifest
from kava_jax.runs.prepare import load_dataset, prepare
from kava_jax.runs.record import facts, results
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
def prepared(tiny, monkeypatch):
    """A run that has trained nothing, and its rows."""
    monkeypatch.chdir(tiny)
    run = prepare(parse_config(CONFIG))
    return run, load_dataset(run)


def test_the_models_and_rows_of_a_run(prepared):
    found = facts(*prepared)
    assert found["models"]["student"] == {
        "family": "qwen2",
        "layers": 2,
        "hidden_size": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "vocabulary": 512,
    }
    teacher = found["models"]["teachers"]["big"]
    assert teacher["layers"] == 3
    assert teacher["layer_map"] == {0: "0", 1: "2"}  # first meets first, last meets last
    # 88 rows, of which 8 are held out.
    assert found["rows"] == {"training": 80, "held_out": 8}


def test_results_have_six_digits_and_a_verdict():
    assert results(EVALUATION) == {
        "held_out_loss": 1.23457,
        "exact_match": None,
        "cosine": 0.97,
        "cosine_of_unrelated_examples": 0.4,
        "alignment_gap": 0.57,
        "old/exact_match_strict": 0.25,
        "verdict": "Excellent",
    }


def test_a_high_cosine_without_a_gap_is_called_collapsed():
    figures = EVALUATION | {"eval_cos_shuffled": 0.96, "eval_alignment_gap": 0.01}
    assert results(figures)["verdict"] == "collapsed"


def test_a_run_leaves_its_results_at_the_end(tiny, tmp_path, monkeypatch, capsys):
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
    found = read_manifest(tmp_path / "run")
    assert found["models"]["teachers"] == {}
    assert found["results"]["held_out_loss"] > 0
    assert found["results"]["verdict"] is None
    assert "kava train" in found["starts"][0]["command"]
    assert found["starts"][0]["hardware"] == {"hosts": 1, "devices": 8, "device_kind": "cpu"}
