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
generator exists to train and measure tiny models within minutes, not to stand in for GSM8K.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, overload

from kava_jax.data.example import Example
from kava_jax.errors import KavaError

SPLITS = ("train", "test", "dev", "confirm")

_TEST_SHARE = 8  # one calculation in eight belongs to the test split
_PEOPLE = (
    ("Mia", "She"),
    ("Tom", "He"),
    ("Anna", "She"),
    ("Ben", "He"),
    ("Zoe", "She"),
    ("Max", "He"),
    ("Emma", "She"),
    ("Jack", "He"),
    ("Lucy", "She"),
    ("Noah", "He"),
)
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
_GAINS = (
    "{who} buys {n} more.",
    "{who} finds {n} more.",
    "{friend} brings {n} more.",
)
_LOSSES = (
    "{who} gives {n} to {friend}.",
    "{who} loses {n}.",
    "{who} sells {n}.",
)

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
        return low + (z * (high - low + 1) >> 64)

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.between(0, len(items) - 1)]


class _Equation(NamedTuple):
    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}={self.result}"


class _Cast(NamedTuple):
    owner: str
    who: str
    friend: str
    other: str
    thing: str
    container: str


class _Story(NamedTuple):
    sentences: list[str]
    equations: list[_Equation]


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
    drawn_from = _mixture(split, mixture)
    if index < 0:
        raise KavaError(f"index={index} of a generated problem is negative; count from 0")
    random = _Random(f"{split}:{seed}:{index}")
    while True:  # on average about 2 draws for train, 12 for test
        drawn = _draw(random, drawn_from)
        if drawn is not None and split in _splits_of(drawn[1]):
            return Example(drawn[0], _worked(drawn[1]))


class WordProblems(Sequence[Example]):
    """The first ``rows`` problems of ``(split, seed)`` as a sequence; nothing is kept in memory.

    Raises:
        KavaError: ``rows`` is not positive, or as in :func:`problem`.
    """

    def __init__(self, split: str, seed: int, rows: int, mixture: str = "all"):
        _mixture(split, mixture)
        if rows < 1:
            raise KavaError(
                f"rows={rows} of builtin:word_problems is not positive; ask for 1 or more"
            )
        self.split, self.seed, self.rows, self.mixture = split, seed, rows, mixture

    def __len__(self) -> int:
        return self.rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """The problem at this place (negative counts from the end), or a list for a slice."""
        place = range(self.rows)[index]
        if isinstance(place, range):
            return [problem(self.split, self.seed, i, self.mixture) for i in place]
        return problem(self.split, self.seed, place, self.mixture)


def _mixture(split: str, name: str) -> "Mixture":
    if split not in SPLITS:
        raise KavaError(
            f"split={split!r} is not one of builtin:word_problems; use {', '.join(SPLITS)}"
        )
    if name not in MIXTURES:
        raise KavaError(
            f"data.path='builtin:word_problems/{name}' names no mixture; use one of "
            f"{', '.join(MIXTURES)}"
        )
    return MIXTURES[name]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _splits_of(equations: list[_Equation]) -> tuple[str, ...]:
    number = _hash(";".join(map(str, equations)))
    if number % _TEST_SHARE:
        return ("train",)
    return "test", "confirm" if number // _TEST_SHARE % 2 else "dev"


def _worked(equations: list[_Equation]) -> str:
    lines = [f"{e.left}{e.sign}{e.right}=<<{e}>>{e.result}" for e in equations]
    return "\n".join([*lines, f"#### {equations[-1].result}"])


