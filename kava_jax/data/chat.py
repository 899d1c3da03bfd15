"""Conversations as a tokenizer's chat template writes them, cut where training begins and ends.

A template may write the current date. It is given the date of the run instead, because rows would
otherwise change from day to day.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Literal

from kava_jax.data.example import Example, Message
from kava_jax.errors import KavaError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["last", "assistant"]
Render = Callable[..., str]

# transformers gives templates a strftime_now() that reads the clock. Only a call with a literal
# format can be replaced in the text.
_NOW = re.compile(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)")


def chat_pieces(
    tokenizer: "PreTrainedTokenizerBase", example: Example, *, train_on: TrainOn, today: date
) -> list[str]:
    """The conversation in pieces: read, trained on, read, trained on, and so forth.

    A reply with ``weight`` 0 is read. What follows the end token of a reply (a newline, usually) is
    never generated, so not trained on.

    Args:
        tokenizer: has a chat template.
        example: a conversation that ends with a reply, or a prompt and its answer.
        train_on: the last reply, or every reply of the assistant.
        today: what the template takes for the current date.

    Raises:
        KavaError: the template refuses the conversation, or a reply cannot be found in what it
            writes.
    """
    messages = example.messages or (
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.answer},
    )
    render = functools.partial(_render, tokenizer, example.tools, today)
    messages = _arguments_as_wanted(messages, render)
    whole = render(messages)
    trained = [
        place
        for place, message in enumerate(messages)
        # An opening reply answers nothing.
        if message["role"] == "assistant" and place > 0 and message.get("weight") != 0
    ]
    if train_on == "last":
        trained = [len(messages) - 1]
    pieces, done = [], 0
    for place in trained:
        # A reply begins where the generation prompt ends. So training reads exactly the text that
        # generation starts from.
        prompt = render(messages[:place], add_generation_prompt=True)
        last = place == len(messages) - 1
        if last and prompt.startswith(whole[:done]):
            thought = _after_opened_thoughts(prompt, whole, messages[-1].get("content") or "")
            if thought is not None:
                return [*pieces, prompt[done:], thought]
        if not whole.startswith(prompt):
            raise KavaError(
                "the tokenizer's chat template writes a conversation that does not begin with its "
                "own generation prompt, so the reply cannot be told apart; use "
                + ("a data.format with {prompt} and {answer}" if last else "data.train_on=last")
            )
        until = (whole if last else render(messages[: place + 1])).rstrip()
        end = len(until)
        if not whole.startswith(until):
            # Templates that drop the reasoning of earlier turns write this reply differently when
            # it is the last one, but it still ends with its end token.
            end = _after_end_token(whole, len(prompt), str(tokenizer.eos_token))
        pieces += [whole[done : len(prompt)], whole[len(prompt) : end]]
        done = end
    return pieces


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Mapping[str, Any]] | None,
    today: date,
    messages: Sequence[Message],
    **options: Any,
) -> str:
    # A tokenizer may hold a second template for tools. Any list selects it, an empty one too.
    template = tokenizer.get_chat_template(tools=None if tools is None else [])
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                tokenize=False,
                chat_template=_dated(template, today),
                **options,
            )
        )
    except Exception as error:  # templates raise what they like (jinja2, their own refusals)
        raise KavaError(
            f"the tokenizer's chat template refuses a conversation with roles "
            f"{', '.join(message['role'] for message in messages)} "
            f"({one_line(error)}); reorder or rename the roles"
        ) from error


# Every row asks for the same template and date.
@functools.cache
def _dated(template: str, today: date) -> str:
    """The template's text with the date written into it."""

    def written(match: re.Match[str]) -> str:
        # A JSON string is also a string literal of Jinja, whatever quotes the format contains.
        return json.dumps(today.strftime(match[1] or match[2] or ""))

    dated = _NOW.sub(written, template)
    if re.search(r"strftime_now\s*\(", dated):
        raise KavaError(
            "the tokenizer's chat template asks for today's date in a format that it computes, so "
            "rows would change from day to day; write the format into its strftime_now(...)"
        )
    return dated


def _after_end_token(whole: str, start: int, end: str) -> int:
    found = whole.find(end, start)
    if found < 0:
        raise KavaError(
            "the tokenizer's chat template writes no end token after each reply, so earlier "
            "replies cannot be told apart; use data.train_on=last"
        )
    return found + len(end)


def _after_opened_thoughts(prompt: str, whole: str, reply: str) -> str | None:
    """The reply after a generation prompt that ends in an opened thinking block.

    The templates of thinking models open ``<think>`` for generation and write a finished reply
    without its thoughts. Here the reply's own thoughts are put into the block. A reply without any
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


def _arguments_as_wanted(messages: Sequence[Message], render: Render) -> Sequence[Message]:
    """The messages with arguments of tool calls as objects, if the template wants objects.

    In the form of the OpenAI API they are JSON text. Some templates write them as they are, most
    expect objects and would write the text as a quoted string.
    """
    # The examples themselves stay as they are: their text is the data's fingerprint, which must not
    # depend on the template.
    changed = [copy.deepcopy(dict(message)) for message in messages]
    entries = [call for message in changed for call in message.get("tool_calls") or ()]
    # A call's function is an object of its own, or the call itself.
    calls = [entry.get("function", entry) for entry in entries if isinstance(entry, dict)]
    calls = [c for c in calls if isinstance(c, dict) and isinstance(c.get("arguments"), str)]
    if not calls:
        return messages
    whole = render(messages)
    # The template wants objects if its tojson filter has quoted the text. That filter of
    # transformers does not escape letters beyond ASCII, so this search does not either.
    if not any(json.dumps(call["arguments"], ensure_ascii=False) in whole for call in calls):
        return messages
    for call in calls:
        try:
            call["arguments"] = json.loads(call["arguments"])
        except ValueError:
            raise KavaError(
                f"a tool call's arguments {call['arguments'][:40]!r} are not JSON, and the "
                "tokenizer's chat template wants an object; correct them"
            ) from None
    return changed
