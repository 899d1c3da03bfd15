"""The device mesh of a run. Multi-slice meshes and multi-host start-up come with the pod work."""

import math

import jax
from jax.sharding import AxisType, Mesh

from kava_jax.errors import KavaError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All devices of all processes as a mesh ``(data, fsdp, tensor)``; one axis may be -1 (fill).

    Raises KavaError when the sizes do not multiply to the number of devices.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    devices = jax.device_count()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        written = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise KavaError(
            f"{written} does not use exactly the {devices} devices; make the product {devices} or "
            f"set one axis to -1"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the batch axis is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
