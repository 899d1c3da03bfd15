"""What a command needs around it: streams that take every character, a place to keep programs."""

import io
import os
import sys
from pathlib import Path


def fit_surroundings() -> None:
    """To be called before anything is printed, and before JAX and transformers are imported."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it is None where there is none
            # A character that the locale does not have is shown by its number.
            stream.reconfigure(errors="backslashreplace")
    # Else transformers says on stderr, at every command, that there is no PyTorch; none is needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Compiled programs are kept from run to run; JAX reads this when it is imported.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    # For a user without a home directory ``~`` stays as it is: a folder of that name would be
    # made in the working directory.
    if caches.is_absolute() and _can_write(caches):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "kava_jax" / "compiled"))


def _can_write(place: Path) -> bool:
    """Whether a folder of this name can be made, or written to where it is."""
    # Not Path.exists, which raises where a parent may not be searched.
    existing = next(path for path in (place, *place.parents) if os.path.exists(path))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
