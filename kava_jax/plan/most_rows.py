"""The largest batch that fits: searched for with a compiler that takes a minute a try."""

from collections.abc import Callable
from dataclasses import dataclass

# How many guesses are taken from the line before the gap is halved.
LINES = 4


@dataclass(frozen=True, order=True)
class Tried:
    """A batch that was compiled, and the bytes of one device that its program needs."""

    rows: int
    arguments: int
    temporaries: int

    @property
    def needed(self) -> int:
        """Both together."""
        return self.arguments + self.temporaries


@dataclass(frozen=True)
class Boundary:
    """The largest batch that fits into a limit, and the next one, which does not.

    ``fits`` is None where not even the smallest batch fits.
    """

    fraction: float
    """Of the device's bytes, that JAX may use."""
    limit: float
    """In bytes."""
    fits: Tried | None
    beyond: Tried


def find_boundary(
    attempt: Callable[[int], Tried],
    unit: int,
    tried: list[Tried],
    fraction: float,
    device_bytes: int,
) -> Boundary:
    """The last batch of at most ``fraction * device_bytes``, and the one after it.

    ``attempt(rows)`` compiles. Batches are multiples of ``unit`` rows; ``tried`` are those that
    were compiled before, at least one, and gets the others, so that none is compiled twice.

    Memory is nearly a line over the rows, so a line through two tries says what to try next; where
    that does not end soon, the gap is halved.
    """
    limit = fraction * device_bytes
    turn = 0
    while True:
        beyond = min((one for one in tried if one.needed > limit), default=None)
        # One more row can need less memory, so what fits above the first failure does not count.
        below = [one for one in tried if one.needed <= limit]
        fits = max((one for one in below if beyond is None or one < beyond), default=None)
        low = fits.rows if fits else 0
        if beyond and beyond.rows - low <= unit:
            return Boundary(fraction, limit, fits, beyond)
        guess = (low + beyond.rows) // 2 if beyond and turn >= LINES else _on_the_line(tried, limit)
        # Strictly between what fits and what does not: every turn narrows the gap, however
        # wrong the line is.
        guess = max(guess // unit * unit, low + unit)
        tried.append(attempt(min(guess, beyond.rows - unit) if beyond else guess))
        turn += 1


def _on_the_line(tried: list[Tried], limit: float) -> int:
    """The most rows that a line lets in: through the try nearest to the limit and the farthest.

    Far apart, so that a bump of the compiler's (one more row can need less) tilts it little.
    """
    near, *_, far = sorted([*tried, *tried[:1]], key=lambda one: abs(one.needed - limit))
    of_row = (near.needed - far.needed) / (near.rows - far.rows) if near.rows != far.rows else 0
    if of_row <= 0:  # there is no line yet
        return near.rows // 2 if near.needed > limit else 2 * near.rows
    return int(near.rows + (limit - near.needed) // of_row)
