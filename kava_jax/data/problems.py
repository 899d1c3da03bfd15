"""Multi-step arithmetic word problems in GSM8K's format, generated: seeded and without end.

A problem is addressed by ``(split, seed, index)`` in constant time. Its *calculation* (the chain of
equations, names and objects left out) is hashed, and the hash decides the split, so no calculation
of the test split ever occurs in training, whatever the seeds and however many rows are drawn. The
test split falls into two halves that share no calculation either: ``dev`` for choices, ``confirm``
for what is measured once all choices are made.
Randomness is splitmix64 over a blake2b key: the same on every machine and Python version.

A *mixture* says which problems are drawn: all of them, some kinds (for a student that knows one
kind and is to learn another), or problems outside of what is trained on (longer, larger numbers).

Left out on purpose: fractions, money and units, distractor sentences. The
generator exists to train and measure tiny models within minutes. It does not replace GSM8K.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from kava_jax.data.example import Example
from kava_jax.errors import KavaError

SPLITS = ("train", "test", "dev", "confirm")

_TEST_SHARE = 8  # one calculation in eight belongs to the test split
_PEOPLE = ("Mia", "Tom", "Anna", "Ben", "Zoe", "Max", "Emma", "Jack", "Lucy", "Noah")
_WOMEN = ("Mia", "Anna", "Zoe", "Emma", "Lucy")
_THINGS = (
    "apples",
    "books",
    "coins",
    "cards",
    "pencils",
    "marbles",
    "stickers",
    "shells",
    "cookies",
    "flowers",
)
_CONTAINERS = ("boxes", "bags", "baskets", "jars")
_GAINS = ("{who} buys {n} more.", "{who} finds {n} more.", "{friend} brings {n} more.")
_LOSSES = ("{who} gives {n} to {friend}.", "{who} loses {n}.", "{who} sells {n}.")

Ending = Literal["plain", "shared", "compared"]
Item = TypeVar("Item")


class _Random:
    """splitmix64: 64 well-mixed bits a draw, and no state outside this object."""

    def __init__(self, key: str):
        self._state = _hash(key)

    def between(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        z = self._state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        # The high 64 bits of the product scale the draw to the range without floats. The
        # relative bias is below the range's size divided by 2**64.
        return low + (z * (high - low + 1) >> 64)

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.between(0, len(items) - 1)]


class Mixture(NamedTuple):
    """Which problems are drawn: equally often one of ``endings``, and numbers from these ranges."""

    endings: tuple[Ending, ...] = ("plain", "plain", "shared", "compared")
    steps: tuple[int, int] = (2, 3)
    start: tuple[int, int] = (5, 50)
    change: int = 20
    largest: int = 99


MIXTURES = {
    "all": Mixture(),
    "unshared": Mixture(endings=("plain", "plain", "compared")),
    "shared": Mixture(endings=("shared",)),
    "longer": Mixture(steps=(4, 5)),
    "larger": Mixture(start=(51, 99), change=40, largest=199),
}
"""By name, as in ``builtin:word_problems/shared``: everything that is trained on as a rule, all but
division, division only, more steps, larger numbers."""


def problem(split: str, seed: int, index: int, mixture: str = "all") -> Example:
    """The problem with this address: a question, and worked lines ending in ``#### 14``.

    Each line is one equation with GSM8K's calculator note, ``12+7=<<12+7=19>>19``. All numbers are
    from 1 to 99 (199 in the mixture ``larger``) and every division is exact.

    Args:
        split: ``"train"``, ``"test"`` or a half of test, ``"dev"`` or ``"confirm"``; calculations
            of train and test, and of the halves, are disjoint for all seeds and mixtures.
        seed: picks the sequence of problems.
        index: place in that sequence, 0 or more, without upper limit.
        mixture: which problems; one of ``MIXTURES``.

    Raises:
        KavaError: split or mixture is unknown, or the index is negative.
    """
    if split not in SPLITS:
        raise KavaError(
            f"split={split!r} is not one of builtin:word_problems; use {', '.join(SPLITS)}"
        )
    if mixture not in MIXTURES:
        raise KavaError(
            f"data.path='builtin:word_problems/{mixture}' names no mixture; use one of "
            f"{', '.join(MIXTURES)}"
        )
    if index < 0:
        raise KavaError(f"index={index} of a generated problem is negative; count from 0")
    random = _Random(f"{split}:{seed}:{index}")
    # Problems of the other split are drawn again from the same key. So a problem is found without a
    # look at any other index.
    while True:  # on average about 2 draws for train, 12 for test
        drawn = _draw(random, MIXTURES[mixture])
        if drawn is not None and split in _splits_of(drawn[1]):
            return Example(drawn[0], _worked(drawn[1]))


def word_problems(split: str, seed: int, rows: int, mixture: str = "all") -> list[Example]:
    """The first ``rows`` problems of ``(split, seed)``.

    Raises:
        KavaError: ``rows`` is not positive, or as in :func:`problem`.
    """
    if rows < 1:
        raise KavaError(f"rows={rows} of builtin:word_problems is not positive; ask for 1 or more")
    return [problem(split, seed, index, mixture) for index in range(rows)]


def _hash(text: str) -> int:
    # Python's own hash of a text differs between processes.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _splits_of(equations: Sequence[str]) -> tuple[str, ...]:
    number = _hash(";".join(equations))
    if number % _TEST_SHARE:
        return ("train",)
    # Other bits of the hash decide the half, because those below are zero for all of test.
    return "test", "confirm" if number // _TEST_SHARE % 2 else "dev"


def _worked(equations: Sequence[str]) -> str:
    """``12+7=19`` as a line ``12+7=<<12+7=19>>19``, and the last result behind ``####``."""
    pairs = [equation.split("=") for equation in equations]
    lines = [f"{left}=<<{left}={result}>>{result}" for left, result in pairs]
    return "\n".join([*lines, f"#### {pairs[-1][1]}"])


