"""Meshes over the eight virtual devices of the test-suite."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import AXES, batch_shards, make_mesh, over_slices, slices_of


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"tensor": 4}, (2, 1, 4)),
        ({"data": 4, "fsdp": 2, "tensor": -1}, (4, 2, 1)),
    ],
)
def test_sizes(asked: dict[str, int], shape: tuple[int, ...]) -> None:
    mesh = make_mesh(**asked)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())
    assert batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    "asked",
    [{"data": 3}, {"data": 1}, {"tensor": 3}, {"data": 16}, {"data": -1, "fsdp": 16}],
)
def test_sizes_that_do_not_use_all_devices(asked: dict[str, int]) -> None:
    with pytest.raises(KavaError, match=r"mesh\.data=.* the 8 devices.*-1") as caught:
        make_mesh(**asked)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Device:
    """What a device of a pod looks like to the mesh: four to a host, each host a "slice"."""

    id: int
    platform: str = "gpu"
    device_kind: str = "made up"
    core_on_chip: int = 0

    @property
    def slice_index(self) -> int:
        """On GPUs JAX counts boot ids, which are those of hosts."""
        return self.id // 4

    @property
    def process_index(self) -> int:
        """A process a host."""
        return self.id // 4

    @property
    def coords(self) -> tuple[int, int, int]:
        """Of TPUs: where in the slice's torus."""
        return (self.id % 2, self.id // 2 % 2, 0)


def hosts_along(mesh: np.ndarray, axis: int) -> int:
    """How many hosts a row of devices along the axis spans."""
    rows = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])
    return max(len({device.process_index for device in row}) for row in rows)


@pytest.mark.parametrize(
    ("asked", "hosts"),
    [
        ({"data": 1, "fsdp": -1}, (1, 2, 1)),
        ({"data": 2, "fsdp": 4}, (2, 1, 1)),
        ({"data": 2, "fsdp": 1, "tensor": 4}, (2, 1, 1)),
        ({"data": 1, "fsdp": 4, "tensor": 2}, (1, 2, 1)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 1, 1)),
    ],
)
def test_any_axis_crosses_hosts_of_gpus_inner_ones_last(
    asked: dict[str, int], hosts: tuple[int, ...]
) -> None:
    devices = [Device(i) for i in range(8)]
    assert slices_of(devices) == {0}
    for order in (devices, devices[::-1]):
        mesh = make_mesh(**asked, devices=order)
        assert tuple(hosts_along(mesh.devices, axis) for axis in range(3)) == hosts


def test_only_the_data_axis_crosses_slices_of_tpus() -> None:
    devices = [Device(i, "tpu") for i in range(8)]
    assert slices_of(devices) == {0, 1}
    assert slices_of(jax.devices()) == {0}
    for sizes in ((2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)):
        found = over_slices(devices, *sizes)
        assert found.shape == sizes
        assert {device.id for device in found.flat} == set(range(8))
        for row in found.reshape(2, -1):  # each half of the data axis lies within one slice
            assert len({device.slice_index for device in row}) == 1
    with pytest.raises(KavaError, match=r"mesh.data=1 is not divisible by the 2 slices.*fsdp=-1"):
        over_slices(devices, 1, 8, 1)
