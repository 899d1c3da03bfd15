"""Logging: the libraries' warnings and errors on stderr, and with ``--verbose`` everything.

JAX, Orbax (whose logger is ``absl``) and the others use Python's ``logging``. Every line has the
name of its logger.
"""

import logging
import os

# Orbax warns of what is intended: a run that is only read, a checkpoint that was not evaluated.
_INTENDED = (
    "read_only=True, setting save_interval_steps",
    "Given directory is read only",
    "Requested `tracked_metric`; did not provide metrics",
)


def show_logs(verbose: bool) -> None:
    """Show them from here on. Call it before JAX is used; a second call replaces the first."""
    # Python's own, which writes to what ``sys.stderr`` is at the moment: the progress display
    # replaces it.
    handler, form = logging.lastResort, "%(levelname)s %(name)s: %(message)s"
    assert handler is not None
    handler.removeFilter(_worth_saying)
    if verbose:
        form = f"%(asctime)s {form}"
        # Of the compiler and the runtime, which are not written in Python; JAX asks for warnings.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")
    else:
        handler.addFilter(_worth_saying)
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    level = logging.INFO if verbose else logging.WARNING
    # absl does not ask the root.
    for one in (handler, logging.getLogger(), logging.getLogger("absl")):
        one.setLevel(level)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Neither what is intended, nor an error with a traceback, which Orbax raises as well."""
    if record.name != "absl":
        return True
    return record.exc_info is None and not any(words in record.getMessage() for words in _INTENDED)
