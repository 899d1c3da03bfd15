"""Answers before, after and the teacher's, against `kava eval`'s own figures on the same rows."""

import json
from pathlib import Path

import pytest

from kava_jax.errors import KavaError
from kava_jax.runs.assess import answer_all
from tests.tiny import kava, write_config, write_workspace


@pytest.mark.long
def test_everyone_answers_the_same_questions_each_with_its_own_weights(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(write_workspace(tmp_path))
    # A rate that leaves nothing as it was.
    write_config(Path("tiny.yaml"), optimizer={"student_lr": 0.5, "min_lr_ratio": 1.0})
    assert kava(capsys, "train", "tiny.yaml").code == 0
    found = answer_all(Path("run"), 3)
    assert list(found) == ["student before", "student after", "big"]
    questions = [[sample.question for sample in who.samples] for who in found.values()]
    assert questions[0] == questions[1] == questions[2]
    before, after, teacher = (
        [sample.generated for sample in who.samples] for who in found.values()
    )
    assert len({tuple(before), tuple(after), tuple(teacher)}) == 3
    assert kava(capsys, "report", "run", "--samples", "2").code == 0
    page = Path("run/report.html").read_text()
    assert "The student before and after, and its teachers" in page
    assert page.count("student after") == 2  # the title has the other one once more
    lines = Path("run/answers.jsonl").read_text().splitlines()[:3]
    assert after == [json.loads(line)["generated"] for line in lines]


@pytest.mark.parametrize("count", [0, -1])
def test_there_must_be_a_question(count, tmp_path) -> None:
    with pytest.raises(KavaError, match=f"samples={count} is not positive"):
        answer_all(tmp_path, count)
