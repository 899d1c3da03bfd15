"""A run directory keeps its identity: what a start may change, and what it may not."""

import subprocess
import sys
from datetime import date

import pytest
import yaml

from kava_jax.errors import KavaError
from kava_jax.journal.manifest import (
    Fingerprints,
    check_manifest,
    config_diff,
    config_hash,
    read_manifest,
    write_config,
    write_manifest,
    write_results,
)

CONFIG = {
    "run": {"name": "demo", "seed": 0},
    "teachers": [{"name": "big", "path": "models/big"}],
    "optimizer": {"student_lr": 5e-5, "betas": (0.9, 0.95), "clip": None},
    "steps": 100,
}
PRINTS = Fingerprints(teachers={"big": "a" * 64}, student="b" * 64, data="c" * 64)
HARDWARE = {"hosts": 1, "devices": 8, "device_kind": "cpu"}


def start(run_dir, config=CONFIG, prints=PRINTS):
    write_config(run_dir, config)
    write_manifest(
        run_dir,
        command=["kava", "train", "my config.yaml"],
        config=config,
        fingerprints=prints,
        today=date(2026, 1, 2),
        hardware=HARDWARE,
    )


def changed(**sections):
    return {**CONFIG, **sections}


def check(run_dir, config=CONFIG, prints=PRINTS, free=()):
    return check_manifest(run_dir, config=config, fingerprints=prints, free=free)


def test_a_new_directory_is_fresh_and_stays_untouched(tmp_path):
    assert check(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_the_same_run_is_recognised(tmp_path):
    start(tmp_path)
    assert check(tmp_path)
    # As the resolved file reads back: lists for tuples, and another key order.
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert check(tmp_path, config=dict(reversed(config.items())))


def test_the_manifest_says_what_ran_where(tmp_path):
    start(tmp_path)
    manifest = read_manifest(tmp_path)
    (entry,) = manifest["starts"]
    assert entry["command"] == "kava train 'my config.yaml'"
    assert entry["hardware"] == {"hosts": 1, "devices": 8, "device_kind": "cpu"}
    assert entry["time"].endswith("+00:00")
    assert entry["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"kava_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"} < set(
        entry["versions"]
    )
    assert manifest["fingerprints"]["teachers"] == {"big": "a" * 64}
    assert manifest["config_hash"] == config_hash(CONFIG)


def test_every_start_is_kept(tmp_path):
    start(tmp_path)
    start(tmp_path)
    assert len(read_manifest(tmp_path)["starts"]) == 2


def git(*arguments):
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments],
        check=True,
        capture_output=True,
    )


