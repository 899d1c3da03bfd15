"""Where every array lives: one table from logical axis names to mesh axes.

Modules name the axes of their parameters (``nnx.Param(..., axes=(...))``); this table says which
mesh axis each name is split over. A new mesh axis is a new entry here and nothing in the models.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import batch_shards

Indivisible = Literal["error", "replicate"]

# A layer's first products (q, k, v, gate, up) are split by what they give, its second ones (o,
# down) by what they take. Both lie on the tensor axis, so only the second need a sum over devices.
RULES: dict[str | None, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    # RoPE pairs the two halves of a head, so splitting a head would send them between devices.
    "head_dim": None,
    "ffw": "tensor",
    "experts": None,
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


class Layouts(NamedTuple):
    """Where arrays lie inside a step, said where the partitioner would choose badly.

    Left alone, it splits hidden states by width, as fsdp splits the weights, and holds the whole
    batch on every device; or it goes from one layout to the other by way of whole copies.
    """

    embedded: NamedSharding
    """Hidden states [B, T, D] as they are looked up: rows over data, width as the table's."""
    rows: NamedSharding
    """Everything else that has rows first: over data and fsdp."""
    head: NamedSharding
    """The LM head's table [V, D] while it is used: gathered over fsdp."""
    head_gradients: NamedSharding
    """Its gradient [shards, V, D] while each shard of the batch adds up its own."""


def layouts(mesh: Mesh) -> Layouts:
    """The layouts on a mesh."""
    rows, vocabulary = ("data", "fsdp"), RULES["vocab"]
    return Layouts(
        NamedSharding(mesh, PartitionSpec("data", None, RULES["embed"])),
        NamedSharding(mesh, PartitionSpec(rows)),
        NamedSharding(mesh, PartitionSpec(vocabulary, None)),
        NamedSharding(mesh, PartitionSpec(rows, vocabulary, None)),
    )


def param_shardings(
    abstract: Any, mesh: Mesh, indivisible: Indivisible = "error"
) -> tuple[dict[str, Any], list[str]]:
    """A NamedSharding for every parameter of an (abstract) ``nnx.State``, as a pure dict.

    A parameter with one more axis than it has names is a stack: its first axis is ``layers``. Axes
    that do not divide are repeated on every device under ``replicate``, and returned in words.

    Raises KavaError under ``error``, listing every such parameter and the nearest mesh that works.
    """
    flat, misfits = {}, []
    sizes: dict[str, list[int]] = {}
    for path, variable in nnx.to_flat_state(abstract):
        axes = []
        for name, size in _named_axes(variable):
            axis = RULES[name]
            if axis is not None:
                sizes.setdefault(axis, []).append(size)
            if axis is not None and size % mesh.shape[axis]:
                where = "/".join(str(part) for part in path)
                misfits.append(f"{where} ({name}={size} over mesh.{axis}={mesh.shape[axis]})")
                axis = None
            axes.append(axis)
        flat[path] = NamedSharding(mesh, PartitionSpec(*axes))
    if misfits and indivisible == "error":
        raise KavaError(
            f"mesh does not divide {len(misfits)} parameters: {'; '.join(misfits)}; use "
            f"{_nearest(mesh, sizes)}, or mesh.indivisible=replicate to repeat them on every device"
        )
    return nnx.traversals.unflatten_mapping(flat), misfits


def _named_axes(variable: Any) -> Iterator[tuple[str | None, int]]:
    shape = variable.get_value().shape
    names = variable.get_metadata().get("axes", (None,) * len(shape))
    return zip(("layers",) * (len(shape) - len(names)) + tuple(names), shape, strict=True)


def _nearest(mesh: Mesh, sizes: dict[str, list[int]]) -> str:
    """The mesh with the largest sizes up to this one's that divide everything; data fills."""
    shape = dict(mesh.shape)
    for axis, found in sizes.items():
        shape[axis] = math.gcd(mesh.shape[axis], *found)
        shape["data"] *= mesh.shape[axis] // shape[axis]
    return ", ".join(f"mesh.{axis}={size}" for axis, size in shape.items())


def matching_shardings(tree: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that repeats the parameters' paths, such as an optimizer's state.

    A leaf whose path ends with a parameter's path lies where that parameter lies; all others
    (counters) are replicated. ``params`` is the tree of the parameters' shardings.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    by_path = {jax.tree_util.keystr(path): sharding for path, sharding in flat}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        where = jax.tree_util.keystr(path)
        own = [param for param in by_path if where.endswith(param)]
        # The longest: a short one could also be the path of another parameter.
        return by_path[max(own, key=len)] if own and np.ndim(leaf) else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays with the rows of the whole batch -> device arrays split over the batch axis.

    Every process gives the same arrays, and each device takes the rows that the sharding asks of
    it. So rows keep their place whatever the mesh, and devices that hold the same rows (along the
    tensor axis) get the same ones, also where they belong to different processes.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index]),
        batch,
    )


def spread_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """As ``put_batch``, of any number of rows.

    The last row is repeated until the devices divide them; the caller drops what is added.
    """
    # A copy of a real row ends its answer when that row does, so the copies never prolong decoding.
    missing = -len(rows) % batch_shards(mesh)
    return put_batch(np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]), mesh)
