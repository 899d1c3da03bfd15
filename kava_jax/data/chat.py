"""Conversations as a tokenizer's chat template writes them, in pieces: read, trained on, read, ...

A template that writes today's date would write other rows tomorrow, so its date is a given one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from kava_jax.data.example import Example, Message
from kava_jax.errors import KavaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["last", "assistant"]

_NOW = re.compile(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)")


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        train_on: the last reply, or every reply of the assistant.
        today: what the template takes for the current date.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", train_on: TrainOn, today: date):
        self._tokenizer, self._train_on, self._today = tokenizer, train_on, today
        self._pinned = {False: self._template(with_tools=False)}

    def pieces(self, example: Example) -> list[str]:
        """The conversation in pieces, by turns read and trained on; it begins with the former.

        A reply with ``weight`` 0 is read. What follows the end token of a reply (a newline,
        usually) is never generated, so not trained on.

        Raises:
            KavaError: the template refuses the conversation, or a reply cannot be told apart in
                what it writes.
        """
        messages = example.messages or (
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": example.answer},
        )
        if messages[-1]["role"] != "assistant":
            raise KavaError("a conversation does not end with the assistant's reply; drop the rest")
        messages = self._arguments_as_wanted(messages, example.tools)
        whole = self._render(messages, example.tools)
        trained = [len(messages) - 1]
        if self._train_on == "assistant":
            trained = [
                place
                for place, message in enumerate(messages)
                # An opening reply answers nothing.
                if message["role"] == "assistant" and place > 0 and message.get("weight") != 0
            ]
        pieces, done = [], 0
        for place in trained:
            prompt = self._render(messages[:place], example.tools, add_generation_prompt=True)
            if place == len(messages) - 1 and prompt.startswith(whole[:done]):
                thought = _after_opened_thoughts(prompt, whole, messages[-1].get("content") or "")
                if thought is not None:
                    return [*pieces, prompt[done:], thought]
            start, end = self._reply(messages, example.tools, place, prompt, whole)
            pieces += [whole[done:start], whole[start:end]]
            done = end
        return pieces

    def _reply(
        self, messages: Sequence[Message], tools: Any, place: int, prompt: str, whole: str
    ) -> tuple[int, int]:
        """Where the reply at this place of the conversation begins and ends in the whole text."""
        last = place == len(messages) - 1
        if not whole.startswith(prompt):
            raise KavaError(
                "the tokenizer's chat template writes a conversation that does not begin with its "
                "own generation prompt, so the reply cannot be told apart; use "
                + ("data.format=template" if last else "data.train_on=last")
            )
        until = (whole if last else self._render(messages[: place + 1], tools)).rstrip()
        if whole.startswith(until):
            return len(prompt), len(until)
        # Templates that drop the reasoning of earlier turns write this reply otherwise when it is
        # the last one; its end token is still its end.
        end = str(self._tokenizer.eos_token)
        found = whole.find(end, len(prompt))
        if found < 0:
            raise KavaError(
                "the tokenizer's chat template writes no end token after each reply, so earlier "
                "replies cannot be told apart; use data.train_on=last"
            )
        return len(prompt), found + len(end)

    def _render(self, messages: Sequence[Message], tools: Any, **options: Any) -> str:
        with_tools = tools is not None
        if with_tools not in self._pinned:
            self._pinned[with_tools] = self._template(with_tools)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=None if tools is None else [dict(tool) for tool in tools],
                    chat_template=self._pinned[with_tools],
                    tokenize=False,
                    **options,
                )
            )
        except Exception as error:  # templates raise what they like (jinja2, their own refusals)
            raise KavaError(
                f"the tokenizer's chat template refuses a conversation with roles "
                f"{', '.join(message['role'] for message in messages)} "
                f"({' '.join(str(error).split())}); reorder or rename the roles"
            ) from error

    def _template(self, with_tools: bool) -> str:
        """The template's text with the date written into it."""
        text = self._tokenizer.get_chat_template(tools=[] if with_tools else None)

        def written(match: re.Match[str]) -> str:
            return json.dumps(self._today.strftime(match[1] or match[2] or ""))

        pinned = _NOW.sub(written, text)
        if re.search(r"strftime_now\s*\(", pinned):
            raise KavaError(
                "the tokenizer's chat template asks for today's date in a format that it computes, "
                "so rows would change from day to day; write the format into its strftime_now(...)"
            )
        return pinned

    def _arguments_as_wanted(self, messages: Sequence[Message], tools: Any) -> Sequence[Message]:
        """The messages with arguments of tool calls as objects, if the template wants objects.

        In the form of the OpenAI API they are JSON text. Some templates write them as they are,
        most expect objects and would write the text as a quoted string.
        """
        texts = [text for message in messages for text in _argument_texts(message)]
        if not texts:
            return messages
        whole = self._render(messages, tools)
        if not any(json.dumps(text, ensure_ascii=False) in whole for text in texts):
            return messages
        return [_with_objects(message) for message in messages]


def _after_opened_thoughts(prompt: str, whole: str, reply: str) -> str | None:
    """The reply after a generation prompt that ends in an opened thinking block.

    The templates of thinking models open ``<think>`` for generation and write a finished reply
    without its thoughts. Here the reply's own thoughts stand in the block; a reply without any
    closes it at once, which is how these models write thoughts that they skip. None where the
    template has no such block, or writes it both times.
    """
    opened = re.search(r"<think>\s*\Z", prompt)
    if opened is None or whole.startswith(prompt) or not whole.startswith(prompt[: opened.start()]):
        return None
    shown = whole[opened.start() :].strip()
    if shown.startswith("<think>"):
        return shown.removeprefix("<think>").lstrip()
    thoughts, _, _ = reply.rpartition("</think>")
    thoughts = thoughts.rpartition("<think>")[2].strip()
    return f"{thoughts}\n</think>\n\n{shown}"


def _calls(message: Message) -> list[Any]:
    """The functions that a message calls, inside of ``function`` or bare."""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    return [call.get("function", call) for call in calls]


def _argument_texts(message: Message) -> list[str]:
    found = [call.get("arguments") for call in _calls(message) if isinstance(call, Mapping)]
    return [text for text in found if isinstance(text, str)]


def _with_objects(message: Message) -> Message:
    if not _argument_texts(message):
        return message
    copy = json.loads(json.dumps(message))
    for call in _calls(copy):
        if isinstance(call.get("arguments"), str):
            try:
                call["arguments"] = json.loads(call["arguments"])
            except ValueError:
                raise KavaError(
                    f"a tool call's arguments {call['arguments'][:40]!r} are not JSON, and the "
                    "tokenizer's chat template wants an object; correct them"
                ) from None
    return copy
