"""Meshes over the eight virtual devices of the test-suite."""

import jax
import pytest
from jax.sharding import AxisType

from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import AXES, batch_shards, make_mesh


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
