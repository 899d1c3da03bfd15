"""Files, pipes and standard input to raw rows; ``rows`` checks what their fields hold.

Files are read here and not by ``datasets``, so that a broken one is reported in a single line with
its line numbers, and no copy of it stays in a cache. A gzipped file is known by its first two
bytes, whatever its name.
"""

import functools
import gzip
import io
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from kava_jax.errors import KavaError
from kava_jax.storage import repeated_key

FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
STANDARD_INPUT = ("-", "/dev/stdin")

Numbered = Iterator[tuple[int, Any]]


class BadRowError(Exception):
    """What is wrong with one row, without the row's number."""


class Number(str):
    """A number as its author wrote it: 18.50 stays so, and no integer is too long."""

    __slots__ = ()


def is_pipe(name: str) -> bool:
    """Whether this is standard input or another stream that can be read only once."""
    return name in STANDARD_INPUT or Path(name).is_fifo()


def ending(file: Path) -> str:
    """The file's ending without a ``.gz`` behind it."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def read_text(name: str) -> str:
    """The whole file as text.

    Raises KavaError when it cannot be read or is not UTF-8.
    """
    try:
        with _opened(name) as stream:
            # Without the byte order mark that some editors write first: it is no text.
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KavaError(f"data.path={name!r} cannot be read as UTF-8 text ({error})") from error


def json_rows(name: str) -> tuple[str, Numbered]:
    """The unit that rows are counted in, and for every row its number and its value or its fault.

    JSON objects one a line (blank lines are skipped), one array of them, or objects that are
    written over several lines each.
    """
    lines = _lines(name)
    skipped = b""
    for number, line in lines:
        start = line.strip()
        # A line with nothing but a brace opens an object over several lines; with one object per
        # line it would be broken JSON.
        if start.startswith(b"[") or start == b"{":
            return "row", _document(skipped + line + b"".join(rest for _, rest in lines))
        if start:
            return "line", _each(itertools.chain([(number, line)], lines))
        # Blank lines count, so that an error in a document names the line of the file.
        skipped += line
    return "line", iter(())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise BadRowError(f"field {twice!r} is given twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=float
)


def parsed(text: str | bytes, decode: Callable[[str], Any] = _DECODER.decode) -> Any:
    """JSON with every number as a ``Number``; NaN and Infinity are floats.

    Raises BadRowError for what is not JSON in UTF-8, or an object that gives one field twice.
    """
    try:
        return decode(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRowError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        where = f"column {error.colno}"
        if error.lineno > 1:
            where = f"line {error.lineno}, {where} of the file"
        raise BadRowError(f"not JSON ({error.msg} at {where})") from None
    except RecursionError:
        raise BadRowError("nested too deeply") from None


def plain(value: Any) -> Any:
    """The value with Python's own numbers instead of ``Number``."""
    if isinstance(value, Number):
        try:
            # Python refuses to convert more than 4300 digits to an integer, with a ValueError.
            return json.loads(value)
        except ValueError:
            raise BadRowError(f"the number {value[:20]}... has too many digits") from None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def parquet_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a parquet file."""
    from pyarrow import ArrowException, parquet

    with _opened(name) as stream:
        content = stream.read()
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise KavaError(
            f"data.path={name!r} cannot be read as parquet ({reason}); fetch or write it again"
        ) from error
    types = {field.name: str(field.type) for field in table.schema}
    chunks = (row for chunk in table.to_batches() for row in chunk.to_pylist())
    yield from short_numbers(chunks, types)


def short_numbers(
    rows: Iterable[Mapping[str, Any]], types: Mapping[str, str]
) -> Iterator[Mapping[str, Any]]:
    """Columns of half or single precision as they were written: 0.1, not 0.10000000149011612."""
    narrow = {"halffloat": np.float16, "float16": np.float16}
    narrow |= {"float": np.float32, "float32": np.float32}
    columns = {name: narrow[kind] for name, kind in types.items() if kind in narrow}
    if not columns:
        yield from rows
        return
    for row in rows:
        short = {
            # The text of a narrow numpy float is the shortest one that reads back as the same
            # value.
            name: Number(kind(row[name]))
            for name, kind in columns.items()
            if row[name] is not None and math.isfinite(row[name])
        }
        yield {**row, **short}


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    """The file's bytes, unzipped; raises KavaError when opening or reading it fails."""
    try:
        # A pipe cannot seek back behind the two bytes that tell whether it is zipped, so it is read
        # whole.
        with io.BytesIO(_piped(name)) if is_pipe(name) else Path(name).open("rb") as stream:
            zipped = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            yield gzip.GzipFile(fileobj=stream) if zipped else stream  # pyright: ignore[reportReturnType]  (reads as any file)
    # gzip raises all three: for a bad header or checksum, for a file that is cut off, and for
    # damaged data.
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise KavaError(
            f"data.path={name!r} cannot be read ({reason}); fetch or write it again"
        ) from error


@functools.cache
def _piped(name: str) -> bytes:
    """All of a stream. It is kept, because a stream cannot be read a second time."""
    return sys.stdin.buffer.read() if name in STANDARD_INPUT else Path(name).read_bytes()


def _lines(name: str) -> Iterator[tuple[int, bytes]]:
    # Bytes: only \n ends a line, U+2028 inside a text does not.
    with _opened(name) as lines:
        for number, line in enumerate(lines, 1):
            yield number, line.removeprefix(b"\xef\xbb\xbf")


def _each(lines: Numbered) -> Numbered:
    for number, line in lines:
        if line.strip():
            try:
                yield number, parsed(line)
            except BadRowError as error:
                yield number, error


def _document(content: bytes) -> Numbered:
    """The items of one array, or of values that follow one another."""
    values: list[Any]
    try:
        values = parsed(content, _values)
    except BadRowError as error:
        values = [error]
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return iter(enumerate(rows, 1))


def _values(text: str) -> list[Any]:
    # raw_decode does not skip whitespace before a value.
    values, place = [], _SPACE.match(text).end()
    while place < len(text):
        value, place = _DECODER.raw_decode(text, place)
        values.append(value)
        place = _SPACE.match(text, place).end()
    return values


_SPACE: Any = re.compile(r"\s*")
