"""Several processes that act as one: start-up, and decisions that all of them must share."""

import jax
import numpy as np


def from_first(number: int) -> int:
    """The first process's number, on all processes; every process must ask."""
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.asarray(number, np.int32)))
