"""Lines of Markdown tables, for the scripts beside it."""

import textwrap
from collections.abc import Iterable
from typing import Any


def head(names: str) -> list[str]:
    """The first two lines of a table; columns whose name begins with > stand on the right."""
    columns = [name.strip() for name in names.split("|")]
    bare = [name.removeprefix(">") for name in columns]
    titles = "|".join(f" {name} " if name else " " for name in bare)
    return [f"|{titles}|", row(*("---:" if name.startswith(">") else "---" for name in columns))]


def row(*cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def page(lines: Iterable[str]) -> str:
    """Lines of a page as text, sentences broken to its width; a line of a table cannot be."""
    parts = (textwrap.wrap(line, 118) if line[:1] not in ("", "|") else [line] for line in lines)
    return "\n".join(line for part in parts for line in part)
