"""One writer at a time: a lock on a directory that a run, a grid or a calibration writes to.

It is the operating system's lock on a file ``.lock`` there, so it ends with the process that holds
it, whatever ends that. Reading (``kava eval``, ``report``, ``export``) asks for no lock.

Left out on purpose: a lock in buckets, which know none that ends with its holder, and on file
systems that refuse it. Both are said.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import jax

from kava_jax.errors import KavaError, is_full_disk
from kava_jax.parallel.hosts import from_all
from kava_jax.storage import Place

LOCK_NAME = ".lock"


@contextmanager
def alone(directory: Place, field: str) -> Iterator[str | None]:
    """Hold the directory, for all processes of this run; the first one holds it for them.

    Yields what to say where there is no lock. Raises KavaError on all processes when another run
    holds it or it cannot be written to; every process must ask.
    """
    with ExitStack() as stack:
        note, problem = None, ""
        if jax.process_index() == 0:
            try:
                note = stack.enter_context(exclusive(directory, field))
            except KavaError as error:
                problem = str(error)
        # The other processes wait here, so they must hear that the first one failed, and why.
        if told := from_all(problem, f"lock of {field}")[0]:
            raise KavaError(told)
        yield note


@contextmanager
def exclusive(directory: Place, field: str) -> Iterator[str | None]:
    """Hold the directory for this process, made when absent; asks no device and no other process.

    Nothing is left at the end of what was made for the lock alone. Yields what to say where there
    is no lock. Raises KavaError when another process holds it, or it cannot be written to.
    """
    if not isinstance(directory, Path):
        yield _unlocked(field, directory, "a bucket knows no lock")
        return
    path = directory / LOCK_NAME
    try:
        absent = [one for one in (directory, *directory.parents) if not one.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, refused = _acquired(path, field)
    except (FileExistsError, NotADirectoryError):
        raise KavaError(f"{field}={directory} is a file; name a directory") from None
    except OSError as error:
        if is_full_disk(error):
            raise
        raise KavaError(
            f"{field}={directory} cannot be written to ({error.strerror}); name another directory"
        ) from None
    try:
        yield _unlocked(field, directory, refused) if refused else None
    finally:
        # Removed while it is held: once released, it may be the lock of the next run already.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty, as a run's directory is
            # The innermost comes first, since a directory can be removed only when it is empty.
            for one in absent:
                one.rmdir()


def _acquired(path: Path, field: str) -> tuple[int, str]:
    """The open lock file, and why the file system has no locks ("" when it is held)."""
    while True:
        # A child that inherited the descriptor would hold the lock after this process has ended.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Not lockf: its locks belong to a process, so a second run in it would get one too.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it since it was opened: then it guards nothing.
            if os.fstat(descriptor).st_nlink:
                # The name of a holder that was killed may be there still, and longer than ours.
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor, ""
        except OSError as error:
            # These two say that somebody else holds it; any other error, that there are no locks.
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return descriptor, f"its file system refuses locks: {error.strerror}"
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise KavaError(
                f"{field}={path.parent} is in use by {holder}; wait for its end, or name another "
                f"directory"
            ) from None
        os.close(descriptor)


def _unlocked(field: str, directory: Place, why: str) -> str:
    return f"{field}={directory} is not locked ({why}); see to it that nothing else writes there"
