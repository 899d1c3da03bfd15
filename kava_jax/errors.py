"""Ends of a command that are not the program's fault, each with the exit code of its own.

The command line prints the message in one line on stderr, without a traceback. Library callers may
catch them.
"""

import errno


class KavaError(Exception):
    """Bad input: one line that names the field, its value and the remedy.

    Nothing has been written or changed when it is raised.
    """

    # The code that command-line parsers use for wrong arguments.
    exit_code = 2


class StoppedError(Exception):
    """A run that cannot go on by itself: a full disk, numbers not finite, a process that is stuck.

    What its last checkpoint holds is safe.
    """

    exit_code = 1


class PreemptedError(Exception):
    """A run that was asked to end (SIGTERM, a preemption notice); what it had done is saved.

    The same command goes on from there. 75 is ``EX_TEMPFAIL`` of sysexits.h: try again.
    """

    exit_code = 75


def is_full_disk(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, says that no space is left.

    Orbax and TensorStore say so in exceptions of many kinds.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        # Other exceptions have no errno. They repeat the system's own text for it.
        if "No space left on device" in str(error):
            return True
        # ``raise ... from None`` only hides the context from tracebacks, so it is followed too.
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """What an exception says, in one line that is not too long for a message."""
    return " ".join(str(error).split())[:300]
