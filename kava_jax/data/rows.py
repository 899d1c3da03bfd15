"""Raw rows to examples: which field holds what, and what is wrong with a row.

Numbers become the text that they were written as (``1e16`` is written out). Null, NaN and Infinity
are missing values. Conversations come as ``role``/``content`` messages or as ``from``/``value``
ones; content may be a list of text parts.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

from kava_jax.data.example import Example, Message
from kava_jax.data.files import BadRowError, Number, parsed, plain
from kava_jax.errors import KavaError

_LISTED = 5  # broken rows named in one error; the rest are counted
# Who speaks in from/value messages, by the role that chat templates know.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def read_rows(
    name: str, unit: str, numbered: Iterable[tuple[int, Any]], to_example: Callable[[Any], Example]
) -> list[Example]:
    """The examples of all rows; ``to_example`` is ``example_of`` with its fields bound.

    Raises KavaError that names every broken row (``unit`` is line or row), or when there is none.
    """
    examples, broken = [], []
    for number, row in numbered:
        try:
            examples.append(to_example(row))
        except BadRowError as error:
            broken.append(f"{unit} {number}: {error}")
    if broken:
        more = f"; and {len(broken) - _LISTED} more" if len(broken) > _LISTED else ""
        raise KavaError(
            f"data.path={name!r} has {len(broken)} broken {unit}(s): "
            f"{'; '.join(broken[:_LISTED])}{more}; correct or remove them"
        )
    if not examples:
        raise KavaError(f"data.path={name!r} holds no rows; give a data set with at least one")
    return examples


def example_of(row: Any, *, prompt: str | None, answer: str, messages: str | None) -> Example:
    """The example of a raw row, or of the bytes of its line.

    For the fields see ``sources.load_examples``. Raises BadRowError.
    """
    if isinstance(row, BadRowError):
        raise row
    if isinstance(row, bytes):
        row = parsed(row)
    if not isinstance(row, Mapping):
        raise BadRowError(f"a JSON {type(row).__name__} instead of an object with fields")
    if messages is not None:
        turns = _messages(_value(row, messages), messages)
        return Example("", "", turns, _tools(row.get("tools")))
    answer_text = _text(_value(row, answer), f"field {answer!r}")
    if prompt is None:
        return Example("", answer_text)
    return Example(_text(_value(row, prompt), f"field {prompt!r}"), answer_text)


def _value(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        present = ", ".join(map(str, row)) or "none"
        inner = [key for key, value in row.items() if _is_table(value)]
        hint = f"; {inner[0]!r} holds rows: write that list alone" if inner else ""
        raise BadRowError(f"field {field!r} is missing (fields here: {present}{hint})")
    return row[field]


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _text(value: Any, what: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        shown = "null" if value is None else "NaN"
        raise BadRowError(f"{what} is {shown}, a missing value")
    # True is an int in Python too, but no number that somebody wrote.
    if isinstance(value, Number | int | float | Decimal) and not isinstance(value, bool):
        return _digits(str(value), what)
    if not isinstance(value, str):
        raise BadRowError(f"{what} holds {type(value).__name__}, not text")
    if not value.strip():
        raise BadRowError(f"{what} is empty")
    try:
        # JSON can spell half a surrogate pair, which no UTF-8 text holds. Here it is reported with
        # its row; a tokenizer would not know the row.
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"{what} holds half a surrogate pair") from None
    return value


def _digits(number: str, what: str) -> str:
    """The number as it was written; with an exponent, written out."""
    if not set(number) & set("eEfFnN"):
        return number
    # Written out, 1e999999 would be a text of a million digits.
    size = abs(float(number))
    if not math.isfinite(size) or (size == 0 and Decimal(number) != 0):
        raise BadRowError(f"{what} is {number}, which no 64-bit number holds; write it as text")
    return format(Decimal(number), "f")


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value)  # tables keep conversations as JSON text
    if isinstance(value, Mapping):
        value = _transposed(value, field)
    if not isinstance(value, list) or not value:
        raise BadRowError(f"field {field!r} is not a list of messages")
    messages = tuple(_message(one, f"message {i} of {field!r}") for i, one in enumerate(value, 1))
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise BadRowError(f"{field!r} does not end with the assistant's reply to a message")
    if messages[-1].get("weight") == 0:
        raise BadRowError(f"{field!r} ends with a reply of weight 0; drop what is not to be learnt")
    return messages


def _transposed(value: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """One object of lists, as ``datasets`` keeps a sequence of objects, as a list of objects."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) < len(value) or len({len(item) for item in lists}) != 1:
        shape = ", ".join(f"{key}: {type(item).__name__}" for key, item in value.items())
        raise BadRowError(
            f"field {field!r} is an object ({shape}), not a list of messages; write "
            '[{"role": ..., "content": ...}, ...]'
        )
    return [dict(zip(value, one, strict=True)) for one in zip(*lists, strict=True)]


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRowError(f"{what} is not an object")
    # Tables fill what one message lacks with nulls; a template shall not see them.
    texts = ("content", "value")
    given = {
        # A number in a text keeps its author's spelling. Other fields reach the template as Python
        # values.
        key: value if key in texts else plain(value)
        for key, value in message.items()
        if value is not None
    }
    if "role" not in given and {"from", "value"} & given.keys():
        role, content = given.pop("from", None), given.pop("value", None)
        if role not in ROLES:
            raise BadRowError(f"{what} is from {role!r}; use one of {', '.join(ROLES)}")
        given = {"role": ROLES[role], "content": content} | given
    role = _text(_value(given, "role"), f"role of {what}")
    # A system prompt or a tool's result may be empty, and a reply may consist of tool calls alone.
    silent = role in ("system", "tool") or (role == "assistant" and bool(given.get("tool_calls")))
    content = _content(given.get("content"), f"content of {what}", may_be_empty=silent)
    return {**given, "role": role} | ({} if content is None else {"content": content})


def _content(value: Any, what: str, *, may_be_empty: bool) -> str | None:
    if isinstance(value, list):
        value = "".join(_part(part, what) for part in value)
    if may_be_empty and value is None:
        return None
    if may_be_empty and isinstance(value, str) and not value.strip():
        return value
    return _text(value, what)


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRowError(f"{what} has a part of type {kind!r}; only text is read")
    return part["text"]


def _tools(value: Any) -> tuple[Mapping[str, Any], ...] | None:
    if isinstance(value, str) and value.strip():
        value = parsed(value)
    if not value:
        return None
    if not _is_table(value):
        raise BadRowError("field 'tools' is not a list of function schemas")
    return tuple(plain(tool) for tool in value)
