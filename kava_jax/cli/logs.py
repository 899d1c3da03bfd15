"""Logging: the libraries' warnings and errors on stderr, and with ``--verbose`` everything.

JAX, Orbax (whose logger is ``absl``) and the others use Python's ``logging``. Every line has the
name of its logger.
"""

import logging
import os
import sys
from typing import Any

# Orbax warns of what is intended: a run that is only read, a checkpoint that was not evaluated.
_INTENDED = (
    "read_only=True, setting save_interval_steps",
    "Given directory is read only",
    "Requested `tracked_metric`; did not provide metrics",
)
_NAME = "kava_jax"


def show_logs(verbose: bool) -> None:
    """Show them from here on. Call it before JAX is used; a second call replaces the first."""
    handler = _Stderr()
    handler.set_name(_NAME)
    form = "%(levelname)s %(name)s: %(message)s"
    if verbose:
        form = f"%(asctime)s {form}"
        # Of the compiler and the runtime, which are not written in Python; JAX asks for warnings.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")
    else:
        handler.addFilter(_worth_saying)
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    root, level = logging.getLogger(), logging.INFO if verbose else logging.WARNING
    # A list of its own: removing a handler changes the one that is walked.
    for earlier in [one for one in root.handlers if one.get_name() == _NAME]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("absl").setLevel(level)  # it does not ask the root


def _worth_saying(record: logging.LogRecord) -> bool:
    """Neither what is intended, nor an error with a traceback, which Orbax raises as well."""
    if record.name != "absl":
        return True
    return record.exc_info is None and not any(words in record.getMessage() for words in _INTENDED)


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what ``sys.stderr`` is at the moment: the progress display replaces it."""

    def __init__(self) -> None:
        # StreamHandler's own would assign ``stream``, which is a property without a setter.
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  (never set)
        return sys.stderr
