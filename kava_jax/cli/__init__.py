"""The ``kava`` command. Bad input ends in one line on stderr and exit code 2.

Heavy modules are imported inside the commands, so that ``kava --help`` answers at once; even the
commands are imported inside ``main``, so that Ctrl-C is heard before.
"""

import sys

from kava_jax.cli.signals import Ending
from kava_jax.errors import KavaError, PreemptedError, StoppedError, is_full_disk

__all__ = ["main"]


def main() -> None:
    """Entry point; the exit codes are listed in docs/troubleshooting.md."""
    with Ending():
        # JAX and transformers read the environment when they are imported, so this comes first.
        from kava_jax.cli.surroundings import fit_surroundings

        fit_surroundings()
        from kava_jax.cli import run_commands, studies  # noqa: F401  (their commands join the app)
        from kava_jax.cli.app import app

        try:
            return app()
        except (KavaError, StoppedError, PreemptedError) as error:
            ended = error
        except UnicodeEncodeError as error:  # of a path, or an argument whose bytes are no text
            ended = KavaError(
                f"{error.object!a} cannot be written as {error.encoding}; use names of plain "
                f"letters, or set PYTHONUTF8=1 where the locale is not UTF-8"
            )
        except OSError as error:
            if not is_full_disk(error):
                raise
            where = f" ({error.filename})" if error.filename else ""
            ended = StoppedError(
                f"no space is left on the disk{where}; make room and call again; what was written "
                f"before is whole"
            )
        word = "preempted" if isinstance(ended, PreemptedError) else "error"
        # A library's words inside a message may have line breaks, and an error is one line.
        print(f"{word}: {' '.join(str(ended).split())}", file=sys.stderr)
        raise SystemExit(ended.exit_code)
