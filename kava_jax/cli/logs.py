"""What the libraries below say: their warnings and errors, and with ``--verbose`` everything.

JAX, Orbax (which speaks as ``absl``) and the others go through Python's ``logging``; their lines
come to stderr with the name of who speaks.
"""

import logging
import os
import sys
from typing import Any

# Orbax warns of what is meant so: a run that is only read, a checkpoint that was not evaluated.
_MEANT = (
    "read_only=True, setting save_interval_steps",
    "Given directory is read only",
    "Requested `tracked_metric`; did not provide metrics",
)
_NAME = "kava_jax"


def show_logs(verbose: bool) -> None:
    """From here on; a second call takes the place of the first. To be called before JAX is used."""
    handler = _Stderr()
    handler.set_name(_NAME)
    if verbose:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        )
        # Of the compiler and the runtime, which are not written in Python; JAX asks for warnings.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        handler.addFilter(_worth_saying)
    root, level = logging.getLogger(), logging.INFO if verbose else logging.WARNING
    for earlier in [one for one in root.handlers if one.get_name() == _NAME]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("absl").setLevel(level)  # it does not ask the root


def _worth_saying(record: logging.LogRecord) -> bool:
    """Neither what is meant so, nor an error with a traceback, which Orbax raises as well."""
    if record.name != "absl":
        return True
    return record.exc_info is None and not any(words in record.getMessage() for words in _MEANT)


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what stderr is at the moment: the progress display puts itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  (never set)
        return sys.stderr
