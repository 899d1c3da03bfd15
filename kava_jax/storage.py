"""Where a run or an export is: a local directory, or a folder of a bucket (``gs://bucket/run``).

Small files are read and written through etils' ``epath``, whose paths look like pathlib's. Orbax
writes the state itself. Object storage can neither append nor rename, but an object appears whole
or not at all. So a file that would be renamed into place on a disk is written directly on a bucket,
and a file that grows is kept in a local copy that is uploaded whole.

Left out on purpose: other stores than Google's. Orbax takes ``s3://`` for a local path
(``docs/results/object_storage.py`` shows it), and a directory cannot be committed there by
renaming it.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from etils import epath

from kava_jax.errors import KavaError, StoppedError, is_full_disk, one_line

Place = Path | epath.Path

_BUCKET = "gs://"
# ``gs:/bucket`` too: it is what pathlib makes of a URL, and was surely not meant as a directory.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# What our own names add to a directory's: suffixes of its own name, and files below it.
_LONGER_NAME, _LONGER_PATH = 24, 200


def place(text: str, field: str) -> Place:
    """The path that ``text`` names; looks at no file.

    Raises KavaError for a URL that is not ``gs://bucket/folder``, and a ``~`` of nobody.
    """
    if not _SCHEME.match(text):
        return _local(text, field)
    bucket, _, folder = text.removeprefix(_BUCKET).partition("/")
    if not text.startswith(_BUCKET) or not bucket or not folder.strip("/"):
        raise KavaError(
            f"{field}={text} is neither a local directory nor gs://bucket/folder; use one of these"
        )
    return epath.Path(text)


def local_path(text: str, field: str) -> Path:
    """The local path that ``text`` names.

    Raises KavaError for a URL, and a ``~`` of nobody.
    """
    if _SCHEME.match(text):
        raise KavaError(f"{field}={text} is no local path; use a local one")
    return _local(text, field)


def written_out(text: str) -> str:
    """The text with ``~`` or ``~user`` in front as the home directory, where there is one.

    As a shell does it, which sees neither the values of a YAML file nor ``--out=~/x``.
    """
    return os.path.expanduser(text)


def reachable(text: str, field: str) -> Path:
    """The local path that ``text`` names, which may be looked at; there need be nothing.

    Raises KavaError when the system does not let us look (no permission, too long a name).
    """
    path = Path(written_out(text))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnicodeEncodeError:
        raise  # the command says what helps where a locale has no such letters
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise KavaError(
            f"{field}={text[:200]!r} cannot be read ({_reason(error)}); give another path, or the "
            f"right to read it"
        ) from None
    return path


def _local(text: str, field: str) -> Path:
    found = written_out(text)
    if not found or "\0" in found:
        raise KavaError(f"{field}={text!r} is empty or holds a zero byte; give a path")
    if found.startswith("~"):
        raise KavaError(
            f"{field}={text}: no home directory is known for {Path(text).parts[0]}; write the "
            f"whole path, or ./{text} if that is its name"
        )
    return Path(found)


def looks_local(name: str) -> bool:
    """Whether a name was meant as a path (or as something built in), and not as a hub id."""
    return not name.strip() or name.startswith(("builtin:", "/", ".", "~")) or name.count("/") > 1


def at_revision(name: str) -> tuple[str, str | None]:
    """A hub id without its revision, and the branch, tag or commit that it names after ``@``."""
    hub_id, at, revision = name.partition("@")
    return (hub_id, revision) if at and revision and not looks_local(hub_id) else (name, None)


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that a JSON object gives twice; Python's reader would keep the last value."""
    keys = [key for key, _ in pairs]
    return next((key for place, key in enumerate(keys) if key in keys[:place]), None)


def absolute(where: Place) -> Place:
    """The same path from the root; etils would put the working directory before a bucket's."""
    return where.resolve() if isinstance(where, Path) else where


def check_access(where: Place, field: str) -> None:
    """Find out whether a bucket can be used, before anything is made; a local path always can.

    Raises KavaError when a package is missing or the bucket cannot be reached.
    """
    if isinstance(where, Path):
        return
    try:
        google, _ = import_module("google.cloud.storage"), import_module("gcsfs")
    except ImportError as error:
        raise KavaError(
            f"{field}={where} needs {error.name}, which is not installed; install kava_jax[gcs]"
        ) from None
    from fsspec.config import conf

    conf["gcs"] = conf.get("gcs", {}) | {"use_listings_cache": False}  # others write there too
    try:
        # The parts of gs://bucket/run are "/", "gs", "bucket" and "run".
        google.Client().get_bucket(where.parts[2])  # as Orbax does, which asks what kind it is
    except Exception as error:  # of Google's packages for access, network and names: no base class
        raise KavaError(
            f"{field}={where}: the bucket cannot be reached ({type(error).__name__}: "
            f"{one_line(error)}); mend its name or your access to it"
        ) from None


def check_target(
    where: Place, field: str, kind: Literal["directory", "file"] = "directory"
) -> None:
    """Find out whether something can be written at a place, and leave nothing there.

    To be called before any model is loaded: what is missing is made later, on the way.

    Raises KavaError when a bucket cannot be reached, when a directory cannot be made (a part of
    the path is a file, a link to nothing, or too long a name) or not written to, and when ``where``
    is a directory but is to be a file.
    """
    check_access(where, field)
    if not isinstance(where, Path):
        return
    if kind == "file" and where.is_dir():
        raise KavaError(f"{field}={where} is a directory; name a file")
    problem = _obstacle(where if kind == "directory" else where.parent)
    if problem is None and kind == "file" and where.exists() and not os.access(where, os.W_OK):
        problem = "the file may not be changed"
    if problem is not None:
        raise KavaError(f"{field}={where} cannot be written: {problem}; name a {kind} elsewhere")


