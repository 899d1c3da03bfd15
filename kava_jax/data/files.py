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
from pathlib import Path
from typing import Any

from kava_jax.errors import KavaError, one_line
from kava_jax.storage import repeated_key

FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")
STANDARD_INPUT = ("-", "/dev/stdin")

Numbered = Iterator[tuple[int, Any]]

# An array, or a line with nothing but a brace, which opens an object over several lines; with one
# object per line it would be broken JSON.
_DOCUMENT = re.compile(rb"\s*(\[|\{\s*\n)")
_SPACE: Any = re.compile(r"\s*")


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
        # Without the byte order mark that some editors write first: it is no text.
        return _content(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(name, error, " as UTF-8 text") from error


def json_rows(name: str) -> tuple[str, Numbered]:
    """The unit that rows are counted in, and every row's number and value (or its line's bytes).

    JSON objects one a line (blank lines are skipped), one array of them, or objects that are
    written over several lines each.
    """
    # Bytes: only \n ends a line, U+2028 inside a text does not. One by one: a few rows may be
    # asked of a large file.
    lines = (line.removeprefix(b"\xef\xbb\xbf") for line in _lines(name))
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    if head and _DOCUMENT.match(head[-1]):
        return "row", enumerate(_document(b"".join([*head, *lines])), 1)
    numbered = enumerate(itertools.chain(head, lines), 1)
    return "line", ((number, line) for number, line in numbered if line.strip())


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

    content = io.BytesIO(_content(name))
    try:
        table = parquet.read_table(content)
    except (OSError, ArrowException) as error:
        raise _unreadable(name, error, " as parquet") from error
    rows = (row for chunk in table.to_batches() for row in chunk.to_pylist())
    return short_numbers(rows, table.schema)


def short_numbers(rows: Iterable[Mapping[str, Any]], schema: Any) -> Iterator[Mapping[str, Any]]:
    """Columns of half or single precision as they were written: 0.1, not 0.10000000149011612.

    ``schema`` is pyarrow's, which has a name and a type for each column.
    """
    narrow = [field for field in schema if str(field.type) in ("halffloat", "float")]
    columns = {field.name: field.type.to_pandas_dtype() for field in narrow}
    for row in rows:
        short = {
            # The text of a narrow numpy float is the shortest one that reads back as the same
            # value.
            name: Number(kind(row[name]))
            for name, kind in columns.items()
            if row[name] is not None and math.isfinite(row[name])
        }
        yield {**row, **short}


def _content(name: str) -> bytes:
    return b"".join(_lines(name))


def _lines(name: str) -> Iterator[bytes]:
    """The file's lines, unzipped; raises KavaError when it cannot be read."""
    try:
        # A pipe cannot seek back behind the two bytes that tell whether it is zipped, so it is read
        # whole.
        with io.BytesIO(_piped(name)) if is_pipe(name) else Path(name).open("rb") as stream:
            zipped = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            yield from gzip.GzipFile(fileobj=stream) if zipped else stream
    # gzip raises all three: for a bad header or checksum, for a file that is cut off, and for
    # damaged data.
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from error


@functools.cache
def _piped(name: str) -> bytes:
    """All of a stream. It is kept, because a stream cannot be read a second time."""
    return sys.stdin.buffer.read() if name in STANDARD_INPUT else Path(name).read_bytes()


def _unreadable(name: str, error: Exception, as_what: str = "") -> KavaError:
    reason = getattr(error, "strerror", None) or one_line(error)
    return KavaError(
        f"data.path={name!r} cannot be read{as_what} ({reason}); fetch or write it again"
    )


def _document(content: bytes) -> list[Any]:
    """The items of one array, or values that follow one another; or what is wrong with them."""
    try:
        values = parsed(content, _values)
    except BadRowError as error:
        return [error]
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _values(text: str) -> list[Any]:
    # raw_decode does not skip whitespace before a value.
    values, place = [], _SPACE.match(text).end()
    while place < len(text):
        value, place = _DECODER.raw_decode(text, place)
        values.append(value)
        place = _SPACE.match(text, place).end()
    return values