def test_the_git_revision_is_that_of_the_current_directory(tmp_path, monkeypatch):
    work, run_dir = tmp_path / "work", tmp_path / "run"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    start(run_dir)
    git("init")
    (work / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    start(run_dir)
    (work / "file").write_text("two")
    start(run_dir)
    revision = (work / ".git" / "refs").rglob("*")
    head = next(path for path in revision if path.is_file()).read_text().strip()
    assert [entry["git"] for entry in read_manifest(run_dir)["starts"]] == [
        None,
        {"revision": head, "dirty": False},
        {"revision": head, "dirty": True},
    ]


def test_config_diff_names_every_dotted_field():
    new = changed(
        run={"name": "demo", "seed": 1},
        teachers=[{"name": "big", "path": "models/other"}, {"name": "small"}],
        optimizer={"student_lr": 5e-5, "betas": [0.9, 0.99], "clip": 1.0},
    )
    assert config_diff(CONFIG, new) == {
        "run.seed": "0 -> 1",
        "teachers.0.path": '"models/big" -> "models/other"',
        "teachers.1.name": 'absent -> "small"',
        "optimizer.betas.1": "0.95 -> 0.99",
        "optimizer.clip": "null -> 1.0",
    }
    assert config_diff(new, CONFIG)["teachers.1.name"] == '"small" -> absent'
    assert config_diff(CONFIG, CONFIG) == {}


@pytest.mark.parametrize("free", [["steps"], ["teachers"], ["teachers.*.path"], ["teachers.0"]])
def test_free_fields_may_change(free):
    new = changed(steps=200, teachers=[{"name": "big", "path": "models/other"}])
    left = set(config_diff(CONFIG, new, free))
    assert left == ({"teachers.0.path"} if free == ["steps"] else {"steps"})


def test_a_free_field_does_not_free_its_namesakes():
    assert config_diff({"step": 1, "steps": 1}, {"step": 1, "steps": 2}, free=["step"])


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_another_config_is_refused_with_every_changed_field(tmp_path):
    start(tmp_path)
    new = changed(steps=200, optimizer={**CONFIG["optimizer"], "student_lr": 1e-4})
    with pytest.raises(KavaError) as error:
        check(tmp_path, config=new)
    text = one_line(error)
    assert "optimizer.student_lr 5e-05 -> 0.0001, steps 100 -> 200" in text
    assert f"run.dir={tmp_path}" in text
    with pytest.raises(KavaError, match="student_lr"):
        check(tmp_path, config=new, free=["steps"])
    assert check(tmp_path, config=new, free=["steps", "optimizer"])


@pytest.mark.parametrize(
    ("prints", "words"),
    [
        (PRINTS._replace(teachers={"big": "d" * 64}), "weights of teacher big aaaaaaaaaaaa -> ddd"),
        (PRINTS._replace(data="d" * 64), "data cccccccccccc -> dddddddddddd"),
        (PRINTS._replace(student="d" * 64), "student weights bbbbbbbbbbbb -> dddddddddddd"),
    ],
)
def test_changed_files_under_an_old_run_are_refused(tmp_path, prints, words):
    start(tmp_path)
    with pytest.raises(KavaError) as error:
        check(tmp_path, prints=prints)
    assert words in one_line(error)


def test_fingerprints_that_were_not_computed_are_not_compared(tmp_path):
    start(tmp_path)
    assert check(tmp_path, prints=Fingerprints(teachers={}))


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(KavaError) as error:
        check(tmp_path)
    assert "is not empty and has no manifest.yaml" in one_line(error)
    with pytest.raises(KavaError, match="is a file"):
        check(tmp_path / "thesis.tex")


def test_a_start_that_died_before_its_manifest_can_start_again(tmp_path):
    write_config(tmp_path, CONFIG)
    assert check(tmp_path) is None


def test_a_config_file_edited_by_hand_does_not_change_the_identity(tmp_path):
    start(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("steps: 100", "steps: 200"))
    with pytest.raises(KavaError, match="steps 100 -> 200"):
        check(tmp_path, config=changed(steps=200))


def test_a_start_that_died_between_its_two_files_can_start_again(tmp_path):
    start(tmp_path)
    write_config(tmp_path, changed(steps=200))
    for steps in (100, 200):
        assert check(tmp_path, config=changed(steps=steps), free=["steps"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    start(tmp_path)
    (tmp_path / "manifest.yaml").write_text(text)
    with pytest.raises(KavaError, match=r"restore it or name another run\.dir"):
        check(tmp_path)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(KavaError, match="is missing; name a run directory"):
        read_manifest(tmp_path)


def test_the_config_reads_back_as_numbers(tmp_path):
    write_config(tmp_path, CONFIG)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optimizer"] == {
        "student_lr": 5e-5,
        "betas": [0.9, 0.95],
        "clip": None,
    }


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    start(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kava_jax.journal.manifest.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_config(tmp_path, changed(steps=200))
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "manifest.yaml"}


def test_files_are_plain_yaml(tmp_path):
    start(tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 100
    assert (
        yaml.safe_load((tmp_path / "manifest.yaml").read_text())["fingerprints"]["data"] == "c" * 64
    )


def test_a_conclusion_is_kept_and_results_are_those_of_the_last_start(tmp_path):
    own = 'Raised the score: see "findings".\nAgain with 8 seeds. \N{GREEK SMALL LETTER BETA}'
    start(tmp_path)
    assert read_manifest(tmp_path)["conclusion"] == ""
    write_results(tmp_path, {"held_out_loss": 1.5})
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"conclusion": own}))
    assert read_manifest(tmp_path)["results"] == {"held_out_loss": 1.5}
    start(tmp_path)
    manifest = read_manifest(tmp_path)
    assert (manifest["conclusion"], manifest["results"]) == (own, None)
    write_results(tmp_path, {"held_out_loss": 1.25})
    assert read_manifest(tmp_path) == manifest | {"results": {"held_out_loss": 1.25}}
    assert path.read_text().startswith("# Written by kava train. The conclusion is yours")


@pytest.mark.parametrize("text", ['{"starts": [{"versions": {"kava_jax": "0.1.0"}}]}', "{}", "["])
def test_a_run_of_an_earlier_version_is_told_and_left_alone(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    for read in (check, read_manifest):
        with pytest.raises(KavaError, match=r"is a run of kava_jax (0\.1\.0|of an).*855d6f7"):
            read(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
