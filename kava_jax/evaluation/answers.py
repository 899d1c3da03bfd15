"""Pulling the final number out of worked text, by the rules of lm-evaluation-harness ``gsm8k`` v3.

Figures are comparable with published ones only if the rules are the same ones, oddities included:
the flexible rule takes any run of two or more of ``$0-9.,``, so ``...`` at the end of a sentence
counts as a number, and answers are compared as text, so ``18.0`` is not ``18``. Do not mend them
here. Left out on purpose: every other benchmark's rules.
"""

import re

INVALID = "[invalid]"

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
# What the harness ignores in both texts, in its order.
_IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))


def strict_answer(text: str) -> str:
    """The number after the *first* ``#### `` that one follows, else ``[invalid]``."""
    match = _STRICT.search(text)
    return match.group(1) if match else INVALID


def flexible_answer(text: str) -> str:
    """The *last* thing that looks like a number, wherever it is, else ``[invalid]``."""
    matches = _FLEXIBLE.findall(text)
    return next(group for group in matches[-1] if group) if matches else INVALID


def gold_answer(answer: str) -> str:
    """A data set's answer (worked lines, then ``#### 14``) as it is compared."""
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()


def can_be_met(answer: str) -> bool:
    """Whether a copy of the answer, word for word, counts as right by the strict rule.

    Not so for ``#### 18%``, ``#### 12 apples``, ``#### 1/2``, or two ``#### `` in one answer.
    """
    return same(strict_answer(answer), answer)


def same(prediction: str, gold: str) -> bool:
    """Equal as text, ignoring ``,`` and ``$``, all up to ``#### ``, a final ``.``, and case."""
    return gold_answer(prediction) == gold_answer(gold)
