"""The accelerators' own compilers, which need no accelerator: libtpu, and JAX's CUDA plugin.

A GPU's compiler autotunes only on a GPU, so its figures here are without autotuning. They are also
without the workspaces of cuBLAS and cuDNN.
"""

import os
import re
from importlib.util import find_spec
from typing import Any

import jax

from kava_jax.plan.chips import Chip, topology_name
from kava_jax.plan.compiled import Memory, held, lowered, memory_of, uncached
from kava_jax.plan.gpus import GPUS, target_config
from kava_jax.runs.blueprint import Blueprint

# JAX's plugins for CUDA, of which one is installed at a time.
CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def described_devices(chip: Chip, devices: int) -> list[Any] | None:
    """Descriptions of ``devices`` chips, to make a mesh of.

    None where the chip's compiler is not installed, or there is no such slice of TPUs. The process
    must have ``jax_platforms=cpu`` (``planning.virtual_devices`` sees to it): otherwise the plugin
    looks for a driver.
    """
    if chip.name in GPUS:
        plugins, hosts = CUDA_PLUGINS, max(1, devices // chip.domain)
        # A topology has one number of devices for all hosts: unequal hosts cannot be written.
        even = devices == hosts * min(devices, chip.domain)
        topology = f"1x{hosts}x{devices // hosts}" if even else None
        settings: dict[str, Any] = {
            "platform": "cuda",
            "target_config": target_config(GPUS[chip.name]),
        }
        settings |= {"topology": topology}
    else:
        plugins, topology = ("libtpu",), topology_name(chip, devices)
        settings = {"platform": "tpu", "topology_name": topology}
        # There is no TPU here, and no server that knows about one.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        os.environ |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    if topology is None or not any(map(installed, plugins)):
        return None
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(**settings).devices)


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def own_memory(blueprint: Blueprint, rows: int, length: int) -> Memory:
    """The step's memory by the compiler of its devices, even where it is more than the chip has.

    ``blueprint.mesh`` consists of ``described_devices``. A GPU's compiler lays out any program. A
    TPU's refuses what does not fit; then only the temporaries are known, and results are 0.
    """
    program = lowered(blueprint, rows, length, dearest=True)
    try:
        with uncached():
            return memory_of(program.compile())
    except jax.errors.JaxRuntimeError as error:
        # "HLO temporaries" it says, and counts the arguments too.
        used = re.search(r"\(([\d.]+)([KMGT])\) exceeds available", str(error))
        # Any other failure of the compiler says nothing about memory.
        if used is None:
            raise
        # Units in the message are binary, unlike the decimal gigabytes of ``chips``.
        total = int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2])))
        arguments = sum(held(blueprint, rows, length).values())
        return Memory(arguments, 0, total - arguments)
