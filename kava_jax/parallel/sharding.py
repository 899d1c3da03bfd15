"""Where every array lives: one table from logical axis names to mesh axes.

Modules name the axes of their parameters (``nnx.Param(..., axes=(...))``); this table says which
mesh axis each name is split over. A new mesh axis is a new entry here and nothing in the models.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kava_jax.errors import KavaError

RULES: dict[str | None, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ffw": "tensor",
    "kv_in": "fsdp",
    "kv_hidden": "tensor",
    "kv_out": None,
    None: None,
}


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def param_shardings(abstract: Any, mesh: Mesh) -> dict[str, Any]:
    """A NamedSharding for every parameter of an (abstract) ``nnx.State``, as a pure dict.

    A parameter with one more axis than it has names is a stack: its first axis is ``layers``.
    Raises KavaError listing every parameter whose axis does not divide by its mesh axis.
    """
    problems: list[str] = []

    def place(path: tuple[Any, ...], variable: Any) -> NamedSharding:
        shape = variable.get_value().shape
        names = variable.get_metadata().get("axes", (None,) * len(shape))
        names = ("layers",) * (len(shape) - len(names)) + tuple(names)
        mesh_axes = [RULES[name] for name in names]
        for name, size, axis in zip(names, shape, mesh_axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                where = "/".join(str(part) for part in path)
                problems.append(f"{where} axis {name}={size} over mesh.{axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, PartitionSpec(*mesh_axes))

    flat = {path: place(path, variable) for path, variable in nnx.to_flat_state(abstract)}
    if problems:
        raise KavaError(
            f"mesh does not divide {len(problems)} parameters: {'; '.join(problems)}; use a mesh "
            f"axis that divides them"
        )
    return nnx.traversals.unflatten_mapping(flat)


def matching_shardings(tree: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that repeats the parameters' paths, such as an optimizer's state.

    A leaf whose path ends with a parameter's path lies where that parameter lies; all others
    (counters) are replicated. ``params`` is the tree of the parameters' shardings.
    """
    by_path = {
        _names(path): sharding for path, sharding in jax.tree_util.tree_flatten_with_path(params)[0]
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            if names[start:] in by_path and np.ndim(leaf):
                return by_path[names[start:]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A key path as plain strings, whatever kind of container each part belongs to."""
    return tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays holding this process's rows -> global device arrays split over the batch axis."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
