"""Questions with the answers that were generated for them, a few to read on a page.

Left out on purpose: scoring (``evaluation``), which was done when the answers were generated.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kava_jax.errors import KavaError
from kava_jax.experiments.outcome import Outcome, unpack
from kava_jax.runs.evaluate import ANSWERS_NAME, MAIN_SET
from kava_jax.runs.samples import Answered

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


def samples_of_run(run_dir: Path) -> list[Samples]:
    """The first right and the first wrong answers of every set; none without ``answers.jsonl``.

    Raises:
        KavaError: the file is not whole.
    """
    path = run_dir / ANSWERS_NAME
    if not path.is_file():
        return []
    sets: dict[str, list[dict[str, Any]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            sets.setdefault(row["set"], []).append(row)
        return [_of_set(name, rows) for name, rows in sets.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise KavaError(
            f"answers={str(path)!r} cannot be read ({type(error).__name__}); remove it, or let the "
            f"run evaluate again with `kava train`"
        ) from None


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
    first = answered[0].answers.samples
    found = [
        Sample(
            asked.question,
            asked.gold,
            [
                Answer(who.by, own.generated.strip(), own.strict)
                for who in answered
                for own in who.answers.samples[place : place + 1]
            ],
        )
        for place, asked in enumerate(first)
    ]
    return Samples("The student before and after, and its teachers", found)


def _of_set(name: str, rows: list[dict[str, Any]]) -> Samples:
    right, wrong = ([row for row in rows if bool(row["strict"]) is rule] for rule in (True, False))
    of = "held-out questions" if name == MAIN_SET else f"set {name}"
    found = [
        Sample(
            row["question"],
            row["gold"],
            [Answer("student", row["generated"].strip(), row["strict"])],
        )
        for row in (*right[:SHOWN], *wrong[:SHOWN])
    ]
    return Samples(f"{of[0].upper()}{of[1:]}: {len(right)} of {len(rows)} right", found)
