"""Parts of a self-contained HTML page: pictures as data, tables, and the template they go into.

Left out on purpose: what stands on the page (``report``), and styles (the template has them).
"""

import base64
import struct
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

TEMPLATE = "report.html.j2"
# Dots of a picture per CSS pixel, for sharp screens.
DENSITY = 1.5


class Picture(NamedTuple):
    """A PNG as a data URI, its size in CSS pixels, and in words what it shows."""

    source: str
    width: int
    height: int
    alt: str
    caption: str


class Row(NamedTuple):
    """One line of a table; ``key`` is a metric's own name where the head is words."""

    head: str
    cells: list[str]
    key: str = ""


class Table(NamedTuple):
    """A table; ``words`` where its cells are no numbers."""

    caption: str
    heads: list[str]
    rows: list[Row]
    words: bool = False


def picture(draw: Callable[[Path], None], alt: str, caption: str) -> Picture:
    """What ``draw`` puts into the PNG file it is given, as part of a page."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "picture.png"
        draw(path)
        png = path.read_bytes()
    # A PNG's first chunk, after 16 bytes, begins with its width and height.
    width, height = (round(size / DENSITY) for size in struct.unpack(">II", png[16:24]))
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Picture(source, width, height, alt, caption)


def number(value: float | int | None) -> str:
    """Three decimals, or three digits where those say too little; a dash for no finite number."""
    if value is None:
        return "\N{EN DASH}"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def render(**parts: Any) -> str:
    """The page; every text among its parts is escaped."""
    from jinja2 import Environment, StrictUndefined

    template = resources.files("kava_jax") / "assets" / TEMPLATE
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(parts)