def _draw(random: _Random, mixture: "Mixture") -> tuple[str, list[_Equation]] | None:
    """One question and its equations, or None when the numbers leave the last step impossible."""
    count = random.between(*mixture.steps)
    owner, who = random.choice(_PEOPLE)
    friend = random.choice([name for name, _ in _PEOPLE if name != owner])
    other = random.choice([name for name, _ in _PEOPLE if name not in (owner, friend)])
    cast = _Cast(owner, who, friend, other, random.choice(_THINGS), random.choice(_CONTAINERS))

    story = _Story([], [])
    if random.between(1, 3) == 1:
        value = _open_with_containers(random, cast, story)
    else:
        value = random.between(*mixture.start)
        story.sentences.append(f"{owner} has {value} {cast.thing}.")
    ending = random.choice(mixture.endings)
    middle = count - len(story.equations) - (ending is not _end_plainly)
    if middle < 0:
        return None
    for _ in range(middle):
        value = _change(random, cast, value, story, mixture)
    if not ending(random, cast, value, story, mixture):
        return None
    return " ".join(story.sentences), story.equations


def _open_with_containers(random: _Random, cast: _Cast, story: _Story) -> int:
    boxes, each = random.between(2, 9), random.between(2, 9)
    story.sentences.append(f"{cast.owner} has {boxes} {cast.container} of {each} {cast.thing}.")
    story.equations.append(_Equation(boxes, "*", each, boxes * each))
    return boxes * each


def _change(random: _Random, cast: _Cast, value: int, story: _Story, mixture: "Mixture") -> int:
    can_gain, can_lose = value + 2 <= mixture.largest, value > 2
    gain = can_gain and (not can_lose or random.between(0, 1) == 1)
    n = random.between(2, min(mixture.change, mixture.largest - value if gain else value - 1))
    result = value + n if gain else value - n
    text = random.choice(_GAINS if gain else _LOSSES)
    story.sentences.append(text.format(who=cast.who, friend=cast.friend, n=n))
    story.equations.append(_Equation(value, "+" if gain else "-", n, result))
    return result


def _end_plainly(
    random: _Random, cast: _Cast, value: int, story: _Story, mixture: "Mixture"
) -> bool:
    story.sentences.append(f"How many {cast.thing} does {cast.owner} have now?")
    return bool(story.equations)


def _end_by_sharing(
    random: _Random, cast: _Cast, value: int, story: _Story, mixture: "Mixture"
) -> bool:
    parts = [k for k in range(2, 10) if value % k == 0]
    if not parts:
        return False
    k = random.choice(parts)
    story.sentences.append(f"{cast.who} shares them equally among {k} friends.")
    story.sentences.append(f"How many {cast.thing} does each friend get?")
    story.equations.append(_Equation(value, "/", k, value // k))
    return True


def _end_by_comparing(
    random: _Random, cast: _Cast, value: int, story: _Story, mixture: "Mixture"
) -> bool:
    most = min(5, mixture.largest // value)
    if most < 2:
        return False
    k = random.between(2, most)
    story.sentences.append(f"{cast.other} has {k} times as many.")
    story.sentences.append(f"How many {cast.thing} does {cast.other} have?")
    story.equations.append(_Equation(value, "*", k, value * k))
    return True


class Mixture(NamedTuple):
    """Which problems are drawn: equally often one of ``endings``, and numbers from these ranges."""

    endings: tuple[Callable[[_Random, _Cast, int, _Story, "Mixture"], bool], ...] = (
        _end_plainly,
        _end_plainly,
        _end_by_sharing,
        _end_by_comparing,
    )
    steps: tuple[int, int] = (2, 3)
    start: tuple[int, int] = (5, 50)
    change: int = 20
    largest: int = 99


MIXTURES = {
    "all": Mixture(),
    "unshared": Mixture(endings=(_end_plainly, _end_plainly, _end_by_comparing)),
    "shared": Mixture(endings=(_end_by_sharing,)),
    "longer": Mixture(steps=(4, 5)),
    "larger": Mixture(start=(51, 99), change=40, largest=199),
}
"""By name, as in ``builtin:word_problems/shared``: everything that is trained on as a rule, all but
division, division only, more steps, larger numbers."""
