"""Where examples come from: the generator, a local file, a dataset directory or the hub.

    builtin:word_problems   generated, see ``problems``; builtin:word_problems/MIXTURE for a part
    *.jsonl, *.json         one JSON object a line, with a prompt and an answer field or a
                            conversation (``messages``)
    *.parquet               the same columns
    *.txt                   plain documents between separators
    a directory or hub id   through ``datasets.load_dataset``, e.g. openai/gsm8k with subset main

Files are read here and not by ``datasets``: a broken one is to be reported in a single line with
its line numbers, and no copy of it stays behind in a cache. Left out on purpose: streaming (all
text is held in memory), dataset scripts (remote code never runs) and any cleaning of the text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kava_jax.data.example import Example
from kava_jax.data.problems import WordProblems
from kava_jax.errors import KavaError

BUILTIN_PROBLEMS = "builtin:word_problems"

_BUILTIN_ROWS = {"train": 7473, "test": 1319, "dev": 1319, "confirm": 1319}  # as in GSM8K
_FILES = (".jsonl", ".json", ".parquet", ".txt")
_LISTED = 5  # broken rows named in one error; the rest are counted


class _Fields(NamedTuple):
    prompt: str | None
    answer: str
    messages: str | None


class _BadRowError(Exception):
    """What is wrong with one row, without its place."""


def load_examples(
    path: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    prompt_field: str | None = "question",
    answer_field: str = "answer",
    messages_field: str | None = None,
    separator: str = "<|endoftext|>",
    seed: int = 0,
    rows: int | None = None,
) -> Sequence[Example]:
    """All examples at ``path``, checked: every field is there and holds text.

    Args:
        path: see the module's table.
        split: split of a generator, directory or hub id; a single file has none and ignores it.
        subset: configuration of a hub data set (``main`` for openai/gsm8k).
        revision: branch, tag or commit of a hub id.
        prompt_field: field of the prompt; None reads ``answer_field`` as plain documents.
        answer_field: field of the answer. Numbers are accepted and become text.
        messages_field: field of a conversation, a list of ``{"role", "content"}`` that ends with
            the assistant; set, it takes the place of prompt and answer.
        separator: what stands between the documents of a text file. Documents are stripped, empty
            ones skipped, and in a file with separators the unfinished one after the last is
            dropped; a file without any is one document.
        seed: of the generator.
        rows: at most this many, from the start; for the generator, how many (default: as GSM8K).

    Raises:
        KavaError: the source is missing, unreadable or empty, or rows are broken; names the file
            and the line (or row) numbers, the field, and the fields that are there.
    """
    name = str(path)
    if rows is not None and rows < 1:
        raise KavaError(f"data.rows={rows} is not positive; ask for 1 or more, or leave it out")
    if name.split("/")[0] == BUILTIN_PROBLEMS:
        mixture = name.partition("/")[2] or "all"
        return WordProblems(split, seed, rows or _BUILTIN_ROWS.get(split, 1), mixture)
    fields = _Fields(prompt_field, answer_field, messages_field)
    file = Path(name).expanduser()
    _check_exists(name, file)
    if not file.is_file():
        where = str(file) if file.is_dir() else name
        table = _through_datasets(name, where, name=subset, split=split, revision=revision)
        return _checked(name, "row", enumerate(table, 1), fields, rows)
    suffix = file.suffix.lower()
    if suffix == ".txt":
        return _documents(name, file, separator)[:rows]
    if suffix == ".parquet":
        return _checked(name, "row", enumerate(_parquet_rows(name, file), 1), fields, rows)
    return _checked(name, "line", _json_lines(name, file), fields, rows)


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) of the text of all rows, in order: the same rows give the same fingerprint."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example).encode() + b"\n")
    return digest.hexdigest()


def _check_exists(name: str, file: Path) -> None:
    if file.is_dir() and name.strip():
        return
    if file.is_file():
        if file.suffix.lower() not in _FILES:
            raise KavaError(
                f"data.path={name!r} has an unknown ending; use one of {', '.join(_FILES)}"
            )
        return
    looks_local = name.startswith(("builtin:", "/", ".", "~")) or name.count("/") > 1
    if looks_local or not name.strip() or file.suffix.lower() in _FILES:
        raise KavaError(
            f"data.path={name!r} does not exist; give a file ({', '.join(_FILES)}), a data set "
            f"directory, a hub id or {BUILTIN_PROBLEMS}"
        )


def _documents(name: str, file: Path, separator: str) -> list[Example]:
    if not separator:
        raise KavaError("data.separator='' is empty; give the text between two documents")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KavaError(f"data.path={name!r} cannot be read as UTF-8 text ({error})") from error
    pieces = text.split(separator)
    if len(pieces) > 1:
        del pieces[-1]
    documents = [Example("", piece.strip()) for piece in pieces if piece.strip()]
    if not documents:
        raise KavaError(f"data.path={name!r} holds no documents; give a file with text")
    return documents


def _json_lines(name: str, file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, parsed object or what is wrong with the line), blank lines skipped."""
    try:
        with file.open("rb") as lines:  # bytes: only \n ends a line, U+2028 inside a text does not
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parsed(line.removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise KavaError(f"data.path={name!r} cannot be read ({error.strerror})") from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _BadRowError("not UTF-8 text")
    except json.JSONDecodeError as error:
        return _BadRowError(f"not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return _BadRowError("nested too deeply")


def _parquet_rows(name: str, file: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(file)
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise KavaError(
            f"data.path={name!r} cannot be read as parquet ({reason}); fetch or write it again"
        ) from error
    for chunk in table.to_batches():
        yield from chunk.to_pylist()


def _through_datasets(shown: str, where: str, **options: Any) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(where, **options)
    except Exception as error:  # a dozen types from datasets, pyarrow and the hub, all about input
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise KavaError(
            f"data.path={shown!r} cannot be loaded ({type(error).__name__}: {reason}); check the "
            "path or hub id, data.split, data.subset and your access"
        ) from error


def _checked(
    name: str,
    unit: str,
    numbered: Iterable[tuple[int, Any]],
    fields: _Fields,
    rows: int | None,
) -> list[Example]:
    examples, broken = [], []
    for number, row in islice(numbered, rows):
        try:
            examples.append(_example(row, fields))
        except _BadRowError as error:
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


def _example(row: Any, fields: _Fields) -> Example:
    if isinstance(row, _BadRowError):
        raise row
    if not isinstance(row, Mapping):
        raise _BadRowError(f"a JSON {type(row).__name__} instead of an object with fields")
    if fields.messages is not None:
        return Example("", "", _messages(_value(row, fields.messages), fields.messages))
    answer = _text(_value(row, fields.answer), fields.answer)
    if fields.prompt is None:
        return Example("", answer)
    return Example(_text(_value(row, fields.prompt), fields.prompt), answer)


def _value(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        present = ", ".join(map(str, row)) or "none"
        raise _BadRowError(f"field {field!r} is missing (fields here: {present})")
    return row[field]


def _text(value: Any, field: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _BadRowError(f"field {field!r} holds {type(value).__name__}, not text")
    if not value.strip():
        raise _BadRowError(f"field {field!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRowError(f"field {field!r} holds half a surrogate pair") from None
    return value


def _messages(value: Any, field: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _BadRowError(f"field {field!r} is not a list of messages")
    messages = []
    for place, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise _BadRowError(f"message {place} of {field!r} is not an object")
        parts = (_text(_value(message, key), key) for key in ("role", "content"))
        messages.append(tuple(parts))
    if messages[-1][0] != "assistant" or len(messages) < 2:
        raise _BadRowError(f"{field!r} does not end with the assistant's reply to a message")
    return tuple(messages)
