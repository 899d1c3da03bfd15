"""Several processes that act as one: start-up, values in common, whole arrays on every host."""

import os
import sys
from typing import Any

import jax
import numpy as np

from kava_jax.errors import KavaError
from kava_jax.parallel.cluster import Cluster

# Large pods take long to come up; JAX's own default of 300 s is too short for them.
STARTUP_SECONDS = 1800
# After so long without a sign of life a process counts as dead, and the others end.
HEARTBEAT_SECONDS = 30


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
            initialization_timeout=STARTUP_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise KavaError(
            f"the processes of this run are not known ({' '.join(str(error).split())}); give "
            f"--coordinator HOST:PORT --processes N --process I"
        ) from None


def _keep_stdout_clean() -> None:
    """Gloo, which joins CPU processes, prints to the stdout that belongs to ``--json``."""
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")


def from_first(number: int) -> int:
    """The first process's number, on all processes; every process must ask."""
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.asarray(number, np.int32)))


def on_host(array: Any) -> np.ndarray:
    """The whole array in this host's memory; all processes must ask, for the same arrays.

    What lies on this host already, as numpy arrays do, is taken as it is.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
