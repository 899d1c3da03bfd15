"""One row of training or evaluation text, whatever it was read from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Message = Mapping[str, Any]


class Example(NamedTuple):
    """A prompt and its answer, a whole conversation, or (with an empty prompt) a plain document.

    ``messages`` is set for conversations only; ``prompt`` and ``answer`` are then empty. A message
    is what a chat template reads: ``role``, ``content`` and whatever else its author gave
    (``tool_calls``, ``reasoning_content``, ...). ``tools`` are the functions that the conversation
    may call, as JSON schemas. A plain document is an ``answer`` without a ``prompt``.
    """

    prompt: str
    answer: str
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None

    @property
    def question(self) -> str:
        """What is answered: the prompt, or what the user said last."""
        said = [one for one in self.messages or () if one["role"] == "user"]
        return said[-1].get("content", "") if said else self.prompt

    @property
    def reply(self) -> str:
        """The answer, or the last reply of a conversation; empty where it is a tool call alone."""
        return self.answer if self.messages is None else self.messages[-1].get("content", "")
