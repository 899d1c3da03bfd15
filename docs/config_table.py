"""The lists of docs/config.md, written from the config's own models.

python docs/config_table.py          rewrite the lists in docs/config.md
python docs/config_table.py loss     print one section's list
"""

import json
import re
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kava_jax.alignment.kv_losses import AnyKVLoss, KVLoss
from kava_jax.config.run import Config

PAGE = Path(__file__).resolve().parent / "config.md"
WIDTH = 118
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def sections() -> dict[str, type[BaseModel]]:
    """Every section of the config by its name; ``top`` holds the fields that are no section."""
    found: dict[str, type[BaseModel]] = {"top": Config}
    for name, field in Config.model_fields.items():
        if inner := _models(field.annotation):
            found[name] = inner[0]
    for section, field in (("eval", "sets"), ("student", "cut"), ("loss", "handoff")):
        found[field] = _models(found[section].model_fields[field].annotation)[0]
    for loss in typing.get_args(AnyKVLoss):
        found[loss.model_fields["kind"].default] = loss
    return found


def listed(section: str) -> str:
    """The Markdown list of one section: field, values, default, meaning."""
    lines = []
    for name, field in _own_fields(section).items():
        if name == "kind" and section not in Config.model_fields:
            continue
        if not field.description:
            raise SystemExit(f"{section}.{name} has no description in kava_jax/config")
        meaning = field.description.replace("<", "&lt;")  # else taken for a tag
        line = f"* **`{name}`** ({_value(field)}; {_default(field)}): {meaning}"
        wrapped = textwrap.wrap(
            line, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
        lines += wrapped
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with every list between its markers rewritten."""

    def one(match: re.Match[str]) -> str:
        return f"<!-- config:{match[1]} -->\n{listed(match[1])}\n<!-- /config:{match[1]} -->"

    return re.sub(r"<!-- config:(\w+) -->\n(.*?)<!-- /config:\1 -->", one, page, flags=re.S)


def _own_fields(section: str) -> dict[str, FieldInfo]:
    fields = sections()[section].model_fields
    return {n: f for n, f in fields.items() if section != "top" or not _models(f.annotation)}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Sections inside an annotation; the forms of a weight are values, not sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation.__name__ in ("Ramp", "AutoShare") else [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _value(field: FieldInfo) -> str:
    """Type and range in words."""
    words = _type(field.annotation)
    limits = []
    for item in field.metadata:
        limits += [w.format(f"{getattr(item, k):g}") for k, w in BOUNDS.items() if hasattr(item, k)]
    return f"{words}, {' and '.join(limits)}" if limits else words


def _type(annotation: Any) -> str:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is types.NoneType:
        return "null"
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in inside)
    if origin is typing.Annotated:
        limits = [
            word.format(f"{getattr(item, key):g}")
            for mark in inside[1:]
            for item in getattr(mark, "metadata", [mark])
            for key, word in BOUNDS.items()
            if hasattr(item, key)
        ]
        return " ".join([_type(inside[0]), *limits])
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_type(part) for part in inside)
    if origin is tuple:
        if typing.get_origin(inside[0]) is typing.Annotated:
            return "list of whole numbers"
        return "list of names" if inside[0] != tuple[int, int] else "list of pairs"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, KVLoss):
        return f"`{annotation.model_fields['kind'].default}`"
    names = {"Ramp": "ramp", "AutoShare": "share", "str": "text", "int": "whole number"}
    names |= dict.fromkeys(("CutConfig", "HandoffConfig"), "section")
    names |= {"bool": "true or false", "float": "number"}
    return names[annotation.__name__]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump()["kind"]
    if value is None or isinstance(value, bool):
        return f"default {json.dumps(value)}"
    if isinstance(value, tuple):
        return f"default `[{', '.join(value)}]`"
    return f"default `{value:g}`" if isinstance(value, int | float) else f"default `{value}`"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(listed(sys.argv[1]))
    else:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
