"""SHA-256 digests of a directory's files, which tell a whole checkpoint from a damaged one.

Orbax restores flipped bits without a word, so the digests are what a checkpoint is checked by.
Every process digests the files that it wrote (``sha256.3.json``), and the first one, last, all the
others and these lists (``sha256.json``). To check a directory, its lists are shared out: on as many
processes as wrote it each reads the files that it wrote, which are those that it restores from.
"""

import hashlib
import json
import re

from kava_jax.storage import Place, files_below

DIGESTS_NAME = "sha256.json"
# Orbax puts the number of the process that writes into the path: ``ocdbt.process_3/d/0c81a3``.
_WRITER = re.compile(r"process_(\d+)(/|$)")
_LIST = re.compile(r"sha256\.(\d+)\.json")


def write_own_digests(directory: Place, process: int) -> None:
    """Write ``sha256.<process>.json``: the digests of the files that this process wrote."""
    own = [name for name in _files(directory) if _writer(name) == process]
    _write(directory, f"sha256.{process}.json", own)


def write_digests(directory: Place) -> None:
    """Write ``sha256.json``: the digests of all other files below the directory, the lists too."""
    names = _files(directory)
    lists = {f"sha256.{_writer(name)}.json" for name in names} & set(names)
    # A file whose process left no list is digested here, so that every file is in some list.
    others = [name for name in names if f"sha256.{_writer(name)}.json" not in lists]
    _write(directory, DIGESTS_NAME, others)


def damage(directory: Place, process: int = 0, processes: int = 1) -> str | None:
    """What is wrong with this process's share of the files, in a few words; None when intact."""
    expected = _read(directory / DIGESTS_NAME)
    if isinstance(expected, str):
        return expected
    # An empty list would match whatever lies there.
    if not expected:
        return f"its {DIGESTS_NAME} names no file"
    lists = {name: int(found[1]) for name in expected if (found := _LIST.fullmatch(name))}
    # Fewer processes than wrote take several lists each; of more, the last ones take none.
    mine = {name for name, writer in lists.items() if writer % processes == process}
    own = {n: digest for n, digest in expected.items() if n in mine or process == 0}
    if problem := _changed(directory, own):
        return problem
    for name in sorted(mine):
        listed = _read(directory / name)
        if problem := listed if isinstance(listed, str) else _changed(directory, listed):
            return problem
    return None


def _changed(directory: Place, expected: dict[str, str]) -> str | None:
    """What is wrong with the named files, in a few words."""
    for name in sorted(expected):
        try:
            found = _digest(directory / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {type(error).__name__}"
        if found != expected[name]:
            return f"{name} has changed since it was written"
    return None


def _read(path: Place) -> dict[str, str] | str:
    """Digests by name, or what is wrong with the list."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        return f"its {path.name} cannot be read: {type(error).__name__}"


def _write(directory: Place, name: str, files: list[str]) -> None:
    digests = {file: _digest(directory / file) for file in files}
    (directory / name).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def _writer(name: str) -> int | None:
    """The process that wrote a file; None where its path does not say."""
    found = _WRITER.search(name)
    return int(found[1]) if found else None


def _files(directory: Place) -> list[str]:
    # A list cannot hold its own digest.
    return [name for name in files_below(directory) if name.rpartition("/")[2] != DIGESTS_NAME]


def _digest(path: Place) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  (epath's files have readinto)
