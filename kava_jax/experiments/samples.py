"""Questions with the answers that were generated for them, a few to read on a page.

Left out on purpose: scoring (``evaluation``), which was done when the answers were generated.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kava_jax.evaluation import exact_match
from kava_jax.experiments.outcome import Outcome, unpack
from kava_jax.runs.evaluate import MAIN_SET, read_answers
from kava_jax.runs.samples import Answered
from kava_jax.storage import Place

# So many right ones of a set, and so many wrong ones.
SHOWN = 2


class Answer(NamedTuple):
    """Whose answer it is, its text, and whether it is right by the strict rule."""

    by: str
    text: str
    right: bool


class Sample(NamedTuple):
    """One question, the wanted final answer, and what was generated."""

    question: str
    wanted: str
    answers: list[Answer]


class Samples(NamedTuple):
    """Samples of one set of questions, with a sentence on how they were chosen."""

    title: str
    samples: list[Sample]


def samples_of_run(run_dir: Place) -> list[Samples]:
    """The first right and the first wrong answers of every set; none without ``answers.jsonl``.

    Raises:
        KavaError: the file is not whole.
    """
    return [_of_set(name, rows) for name, rows in read_answers(run_dir).items()]


def samples_of_arms(runs: Mapping[str, Outcome]) -> list[Sample]:
    """The first questions of one seed, which all arms were asked, with the answer of every arm."""
    first, *_ = runs.values()
    marks = {arm: unpack(run.correct[MAIN_SET]) for arm, run in runs.items() if run.samples}
    return [
        Sample(
            asked["question"],
            asked["gold"],
            [
                Answer(arm, runs[arm].samples[place]["generated"].strip(), bool(right[place]))
                for arm, right in marks.items()
            ],
        )
        for place, asked in enumerate(first.samples)
    ]


def samples_of_everyone(answered: Sequence[Answered]) -> Samples:
    """The same questions answered before the run, after it, and by its teachers."""
    found = [
        Sample(
            own[0].question,
            own[0].gold,
            [
                Answer(who.by, one.generated.strip(), one.strict)
                for who, one in zip(answered, own, strict=True)
            ],
        )
        for own in zip(*(who.answers.samples for who in answered), strict=True)
    ]
    return Samples("The student before and after, and its teachers", found)


def _of_set(name: str, rows: Sequence[exact_match.Sample]) -> Samples:
    right, wrong = ([row for row in rows if row.strict is rule] for rule in (True, False))
    of = "held-out questions" if name == MAIN_SET else f"set {name}"
    found = [
        Sample(row.question, row.gold, [Answer("student", row.generated.strip(), row.strict)])
        for row in (*right[:SHOWN], *wrong[:SHOWN])
    ]
    return Samples(f"{of[0].upper()}{of[1:]}: {len(right)} of {len(rows)} right", found)
