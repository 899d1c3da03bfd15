import pytest

from kava_jax.data.sources import load_examples
from kava_jax.evaluation.answers import (
    INVALID,
    flexible_answer,
    gold_answer,
    same,
    strict_answer,
)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("12+7=<<12+7=19>>19\n#### 19", "19", "19"),
        ("#### 1,234", "1,234", "1,234"),
        ("#### -5", "-5", "-5"),
        ("#### 18.", "18.", "18."),
        ("#### 3\n#### 4", "3", "4"),  # strict takes the first, flexible the last
        ("####19", INVALID, "19"),  # strict wants the blank
        ("#### $19", INVALID, "$19"),  # and knows no dollar
        ("#### x\n#### 7", "7", "7"),
        ("The answer is 7 or 8", INVALID, "8"),
        ("He pays $1,200.50 a year", INVALID, "$1,200.50"),
        ("It is -42", INVALID, "-42"),
        ("It is 5.", INVALID, "5."),
        ("It is 5 ...", INVALID, "..."),  # the harness's own oddity
        ("no number", INVALID, INVALID),
        ("", INVALID, INVALID),
    ],
)
def test_rules_by_hand(text, strict, flexible):
    assert strict_answer(text) == strict
    assert flexible_answer(text) == flexible


@pytest.mark.parametrize(
    ("prediction", "gold", "equal"),
    [
        ("19", "12+7=<<12+7=19>>19\n#### 19", True),
        ("$1,234", "#### 1234", True),
        ("18.", "#### 18", True),
        ("18.0", "#### 18", False),  # compared as text
        ("-18", "#### 18", False),
        ("A", "a", True),
        (INVALID, "#### 18", False),
        ("8", "#### 18", False),
    ],
)
def test_comparison_by_hand(prediction, gold, equal):
    assert same(prediction, gold) is equal
    assert same(prediction, gold_answer(gold)) is equal


def test_every_gold_answer_of_gsm8k(shared):
    rows = load_examples(shared / "data/gsm8k/test.jsonl")
    assert len(rows) == 1319
    for row in rows:
        number = row.answer.rsplit("#### ", 1)[1].replace(",", "")  # independent of the rules
        int(number)
        assert gold_answer(row.answer) == number
        for rule in (strict_answer, flexible_answer):
            assert same(rule(row.answer), row.answer)
            assert rule(row.answer).replace(",", "") == number
