"""Paths as a shell user writes them: ``~`` in a config or behind ``--out=``, and ``.``."""

import json
from pathlib import Path

import pytest
import yaml

from kava_jax.config.file import load_config, parse_config
from kava_jax.runs.smoke import smoke_config
from kava_jax.storage import place
from tests.tiny import CONFIG, contents, kava, write_config, write_workspace

SHORT = {
    "train": {"steps": 1, "log_every": 1},
    "eval": {"max_new_tokens": 4, "batch_size": 8, "sets": {"more": {"path": "data.jsonl"}}},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("paths"))


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if "second" not in k} for line in found]


@pytest.mark.long
def test_a_tilde_is_the_home_directory_in_every_path(workspace, tmp_path, monkeypatch, capsys):
    """The same run from inside and by ``~`` from elsewhere; nothing is called ``~``."""
    monkeypatch.setenv("HOME", str(workspace))
    monkeypatch.chdir(workspace)
    write_config(workspace / "plain.yaml", run={"dir": "plain"}, **SHORT)
    ended = kava(capsys, "train", "plain.yaml")
    assert ended.code == 0, ended.err
    said = kava(capsys, "eval", "plain", "--data", "data.jsonl", "--json")
    monkeypatch.chdir(tmp_path)
    at_home = {
        "run": {"dir": "~/away"},
        "teachers": [{"name": "big", "path": "~/teacher"}],
        "student": {"path": "~/student", "tokenizer": "~/student"},
        "data": CONFIG["data"] | {"path": "~/data.jsonl"},
        "eval": SHORT["eval"] | {"sets": {"more": {"path": "~/data.jsonl"}}},
    }
    write_config(workspace / "home.yaml", **(SHORT | at_home))
    ended = kava(capsys, "train", "~/home.yaml")
    assert ended.code == 0, ended.err
    assert lines(workspace / "away") == lines(workspace / "plain")
    again = kava(capsys, "eval", "~/away", "--data=~/data.jsonl", "--json")
    assert json.loads(again.out) == json.loads(said.out)
    for arguments in (("export", "--out=~/out"), ("report", "--out=~/a.html")):
        ended = kava(capsys, arguments[0], "~/away", arguments[1])
        assert ended.code == 0, ended.err
    assert (workspace / "out" / "config.json").is_file()
    assert (workspace / "a.html").is_file()
    assert list(tmp_path.iterdir()) == []
    assert not (workspace / "~").exists()


def test_names_that_only_begin_with_a_tilde_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/run", "run.dir") == tmp_path / "run"
    assert place("./~run", "run.dir") == Path("~run")
    assert place("gs://b/~", "out").parts[-1] == "~"
    named = parse_config(CONFIG | {"data": {"path": "~no.body.jsonl"}})
    assert named.data.path == "~no.body.jsonl"
    assert (
        load_config("configs/demo.yaml", ["data.eval_path=~/x"]).data.eval_path == f"{tmp_path}/x"
    )


def test_the_working_directory_is_a_run_directory_and_an_export(workspace, tmp_path, monkeypatch):
    raw = yaml.safe_load((workspace / "tiny.yaml").read_text())
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(workspace / name)
    (tmp_path / "data.jsonl").symlink_to(workspace / "data.jsonl")
    there = tmp_path / "here"
    there.mkdir()
    monkeypatch.chdir(there)
    raw["teachers"][0]["path"], raw["student"]["path"] = "../teacher", "../student"
    raw["data"]["path"] = "../data.jsonl"
    raw["run"]["dir"] = "."
    assert smoke_config(parse_config(raw)).run.directory == tmp_path / "here-smoke"
    assert contents(there) == {}


def test_a_run_in_the_working_directory_and_its_export_there(
    workspace, tmp_path, monkeypatch, capsys
):
    run, out = tmp_path / "run", tmp_path / "out"
    for directory in (run, out):
        directory.mkdir()
    config = write_config(
        tmp_path / "tiny.yaml",
        run={"dir": "."},
        teachers=[],
        student={"path": str(workspace / "student")},
        data=CONFIG["data"] | {"path": str(workspace / "data.jsonl")},
        train={"steps": 1, "log_every": 1},
        eval={"max_new_tokens": 0},
    )
    monkeypatch.chdir(run)
    assert kava(capsys, "train", str(config)).code == 0
    assert kava(capsys, "export", ".", "--out", "../elsewhere").code == 0
    monkeypatch.chdir(out)
    assert kava(capsys, "export", "../run", "--out", ".").code == 0
    assert kava(capsys, "export", "../run", "--out", ".").code == 0  # over its own
    assert contents(out) == contents(tmp_path / "elsewhere")
    assert (out / "model.safetensors").is_file()
