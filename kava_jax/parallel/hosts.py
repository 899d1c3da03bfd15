"""Several processes that act as one: start-up, values in common, whole arrays on every host.

Processes meet at named places, the same on all of them. A process that waits there for too long
ends with an error that names the place and the processes that did not come. If a process has died,
JAX's own heartbeat notices it and ends all the others.
"""

import os
import re
import sys
from typing import Any

import jax
import numpy as np

from kava_jax.errors import KavaError, StoppedError, one_line
from kava_jax.parallel.cluster import Cluster

# Large pods take long to come up, and hosts read models and data at different speeds; JAX's own
# default of 300 s is too short for them.
PATIENCE_SECONDS = 1800
# Bytes of a text that ``from_all`` gathers.
_LONGEST = 500


def start(cluster: Cluster) -> None:
    """Join the other processes; to be called before anything else touches a device.

    Raises KavaError when JAX cannot find out who they are.
    """
    _keep_stdout_clean()
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            initialization_timeout=PATIENCE_SECONDS,
        )
    except ValueError as error:
        raise KavaError(
            f"the processes of this run are not known ({one_line(error)}); give "
            f"--coordinator HOST:PORT --processes N --process I"
        ) from None
    if jax.default_backend() == "cpu":
        # On CPUs a program from the compilation cache may send its messages in another order than
        # a freshly compiled one. Processes that mix the two fail (seen with jax 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)


def _keep_stdout_clean() -> None:
    """Gloo, which joins CPU processes, prints to the stdout that belongs to ``--json``."""
    # Gloo is C++ and writes to the file descriptor, so replacing sys.stdout alone would not stop
    # it.
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")


def meet(place: str) -> None:
    """Wait until every process is here.

    Raises StoppedError with the processes that did not come in time.
    """
    if jax.process_count() == 1:
        return
    # The client behind ``jax.distributed``, as Orbax uses it: JAX's public barrier has no timeout.
    from jax._src.distributed import global_state

    assert global_state.client is not None  # else there would be one process
    try:
        global_state.client.wait_at_barrier(f"kava_jax: {place}", 1000 * PATIENCE_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        if missing := absent(error):
            raise StoppedError(
                f"{missing} did not come to the place {place!r} within {PATIENCE_SECONDS} s; look "
                f"at what it says last, end all processes and call again"
            ) from error
        raise


def absent(error: BaseException | None) -> str | None:
    """The processes that a barrier's timeout names, in words; None for any other error."""
    # Libraries such as Orbax raise their own errors from the barrier's.
    while error is not None:
        if "Barrier timed out" in str(error):
            _, _, listed = str(error).partition("task names:")
            # Each on a line of its own, in any order: a number, or a path that ends in one.
            found = re.findall(r"(\d+)\s*$", listed.partition("RPC:")[0], re.MULTILINE)
            numbers = sorted(map(int, found))
            several = "processes" if len(numbers) > 1 else "process"
            return f"{several} {', '.join(map(str, numbers))}" if numbers else "a process"
        error = error.__cause__ or error.__context__
    return None


def from_first(number: int, place: str) -> int:
    """The first process's number, on all processes; every process must ask at the same place."""
    return int(from_all(str(int(number)), place)[0])  # a bool is a number too


def from_all(text: str, place: str) -> list[str]:
    """Every process's text, cut to 500 bytes, by process; every process must ask."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    # A collective operation waits without a limit; the barrier has one and names who is missing.
    meet(place)
    # All processes must gather arrays of one shape, so texts are cut and filled to a fixed length.
    own = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    rows = np.asarray(process_allgather(own))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def on_host(array: Any, place: str) -> np.ndarray:
    """The whole array in this host's memory; all processes must ask, for the same arrays.

    What lies on this host already, as numpy arrays do, is taken as it is.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    from jax.experimental.multihost_utils import process_allgather

    meet(place)
    # JAX gathers an array that is spread over processes only with tiled=True.
    return np.asarray(process_allgather(array, tiled=True))
