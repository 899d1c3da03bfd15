"""Parts of a self-contained HTML page: pictures as data, tables, and the template they go into.

Left out on purpose: what stands on the page (``report``, ``grid_report``), and styles (the
templates share them).
"""

import base64
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kava_jax.errors import KavaError
from kava_jax.storage import Place

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


def render(template: str, **parts: Any) -> str:
    """The page that one of the package's templates makes; every text among its parts is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kava_jax", "assets"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(parts)


def write_page(html: str, target: Place) -> Place:
    """Write the page, making its directory if need be, and return its path.

    Raises:
        KavaError: it cannot be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(html, encoding="utf-8")
    except OSError as error:
        raise KavaError(
            f"out={str(target)!r} cannot be written ({error.strerror}); name another file"
        ) from None
    return target
