"""Who the processes are: flags, schedulers' variables, and what does not fit together."""

import pytest

from kava_jax.errors import KavaError
from kava_jax.parallel.cluster import Cluster, find_cluster


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # in an allocation, outside of srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_scheduler_is_recognised_by_its_variables(environment, several):
    assert find_cluster(environment) == (Cluster() if several else None)


def test_flags_say_it_and_a_tpu_pod_is_asked_on_demand():
    flags = {"coordinator": "10.0.0.1:8476", "processes": 4, "process": 3}
    assert find_cluster({}, **flags) == Cluster("10.0.0.1:8476", 4, 3)
    assert find_cluster({"SLURM_STEP_NUM_TASKS": "9"}, **flags) == Cluster("10.0.0.1:8476", 4, 3)
    assert find_cluster({}, detect=True) == Cluster()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"processes": 2, "process": 0}, r"--coordinator missing; give --coordinator, --processes"),
        ({"coordinator": "a:1"}, r"--processes and --process missing"),
        (
            {"coordinator": "a", "processes": 2, "process": 0},
            r"--coordinator=a is not host:port; .* example 10.0.0.1:8476",
        ),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            r"--process=2 is not one of 2 processes; number them from 0 to 1",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(flags, words):
    with pytest.raises(KavaError, match=words):
        find_cluster({}, **flags)
