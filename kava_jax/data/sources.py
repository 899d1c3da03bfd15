"""Where examples come from: the generator, a local file, a dataset directory or the hub.

    builtin:word_problems   generated, see ``problems``; builtin:word_problems/MIXTURE for a part
    *.jsonl, *.ndjson       one JSON object a line, with a prompt and an answer field or a
                            conversation (``messages``)
    *.json                  the same, or one array of such objects
    *.parquet               the same columns
    *.txt                   plain documents with ``<|endoftext|>`` between them
    -                       standard input, as *.json; a named pipe likewise
    a directory or hub id   through ``datasets.load_dataset``, e.g. openai/gsm8k with subset main

A file may be zipped (``*.jsonl.gz``). Left out on purpose: streaming (all text is held in memory),
dataset scripts (remote code never runs) and any cleaning of the text.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from kava_jax.data.example import Example
from kava_jax.data.files import (
    FILES,
    Numbered,
    ending,
    is_pipe,
    json_rows,
    parquet_rows,
    read_text,
    short_numbers,
)
from kava_jax.data.problems import word_problems
from kava_jax.data.rows import example_of, read_rows
from kava_jax.errors import KavaError, one_line
from kava_jax.storage import at_revision, looks_local, reachable, written_out

BUILTIN_PROBLEMS = "builtin:word_problems"
DOCUMENT_SEPARATOR = "<|endoftext|>"

_BUILTIN_ROWS = {"train": 7473, "test": 1319, "dev": 1319, "confirm": 1319}  # as in GSM8K


def load_examples(
    path: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    prompt_field: str | None = "question",
    answer_field: str = "answer",
    messages_field: str | None = None,
    seed: int = 0,
    rows: int | None = None,
) -> Sequence[Example]:
    """All examples at ``path``, checked: every field is there and holds text.

    Args:
        path: see the module's table; ``id@revision`` pins a branch, tag or commit of a hub id.
        split: split of a generator, directory or hub id; a single file has none and ignores it.
        subset: configuration of a hub data set (``main`` for openai/gsm8k).
        prompt_field: field of the prompt; None reads ``answer_field`` as plain documents.
        answer_field: field of the answer. Numbers are accepted and become the text they were
            written as; null and NaN are missing values.
        messages_field: field of a conversation, a list of ``{"role", "content"}`` (or ``{"from",
            "value"}``) that ends with the assistant; set, it takes the place of prompt and answer.
            A field ``tools`` of the same row goes to the chat template.
        seed: of the generator.
        rows: at most this many, from the start; for the generator, how many (default: as GSM8K).

    Raises:
        KavaError: the source is missing, unreadable or empty, or rows are broken; names the file
            and the line (or row) numbers, the field, and the fields that are there.
    """
    name = written_out(str(path))
    if rows is not None and rows < 1:
        raise KavaError(f"data.rows={rows} is not positive; ask for 1 or more, or leave it out")
    if name.split("/")[0] == BUILTIN_PROBLEMS:
        mixture = name.partition("/")[2] or "all"
        return word_problems(split, seed, rows or _BUILTIN_ROWS.get(split, 1), mixture)
    file = reachable(name, "data.path")
    if file.is_file() and ending(file) == ".txt":
        return _documents(name)[:rows]
    unit, numbered = _raw_rows(name, file, split, subset)
    to_example = partial(
        example_of, prompt=prompt_field, answer=answer_field, messages=messages_field
    )
    return read_rows(name, unit, islice(numbered, rows), to_example)


def _raw_rows(name: str, file: Path, split: str, subset: str | None) -> tuple[str, Numbered]:
    """What rows are counted in, and every row with its number."""
    if is_pipe(name):
        return json_rows(name)
    if file.is_file():
        if ending(file) not in FILES:
            raise KavaError(
                f"data.path={name!r} has an unknown ending; write its rows as one of "
                f"{', '.join(FILES)} (or zipped, .jsonl.gz)"
            )
        if ending(file) == ".parquet":
            return "row", enumerate(parquet_rows(name), 1)
        return json_rows(name)
    directory = file.is_dir() and name.strip()
    # A name like data/train.jsonl also reads as a hub id; its ending shows that a file was meant.
    if not directory and (looks_local(name) or ending(file) in FILES):
        raise KavaError(
            f"data.path={name!r} does not exist; give a file ({', '.join(FILES)}), a data set "
            f"directory, a hub id or {BUILTIN_PROBLEMS}"
        )
    where, revision = (str(file), None) if directory else at_revision(name)
    table = _through_datasets(name, where, name=subset, split=split, revision=revision)
    return "row", enumerate(table, 1)


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) of the text of all rows, in order: the same rows give the same fingerprint."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, default=str).encode() + b"\n")
    return digest.hexdigest()


def _documents(name: str) -> list[Example]:
    """The documents of a text file, stripped and without empty ones."""
    pieces = read_text(name).split(DOCUMENT_SEPARATOR)
    documents = [Example("", piece.strip()) for piece in pieces if piece.strip()]
    if not documents:
        raise KavaError(f"data.path={name!r} holds no documents; give a file with text")
    return documents


def _through_datasets(shown: str, where: str, **options: Any) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        table = datasets.load_dataset(where, **options)
    except Exception as error:  # a dozen types from datasets, pyarrow and the hub, all about input
        reason = one_line(error.__cause__ or error)
        raise KavaError(
            f"data.path={shown!r} cannot be loaded ({type(error).__name__}: {reason}); check the "
            "path or hub id, data.split, data.subset and your access"
        ) from error
    return short_numbers(table, table.data.schema)
