"""Where a run or an export lies: a local directory, or a folder of a bucket (``gs://bucket/run``).

Small files are read and written through etils' ``epath``, whose paths look like pathlib's; state
goes there through Orbax. Object storage knows neither appending nor renaming: an object appears
whole or not at all, so what elsewhere is renamed into place is written at once here, and a file
that grows is kept in a local copy that is uploaded whole.

Left out on purpose: other stores than Google's. Orbax takes ``s3://`` for a local path
(``docs/results/object_storage.py`` shows it), and renames of directories there would be no commits.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from etils import epath

from kava_jax.errors import KavaError, StoppedError

Place = Path | epath.Path

_BUCKET = "gs://"
# ``gs:/bucket`` too: it is what pathlib makes of a URL, and was surely not meant as a directory.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def place(text: str, field: str) -> Place:
    """The path that ``text`` names; looks at no file.

    Raises KavaError for a URL that is not ``gs://bucket/folder``.
    """
    if not _SCHEME.match(text):
        return Path(text)
    bucket, _, folder = text.removeprefix(_BUCKET).partition("/")
    if not text.startswith(_BUCKET) or not bucket or not folder.strip("/"):
        raise KavaError(
            f"{field}={text} is neither a local directory nor gs://bucket/folder; use one of these"
        )
    return epath.Path(text)


def local_path(text: str, field: str) -> Path:
    """The local path that ``text`` names.

    Raises KavaError for a URL.
    """
    if _SCHEME.match(text):
        raise KavaError(f"{field}={text} is no local path; use a local one")
    return Path(text)


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
        google.Client().get_bucket(where.parts[2])  # as Orbax does, which asks what kind it is
    except Exception as error:  # of Google's packages for access, network and names: no base class
        raise KavaError(
            f"{field}={where}: the bucket cannot be reached ({type(error).__name__}: "
            f"{_one_line(error)}); mend its name or your access to it"
        ) from None


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
        before = path.stat().st_mtime_ns if path.exists() else None
        yield path
        if path.exists() and path.stat().st_mtime_ns != before:
            _upload(path, where)


def upload(directory: Path, target: epath.Path, *, first: str = "", last: str = "") -> None:
    """Put a directory's files on a bucket in the place of those that are there.

    Args:
        directory: what is uploaded.
        target: the folder on the bucket; all that it holds is removed before.
        first: name of the file that says whose folder this is: removed last, uploaded first.
        last: name of the file without which nobody takes the folder for whole: the other way round.

    Raises StoppedError when an upload fails.
    """
    present = list(target.iterdir()) if target.exists() else []
    for path in sorted(present, key=lambda path: (path.name == first, path.name != last)):
        path.rmtree() if path.is_dir() else path.unlink()
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
    if isinstance(directory, Path):
        shutil.rmtree(directory)
    else:
        directory.rmtree()


def files_below(directory: Place) -> list[str]:
    """Relative names of all files below a directory, in order."""
    if isinstance(directory, Path):
        return [path.relative_to(directory).as_posix() for path in _files(directory)]
    start = str(directory).removeprefix(_BUCKET) + "/"
    return sorted(name.removeprefix(start) for name in _file_system(directory).find(str(directory)))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _upload(path: Path, target: epath.Path) -> None:
    try:
        _file_system(target).put_file(str(path), str(target))
    except Exception as error:  # of Google's packages and aiohttp: no base class
        raise StoppedError(
            f"{target} cannot be written ({type(error).__name__}: {_one_line(error)}); what was "
            f"written before is whole: call again"
        ) from error


def _file_system(where: epath.Path) -> Any:
    import fsspec

    return fsspec.filesystem(str(where).partition("://")[0])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
