"""Which processes make up this run: from flags, or from what a scheduler left in the environment.

The only reader of cluster variables. Imports no JAX, so that asking costs nothing; joining the
processes is ``hosts.start``. TPU hosts that only the cloud's metadata knows have to be asked for
(``detect``), because asking takes a while and fails on a laptop.
"""

from collections.abc import Mapping
from typing import NamedTuple

from kava_jax.errors import KavaError

# Variables that hold the number of processes under the launchers that JAX itself can read, SLURM
# and Open MPI. SLURM's is that of a step: inside an allocation but outside of srun there is one
# process.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# The hosts of a TPU slice under GKE, separated by commas.
TPU_HOSTS = "TPU_WORKER_HOSTNAMES"


class Cluster(NamedTuple):
    """The processes of a run. All None: JAX finds them out by itself."""

    coordinator: str | None = None
    """``host:port`` of process 0."""
    processes: int | None = None
    process: int | None = None


def find_cluster(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    detect: bool = False,
) -> Cluster | None:
    """The cluster that flags or environment speak of; None for a single process.

    Raises KavaError when the flags are not complete or do not fit together.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if coordinator is None or processes is None or process is None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) < len(given):
            raise KavaError(
                f"--{' and --'.join(missing)} missing; give --coordinator, --processes and "
                f"--process together, or none of them"
            )
        counts = (environment.get(name, "") for name in COUNTS)
        several = any(count.isdigit() and int(count) > 1 for count in counts)
        # A slice of a single host has one name without a comma.
        several = several or "," in environment.get(TPU_HOSTS, "")
        return Cluster() if several or detect else None
    # The last colon, because an IPv6 address contains others.
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise KavaError(
            f"--coordinator={coordinator} is not host:port; give the address of process 0, for "
            f"example 10.0.0.1:8476"
        )
    if not 0 <= process < processes:
        raise KavaError(
            f"--process={process} is not one of {processes} processes; number them from 0 to "
            f"{processes - 1}"
        )
    return Cluster(coordinator, processes, process)
