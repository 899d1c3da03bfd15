"""Places on disks and in buckets; what needs a bucket is tested with real runs."""

import sys
from pathlib import Path

import pytest

from kava_jax.errors import KavaError
from kava_jax.storage import (
    absolute,
    at_revision,
    check_access,
    files_below,
    growing,
    local_path,
    move,
    place,
)


def test_a_path_stays_pathlibs_and_a_bucket_keeps_both_its_slashes() -> None:
    assert place("runs/a b", "run.dir") == Path("runs/a b")
    found = place("gs://bucket/run", "run.dir")
    assert not isinstance(found, Path)
    assert str(found / "metrics.jsonl") == "gs://bucket/run/metrics.jsonl"
    assert str(absolute(found)) == "gs://bucket/run"
    assert str(found.with_name("other")) == "gs://bucket/other"
    assert absolute(Path("run")) == Path.cwd() / "run"


@pytest.mark.parametrize(
    "text", ["s3://b/run", "az://b/run", "file://b/run", "gs://b", "gs://b/", "gs:/b/run"]
)
def test_other_urls_are_refused(text: str) -> None:
    with pytest.raises(KavaError, match=f"^run.dir={text} is neither a local directory nor gs://"):
        place(text, "run.dir")
    with pytest.raises(KavaError, match=f"^out={text} is no local path"):
        local_path(text, "out")


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    told = r"^run\.dir=gs://b/run needs google\.cloud\.storage, .* install kava_jax\[gcs\]$"
    with pytest.raises(KavaError, match=told):
        check_access(place("gs://b/run", "run.dir"), "run.dir")
    check_access(Path("run"), "run.dir")


def test_on_a_disk_files_are_written_where_they_belong(tmp_path: Path) -> None:
    with growing(tmp_path / "run", "metrics.jsonl") as files:
        assert files.directory == tmp_path / "run"
        (files.directory / "metrics.jsonl").write_text("{}\n")
        files.publish()
    (tmp_path / "run" / "deep").mkdir()
    (tmp_path / "run" / "deep" / "a").write_text("")
    assert files_below(tmp_path / "run") == ["deep/a", "metrics.jsonl"]
    move(tmp_path / "run" / "deep", tmp_path / "aside" / "deep")
    assert files_below(tmp_path) == ["aside/deep/a", "run/metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Qwen/Qwen2.5-7B@main", ("Qwen/Qwen2.5-7B", "main")),
        ("gpt2@refs/pr/1", ("gpt2", "refs/pr/1")),
        ("Qwen/Qwen2.5-7B", ("Qwen/Qwen2.5-7B", None)),
        ("Qwen/Qwen2.5-7B@", ("Qwen/Qwen2.5-7B@", None)),
        ("./model@2", ("./model@2", None)),
        ("/a/b@c/d", ("/a/b@c/d", None)),
        ("a/b/c@d", ("a/b/c@d", None)),
        ("builtin:demo_teacher", ("builtin:demo_teacher", None)),
    ],
)
def test_a_hub_id_names_its_revision_after_an_at(name, parts):
    assert at_revision(name) == parts
