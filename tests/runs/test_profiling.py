"""``kava train --profile FIRST:LAST``: which steps are named, and that they are traced."""

import pytest

from kava_jax.errors import KavaError
from kava_jax.runs.profiling import first_and_last
from tests.tiny import kava, write_workspace


def test_the_steps_that_are_named():
    assert first_and_last(None, 4) is None
    assert first_and_last("2:3", 4) == (2, 3)
    assert first_and_last("4:9", 4) == (4, 9)  # a run that ends before traces what there is


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("3", "write FIRST:LAST"),
        ("0:2", "write FIRST:LAST"),
        ("3:2", "write FIRST:LAST"),
        ("ten", "write FIRST:LAST"),
        ("5:6", "begins after the last of train.steps=4"),
    ],
)
def test_other_words_are_refused(written, remedy):
    with pytest.raises(KavaError, match=rf"--profile={written}.*{remedy}"):
        first_and_last(written, 4)


@pytest.mark.long
def test_a_traced_run_leaves_a_trace_and_may_go_on_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(write_workspace(tmp_path))
    command = ("train", "tiny.yaml", "eval.max_new_tokens=0")
    ended = kava(capsys, *command, "train.steps=2", "--profile", "2:2")
    assert ended.code == 0, ended.err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert kava(capsys, *command, "train.steps=3").code == 0