def _draw(random: _Random, mixture: Mixture) -> tuple[str, list[str]] | None:
    """One question and its equations, or None when the numbers leave the last step impossible."""
    count = random.between(*mixture.steps)
    owner = random.choice(_PEOPLE)
    friend = random.choice([name for name in _PEOPLE if name != owner])
    other = random.choice([name for name in _PEOPLE if name not in (owner, friend)])
    thing, container = random.choice(_THINGS), random.choice(_CONTAINERS)
    words = {"owner": owner, "who": "She" if owner in _WOMEN else "He", "friend": friend}
    words |= {"other": other, "thing": thing}
    equations = []
    if random.between(1, 3) == 1:
        boxes, each = random.between(2, 9), random.between(2, 9)
        value = boxes * each
        sentences = [f"{owner} has {boxes} {container} of {each} {thing}."]
        equations.append(f"{boxes}*{each}={value}")
    else:
        value = random.between(*mixture.start)
        sentences = [f"{owner} has {value} {thing}."]
    ending = random.choice(mixture.endings)
    middle = count - len(equations) - (ending != "plain")
    if middle < 0:
        return None
    for _ in range(middle):
        sentence, equation, value = _change(random, words, value, mixture)
        sentences.append(sentence)
        equations.append(equation)
    last = _end(random, ending, value, mixture.largest)
    if last is None:
        return None
    question, equation = last
    equations += [equation] if equation else []
    return " ".join([*sentences, question.format(**words)]), equations


def _change(
    random: _Random, words: Mapping[str, str], value: int, mixture: Mixture
) -> tuple[str, str, int]:
    """Something is gained or lost: the sentence, its equation and what there is after it."""
    # At least 2 change and at least 1 remains, so no problem reaches zero or a negative number.
    can_gain, can_lose = value + 2 <= mixture.largest, value > 2
    gain = can_gain and (not can_lose or random.between(0, 1) == 1)
    n = random.between(2, min(mixture.change, mixture.largest - value if gain else value - 1))
    result = value + n if gain else value - n
    sentence = random.choice(_GAINS if gain else _LOSSES).format(n=n, **words)
    return sentence, f"{value}{'+' if gain else '-'}{n}={result}", result


def _end(
    random: _Random, ending: Ending, value: int, largest: int
) -> tuple[str, str | None] | None:
    """The question, with words to fill in, and its equation; None when the numbers do not allow it.

    The plain question has no equation of its own: what is asked for is the last result.
    """
    if ending == "plain":
        return "How many {thing} does {owner} have now?", None
    if ending == "shared":
        parts = [k for k in range(2, 10) if value % k == 0]
        if not parts:
            return None
        k = random.choice(parts)
        shared = f"{{who}} shares them equally among {k} friends. "
        return shared + "How many {thing} does each friend get?", f"{value}/{k}={value // k}"
    most = min(5, largest // value)
    if most < 2:
        return None
    k = random.between(2, most)
    compared = f"{{other}} has {k} times as many. "
    return compared + "How many {thing} does {other} have?", f"{value}*{k}={value * k}"
