"""The device mesh of a run: all devices of all processes, over one host or many."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from kava_jax.errors import KavaError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Devices as a mesh ``(data, fsdp, tensor)``, all of all processes unless given.

    One axis may be -1: it takes what the others leave.

    Devices are laid out host by host, the tensor axis innermost, because it needs the network most:
    an axis crosses hosts only where it and those inside of it are larger than a host. On TPUs of
    several slices the data axis alone crosses the slow network between slices, because it needs the
    least of it (one sum of gradients a step).

    Raises KavaError when the sizes do not multiply to the number of devices, or TPU slices do not
    divide the data axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        written = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise KavaError(
            f"{written} does not use exactly the {len(devices)} devices; make the product "
            f"{len(devices)} or set one axis to -1"
        )
    # Auto: the partitioner chooses layouts, and with_sharding_constraint corrects it in a few
    # places.
    types = (AxisType.Auto,) * len(AXES)
    slices = len(slices_of(devices))
    if slices > 1:
        return Mesh(over_slices(devices, **sizes), AXES, axis_types=types)
    if devices[0].platform == "tpu":  # JAX knows the torus
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    # The runtime numbers devices host by host.
    host_by_host = sorted(devices, key=lambda device: device.id)
    return Mesh(np.array(host_by_host).reshape(tuple(sizes.values())), AXES, axis_types=types)


def over_slices(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> np.ndarray:
    """TPUs of several slices as an array [data, fsdp, tensor], slices along the data axis."""
    slices = len(slices_of(devices))
    check_slices(data, slices)
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices
    )


def check_slices(data: int, slices: int) -> None:
    """Raise KavaError if the number of TPU slices does not divide the data axis."""
    if data % slices:
        raise KavaError(
            f"mesh.data={data} is not divisible by the {slices} slices, which it has to cross; use "
            f"a multiple of {slices}, for example mesh.data={slices} and mesh.fsdp=-1"
        )


def slices_of(devices: Sequence[Any]) -> set[int]:
    """The TPU slices that devices belong to.

    Other platforms have one: there JAX gives every host a ``slice_index`` of its own (it counts
    boot ids), which says nothing about the network.
    """
    if devices[0].platform != "tpu":
        return {0}
    # The devices of a topology description have no index: they are one slice.
    return {getattr(device, "slice_index", 0) for device in devices}


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
