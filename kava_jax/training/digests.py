"""SHA-256 digests of a directory's files, which tell a whole checkpoint from a damaged one.

Orbax restores flipped bits without a word, so the digests are what a checkpoint is checked by.
"""

import hashlib
import json

from kava_jax.storage import Place, files_below

DIGESTS_NAME = "sha256.json"


def write_digests(directory: Place) -> None:
    """Write ``sha256.json``: the digest of every file below the directory, by relative path."""
    digests = {name: _digest(directory / name) for name in _files(directory)}
    (directory / DIGESTS_NAME).write_text(json.dumps(digests, indent=1) + "\n")


def damage(directory: Place) -> str | None:
    """What is wrong with the directory's files, in a few words; None when they are intact."""
    try:
        expected = json.loads((directory / DIGESTS_NAME).read_text(encoding="utf-8"))
        names = set(expected)
    except (OSError, ValueError, TypeError) as error:
        return f"its {DIGESTS_NAME} cannot be read: {type(error).__name__}"
    if missing := sorted(names - set(_files(directory))):
        return f"{missing[0]} is missing"
    for name in sorted(names):
        try:
            found = _digest(directory / name)
        except OSError as error:
            return f"{name} cannot be read: {type(error).__name__}"
        if found != expected[name]:
            return f"{name} has changed since it was written"
    return None


def _files(directory: Place) -> list[str]:
    return [name for name in files_below(directory) if name != DIGESTS_NAME]


def _digest(path: Place) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  (epath's files have readinto)
