"""One row of training or evaluation text, whatever it was read from."""

from typing import NamedTuple


class Example(NamedTuple):
    """A prompt and its answer, a whole conversation, or (with an empty prompt) a plain document.

    ``messages`` holds ``(role, content)`` pairs and is set for conversations only; ``prompt`` and
    ``answer`` are then empty. A plain document is an ``answer`` without a ``prompt``.
    """

    prompt: str
    answer: str
    messages: tuple[tuple[str, str], ...] | None = None