def _obstacle(where: Path) -> str | None:
    """Why no files can be put into a directory, which may have to be made; in a few words."""
    whole = where.absolute()
    # What is below this is made later.
    there = next(path for path in (whole, *whole.parents) if os.path.lexists(path))
    if there.exists() and not there.is_dir():
        return f"{there} is a file"
    try:
        longest = os.pathconf(there, "PC_NAME_MAX") - _LONGER_NAME
        for name in whole.relative_to(there).parts:
            if len(os.fsencode(name)) > longest:
                return f"the name {name[:12]}... is longer than {longest} bytes"
        if len(os.fsencode(whole)) > os.pathconf(there, "PC_PATH_MAX") - _LONGER_PATH:
            return "the path is too long"
        # Only making a file is a sure test: os.access may be wrong on network file systems.
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        # Another path is no remedy here, and a full disk has an exit code of its own.
        if is_full_disk(error):
            raise
        if isinstance(error, FileNotFoundError) and there.is_symlink():
            return f"{there} is a link to what does not exist"
        return f"{there}: {_reason(error)}"


class Growing:
    """Files of a run that are appended to: the files themselves, or copies to be published."""

    def __init__(self, directory: Path, target: epath.Path | None):
        self.directory, self._target = directory, target
        self._published: dict[Path, int] = {}

    def publish(self) -> None:
        """Upload what has grown, if it is a copy; raises StoppedError when that fails."""
        if self._target is None:
            return
        sizes = {path: path.stat().st_size for path in _files(self.directory)}
        for path, size in sizes.items():
            # These files only grow, so an equal size means that nothing was added.
            if self._published.get(path) != size:
                _upload(path, self._target / path.relative_to(self.directory).as_posix())
        self._published = sizes


@contextmanager
def growing(run_dir: Place, *names: str) -> Iterator[Growing]:
    """Where a run may append: the run directory itself, or a copy with its files ``names``.

    What has not been published is published at the end.
    """
    if isinstance(run_dir, Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        yield Growing(run_dir, None)
        return
    with tempfile.TemporaryDirectory(prefix="kava-") as folder:
        for name in names:
            if (run_dir / name).exists():
                (Path(folder) / name).write_bytes((run_dir / name).read_bytes())
        copies = Growing(Path(folder), run_dir)
        try:
            yield copies
        finally:
            # A run that fails publishes too: the last lines are those that lead up to the fault.
            copies.publish()


@contextmanager
def local_file(where: Place) -> Iterator[Path]:
    """The file itself, or a local copy of one on a bucket; what is written to it is uploaded."""
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="kava-") as folder:
        path = Path(folder) / where.name
        if where.exists():
            path.write_bytes(where.read_bytes())
        # No ``finally`` here: after an error the object in the bucket stays as it was.
        before = path.stat().st_mtime_ns if path.exists() else None
        yield path
        if path.exists() and path.stat().st_mtime_ns != before:
            _upload(path, where)


def upload(directory: Path, target: Place, *, first: str = "", last: str = "") -> None:
    """Put a directory's files into another, or on a bucket, in the place of those that are there.

    Args:
        directory: what is uploaded, or moved where the target is a directory on the same disk.
        target: its place; all else that it holds is removed before.
        first: name of the file that says whose folder this is: removed last, uploaded first.
        last: name of the file without which nobody takes the folder for whole: the other way round.

    Raises StoppedError when an upload fails.
    """
    # The new files may lie in a folder of the target itself, which must not be removed.
    present = [path for path in target.iterdir() if path != directory] if target.exists() else []
    for path in sorted(present, key=lambda path: (path.name == first, path.name != last)):
        remove(path) if path.is_dir() else path.unlink()
    for path in sorted(_files(directory), key=lambda path: (path.name == last, path.name != first)):
        _upload(path, target / path.relative_to(directory).as_posix())


def move(source: Place, target: Place) -> None:
    """Rename a directory; on a bucket its files are copied, and the old ones deleted after that."""
    if isinstance(source, Path):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    else:
        _file_system(source).mv(str(source), str(target), recursive=True)


def remove(directory: Place) -> None:
    """Delete a directory and all that is in it."""
    epath.Path(directory).rmtree()


def files_below(directory: Place) -> list[str]:
    """Relative names of all files below a directory, in order."""
    if isinstance(directory, Path):
        return [path.relative_to(directory).as_posix() for path in _files(directory)]
    # fsspec lists names without the scheme.
    start = str(directory).removeprefix(_BUCKET) + "/"
    return sorted(name.removeprefix(start) for name in _file_system(directory).find(str(directory)))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _upload(path: Path, target: Place) -> None:
    if isinstance(target, Path):
        path.replace(target)
        return
    try:
        _file_system(target).put_file(str(path), str(target))
    except Exception as error:  # of Google's packages and aiohttp: no base class
        raise StoppedError(
            f"{target} cannot be written ({type(error).__name__}: {one_line(error)}); what was "
            f"written before is whole: call again"
        ) from error


def _file_system(where: epath.Path) -> Any:
    import fsspec

    return fsspec.filesystem(str(where).partition("://")[0])


def _reason(error: Exception) -> str:
    """Without the path, which our own lines name."""
    return getattr(error, "strerror", None) or str(error)
