"""The command line as people use it: help, a run from start to export, and JSON for machines."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from kava_jax.cli import run_commands, studies
from kava_jax.cli.app import app
from kava_jax.journal.manifest import read_manifest
from tests.tiny import contents, kava, write_workspace
from tests.tolerances import TOL

assert run_commands.app is studies.app is app  # both add their commands to it
COMMANDS = sorted(
    # One without a name is called after its function, which every command here has.
    command.name or command.callback.__name__  # pyright: ignore[reportOptionalMemberAccess]
    for command in app.registered_commands
)


def test_every_command_is_there():
    assert {"train", "eval", "export", "verify", "demo"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    ended = kava(capsys, command, "--help")
    assert ended.code == 0
    assert re.search(rf"Example:\s+kava {command}\b", ended.out)


def test_help_lists_every_command_and_needs_no_jax():
    program = (
        "import sys\nfrom kava_jax.cli import main\nsys.argv = ['kava', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = [n for n in ('jax', 'flax', 'transformers', 'numpy') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^\s+{command}\s", done.stdout, re.M) for command in COMMANDS)


def test_verify_is_one_json_document_and_holds(capsys):
    ended = kava(capsys, "verify", "--json")
    assert ended.code == 0
    assert isinstance(json.loads(ended.out), dict)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("cli") / "original")


@pytest.fixture(scope="module")
def trained(original, tmp_path_factory):
    """The workspace after ``kava train``, run as a process of its own on one device."""
    workspace = tmp_path_factory.mktemp("cli") / "trained"
    shutil.copytree(original, workspace)
    program = "from kava_jax.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "tiny.yaml"],
        cwd=workspace,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return workspace


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_leaves_its_records(trained):
    run = trained / "run"
    present = {path.name for path in run.iterdir()}
    assert {"config.yaml", "manifest.yaml", "metrics.jsonl", "checkpoints"} <= present
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["kind"], line["step"]) for line in lines]
    assert steps == [("eval", 0), ("diagnostics", 0), ("train", 1), ("train", 2), ("eval", 2)]
    assert all(value is not None for line in lines for value in line.values())
    (start,) = read_manifest(run)["starts"]
    assert start["command"].endswith("train tiny.yaml")


def test_a_finished_run_continues_into_nothing(workspace, capsys):
    before = contents(workspace / "run")
    ended = kava(capsys, "train", "tiny.yaml")
    assert ended.code == 0, ended.err
    assert ended.out == ""
    assert "continuing from the checkpoint at step 2" in ended.err
    assert "loss.kv.beta=0.01 is off: projector.kind=elastic begins with a norm" in ended.err
    after = contents(workspace / "run")
    changed = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys()
    assert not [name for name in changed if name.startswith(("checkpoints", "metrics"))]
    assert len(read_manifest(workspace / "run")["starts"]) == 2


def test_an_export_is_as_good_as_its_run(workspace, capsys):
    """And ``--json`` puts one document on stdout and nothing else."""
    data = ("--data", "builtin:word_problems", "--rows", "8", "--json")
    ended = kava(capsys, "eval", "run", *data)
    assert ended.code == 0, ended.err
    of_run = json.loads(ended.out)
    ended = kava(capsys, "export", "run", "--out", "exported", "--checkpoint", "2")
    assert ended.code == 0, ended.err
    assert ended.out == ""
    same = ("data.max_length=64", "data.batch_size=8", "eval.max_new_tokens=4", "eval.batch_size=8")
    ended = kava(capsys, "eval", "exported", *same, *data)
    assert ended.code == 0, ended.err
    of_export = json.loads(ended.out)
    assert {"eval_loss", "exact_match_strict", "exact_match_flexible"} <= of_export.keys()
    assert {"eval_cos_sim", "eval_alignment_gap"} <= of_run.keys() - of_export.keys()
    shared = {name: of_run[name] for name in of_export}
    assert of_export == pytest.approx(shared, rel=TOL["float32"])


def test_figures_for_people(workspace, capsys):
    ended = kava(
        capsys, "eval", "student", "--data", "data.jsonl", "--rows", "8", "eval.max_new_tokens=2"
    )
    assert ended.code == 0, ended.err
    assert re.search(r"^eval_loss +\d+\.\d{4}$", ended.out, re.M)


@pytest.mark.parametrize(
    "arguments", [("export", "--out", "exported"), ("eval", "--data", "data.jsonl"), ("report",)]
)
def test_a_run_of_an_earlier_version_is_told(arguments, tmp_path, capsys):
    manifest = {"config": {}, "starts": [{"versions": {"kava_jax": "0.1.0"}}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    ended = kava(capsys, arguments[0], str(tmp_path), *arguments[1:])
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "is a run of kava_jax 0.1.0, whose config and files were others; commit 855d6f7 " in line
