import re
import subprocess
import sys

import pytest

from kava_jax.data.problems import MIXTURES, problem, word_problems
from kava_jax.errors import KavaError

LINE = re.compile(r"(\d+)([-+*/])(\d+)=<<(\d+[-+*/]\d+)=(\d+)>>(\d+)")


def calculation(answer):
    return re.sub(r"<<.*?>>", "", answer)


def test_every_line_is_true_and_the_last_result_is_the_answer():
    for split in ("train", "test"):
        for example in word_problems(split, seed=3, rows=1000):
            *lines, final = example.answer.split("\n")
            assert 2 <= len(lines) <= 3
            result = None
            for line in lines:
                match = LINE.fullmatch(line)
                assert match, line
                left, sign, right, noted, noted_result, shown = match.groups()
                assert noted == f"{left}{sign}{right}"
                assert eval(noted) == int(noted_result) == int(shown)
                assert all(1 <= int(number) <= 99 for number in (left, right, shown))
                assert result is None or int(left) == result  # a chain
                result = int(shown)
            assert final == f"#### {result}"


def test_the_numbers_of_the_question_are_the_numbers_of_the_lines():
    for example in word_problems("train", seed=0, rows=500):
        asked = [int(number) for number in re.findall(r"\d+", example.prompt)]
        used, result = [], None
        for left, right, shown in re.findall(r"(\d+)[-+*/](\d+)=<<.*>>(\d+)", example.answer):
            used += [int(right)] if result == int(left) else [int(left), int(right)]
            result = int(shown)
        assert asked == used
        assert 12 <= len(example.prompt.split()) <= 30


def test_train_and_test_share_no_calculation_whatever_the_seed():
    train = {calculation(e.answer) for e in word_problems("train", seed=0, rows=17_000)}
    test = {calculation(e.answer) for e in word_problems("test", seed=7, rows=3_000)}
    assert not train & test
    assert len(train) > 13_000
    assert len(test) > 1_800


def test_addressed_by_index_alone_and_the_same_in_another_process():
    rows = word_problems("train", seed=5, rows=5)
    assert rows == [problem("train", 5, i) for i in range(5)]
    assert problem("train", 5, 10**11) == problem("train", 5, 10**11)
    assert problem("train", 5, 10**12 - 1) not in [*rows, problem("train", 5, 10**11)]
    code = "from kava_jax.data.problems import problem; print(problem('test', 1, 2))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.strip() == str(problem("test", 1, 2))
    assert problem("test", 1, 2) != problem("test", 2, 2)


def test_known_problem():
    # Checked by hand, then pinned: a change of the generator silently ages every trained teacher.
    example = problem("train", 0, 0)
    assert example.prompt == (
        "Max has 42 marbles. Anna brings 4 more. He buys 13 more. He loses 5. "
        "How many marbles does Max have now?"
    )
    assert example.answer == (
        "42+4=<<42+4=46>>46\n46+13=<<46+13=59>>59\n59-5=<<59-5=54>>54\n#### 54"
    )


def numbers(example):
    return [int(number) for number in re.findall(r"\d+", calculation(example.answer))]


def test_mixtures_hold_what_their_names_say():
    rows = {name: word_problems("train", seed=0, rows=200, mixture=name) for name in MIXTURES}
    shares = {name: [("/" in calculation(e.answer)) for e in rows[name]] for name in rows}
    assert all(shares["shared"])
    assert not any(shares["unshared"])
    assert 20 < sum(shares["all"]) < 100
    assert {e.answer.count("\n") for e in rows["longer"]} == {4, 5}
    assert {e.answer.count("\n") for e in rows["all"]} == {2, 3}
    assert max(max(numbers(e)) for e in rows["all"]) <= 99
    assert 150 < max(max(numbers(e)) for e in rows["larger"]) <= 199
    for example in (e for examples in rows.values() for e in examples):
        lines = calculation(example.answer).split("\n")[:-1]
        assert all(eval(line.split("=")[0]) == int(line.split("=")[1]) for line in lines)


@pytest.mark.long
def test_dev_and_confirm_are_halves_of_test_without_a_common_calculation():
    halves = {
        name: {calculation(e.answer) for e in word_problems(name, seed=seed, rows=1500)}
        for seed, name in enumerate(("dev", "confirm"))
    }
    test = [calculation(e.answer) for e in word_problems("test", seed=9, rows=1500)]
    train = {calculation(e.answer) for e in word_problems("train", seed=0, rows=5000)}
    assert not halves["dev"] & halves["confirm"]
    assert not train & (halves["dev"] | halves["confirm"])
    # What test holds is in one of the halves: those it shares with neither were not drawn there.
    found = [sum(c in halves[name] for c in test) for name in ("dev", "confirm")]
    assert min(found) > 200


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: problem("validation", 0, 0), "split='validation'"),
        (lambda: problem("train", 0, -1), "index=-1"),
        (lambda: problem("train", 0, 0, "divided"), "builtin:word_problems/divided.*use one of"),
        (lambda: word_problems("train", 0, rows=0), "rows=0"),
    ],
)
def test_bad_input(call, named):
    with pytest.raises(KavaError, match=named):
        call()
