"""The ``kava`` command. Bad input ends in one line on stderr and exit code 2.

Heavy modules are imported inside the commands, so that ``kava --help`` answers at once.
"""

import os
import sys
from pathlib import Path

from kava_jax.cli import runs, studies
from kava_jax.cli.app import app
from kava_jax.errors import KavaError, PreemptedError, StoppedError, is_full_disk

__all__ = ["app", "main", "runs", "studies"]


def main() -> None:
    """Entry point: 0 done, 1 a check failed or a run stopped, 2 bad input, 75 preempted."""
    # Else transformers says on stderr, at every command, that there is no PyTorch; none is needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Compiled programs are kept from run to run; JAX reads this when it is imported.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "kava_jax" / "compiled"))
    try:
        app()
    except (KavaError, StoppedError, PreemptedError) as error:
        word = "preempted" if isinstance(error, PreemptedError) else "error"
        print(f"{word}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if not is_full_disk(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: no space is left on the disk{where}; make room and call again; what was "
            f"written before is whole",
            file=sys.stderr,
        )
        raise SystemExit(StoppedError.exit_code) from None
