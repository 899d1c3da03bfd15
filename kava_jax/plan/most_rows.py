"""The largest batch that fits: searched for with a compiler that takes a minute a try."""

from collections.abc import Callable
from typing import Any, NamedTuple

# So many times the line is believed.
LINES = 4


class Tried(NamedTuple):
    """A batch of so many rows, and the bytes of one device that its program needs."""

    rows: int
    arguments: int
    temporaries: int

    @property
    def needed(self) -> int:
        """Both together."""
        return self.arguments + self.temporaries


class Boundary(NamedTuple):
    """The largest batch that fits into a limit, and the next one, which does not.

    ``fits`` is None where not even the smallest batch fits.
    """

    fraction: float
    """Of the device's bytes, that JAX may use."""
    limit: float
    """In bytes."""
    fits: Tried | None
    beyond: Tried

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        fits = self.fits._asdict() if self.fits else None
        return self._asdict() | {"fits": fits, "beyond": self.beyond._asdict()}


class RowSearch:
    """Tries batches of multiples of ``unit`` rows, each once."""

    def __init__(self, attempt: Callable[[int], Tried], unit: int, first: Tried):
        """``attempt(rows)`` compiles; ``first`` has been tried already."""
        self._attempt, self._unit = attempt, unit
        self._tried = [first]

    def boundary(self, fraction: float, device_bytes: int) -> Boundary:
        """The last batch of at most ``fraction * device_bytes``, and the one after it.

        Memory is nearly a line over the rows, so a line through two tries says what to try
        next; where that does not end soon, the gap is halved.
        """
        limit, unit = fraction * device_bytes, self._unit
        turn = 0
        while True:
            above = [one for one in self._tried if one.needed > limit]
            beyond = min(above, default=None)
            below = [one for one in self._tried if one.needed <= limit]
            fits = max((one for one in below if beyond is None or one < beyond), default=None)
            low = fits.rows if fits else 0
            if beyond and beyond.rows - low <= unit:
                return Boundary(fraction, limit, fits, beyond)
            if beyond and turn >= LINES:
                guess = (low + beyond.rows) // 2
            else:
                guess = self._on_the_line(limit)
            guess = max(guess // unit * unit, low + unit)
            self._tried.append(self._attempt(min(guess, beyond.rows - unit) if beyond else guess))
            turn += 1

    def _on_the_line(self, limit: float) -> int:
        """The most rows that a line lets in: through the try nearest to the limit and the farthest.

        Far apart, so that a bump of the compiler's (one more row can need less) tilts it little.
        """
        near, *_, far = sorted(
            [*self._tried, *self._tried[:1]], key=lambda x: abs(x.needed - limit)
        )
        of_row = (near.needed - far.needed) / (near.rows - far.rows) if near.rows != far.rows else 0
        if of_row <= 0:  # there is no line yet
            return near.rows // 2 if near.needed > limit else 2 * near.rows
        return int(near.rows + (limit - near.needed) // of_row)
