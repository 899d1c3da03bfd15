"""A smaller model out of a bigger one: fewer layers, fewer KV heads, fewer feed-forward units.

Vocabulary and hidden width stay. Every parameter of the cut model is read from the teacher's files
by slice when it is asked for. So a cut onto a mesh reads what its devices hold, and a cut into a
directory holds one shard of the result and a few tensors.

Left out on purpose: which layers and units are kept (``runs.cutting``), and training.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from kava_jax.alignment.layer_map import make_layer_map
from kava_jax.errors import KavaError
from kava_jax.hf.config_json import FloatName
from kava_jax.hf.cut_record import CutRecord
from kava_jax.hf.load import (
    Put,
    Read,
    ReadLayer,
    cast,
    check_finite,
    layer_reader,
    open_checked,
    put_whole,
    stacked,
)
from kava_jax.hf.merge import Turns, find_turns, turned
from kava_jax.hf.names import Index, Row, Shape, expected_tensors, parameter_shapes, rows_of
from kava_jax.hf.tensor_files import TensorFiles
from kava_jax.models.spec import DecoderSpec

# Which layers are kept of a number of them; the last two are measured.
Rule = Literal["middle", "evenly", "best_layers", "best_block"]
MEASURED: tuple[Rule, ...] = ("best_layers", "best_block")


def plan_cut(
    spec: DecoderSpec,
    layers: tuple[int, ...] | int | None,
    rule: Rule,
    kv_heads: int | None,
    intermediate_size: int | None,
    *,
    teacher: str,
    fingerprint: str,
) -> CutRecord:
    """What is kept of a teacher: layers by name, by number and rule, or all of them.

    ``middle`` takes a block out of the middle, ``evenly`` keeps the first and the last layer.
    Layers of a measured rule and units are the first ones, as many as there will be, until they
    are measured. ``teacher`` and ``fingerprint`` are for the record.

    Raises KavaError for layers, heads and units that the teacher does not have.
    """
    if spec.num_experts:
        raise KavaError(
            f"teacher={teacher}: a mixture of experts ({spec.family}) is not cut here, since what "
            "is left could not be trained; give a dense model"
        )
    depth, count = spec.num_layers, spec.num_kv_heads
    keep = depth if layers is None else layers
    if isinstance(keep, int):
        if not 1 <= keep <= depth:
            raise KavaError(
                f"layers={keep}: the teacher has {depth} layers; keep 1 to {depth} of them"
            )
        first = keep if rule in MEASURED else -(-keep // 2)
        keep = (*range(first), *range(depth - keep + first, depth))
        if rule == "evenly":
            keep = make_layer_map("ratio", depth, len(keep)).read_layers
    if not keep or any(a >= b for a, b in pairwise((-1, *keep, depth))):
        raise KavaError(
            f"layers={','.join(map(str, keep))}: the teacher has {depth} layers; name some of 0 to "
            f"{depth - 1}, each once, in ascending order"
        )
    heads = count if kv_heads is None else kv_heads
    if heads < 1 or count % heads:
        allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise KavaError(
            f"kv_heads={heads} does not divide the teacher's {count} KV heads; use one of {allowed}"
        )
    if heads < count and spec.qk_norm_over_heads:
        raise KavaError(
            f"kv_heads={heads}: this teacher norms the keys of all its heads together, so merged "
            f"ones would be normed otherwise; keep its {count}"
        )
    width, units = spec.intermediate_size, intermediate_size
    if units is not None and not 1 <= units <= width:
        raise KavaError(
            f"intermediate_size={units}: the teacher has {width} units in a layer; keep 1 to "
            f"{width} of them"
        )
    return CutRecord(
        teacher=teacher,
        fingerprint=fingerprint,
        teacher_layers=depth,
        layers=keep,
        kv_heads=tuple(map(tuple, np.arange(count).reshape(heads, -1).tolist())),
        units=None if units in (None, width) else (tuple(range(units)),) * len(keep),
    )


def keys_stay(spec: DecoderSpec) -> str | None:
    """Why keys are not turned before they are merged; None where they are."""
    if spec.qk_norm:
        return "a norm follows"
    return None if spec.rotary_dim is None else "they are rotated in part"


def cut_spec(spec: DecoderSpec, cut: CutRecord) -> DecoderSpec:
    """The geometry of what is left; ``spec`` is the teacher's."""
    return replace(
        spec.among(cut.layers),
        num_kv_heads=len(cut.kv_heads),
        intermediate_size=len(cut.units[0]) if cut.units else spec.intermediate_size,
    )


def stored_dtype(directory: Path, spec: DecoderSpec) -> FloatName:
    """The narrowest dtype that holds all of a directory's weights (of float64, float32)."""
    files, names = open_checked(directory, spec), {"F16": "float16", "BF16": "bfloat16"}
    stored = (files.tensors[name].dtype for name in expected_tensors(spec))
    wide = functools.reduce(jnp.promote_types, {names.get(dtype, "float32") for dtype in stored})
    return jnp.dtype(wide).name  # pyright: ignore[reportReturnType]  (one of these three)


def load_cut_params(
    directory: Path,
    spec: DecoderSpec,
    cut: CutRecord,
    *,
    put: Put = put_whole,
) -> dict[str, Any]:
    """The parameters of the cut model in float32, read from its teacher's files.

    ``spec`` is the teacher's. Arguments, result and errors are as of ``load.load_decoder_params``.
    """
    files, dtype = open_checked(directory, spec), np.dtype(np.float32)
    read = _parameters(files, spec, cut, dtype)
    flat = {path: put(path, shape, dtype, part) for path, shape, part in read}
    check_finite(files)
    return unflatten_dict(flat, sep="/")


def cut_on_disk(
    directory: Path, spec: DecoderSpec, cut: CutRecord, dtype: FloatName
) -> dict[str, Any]:
    """The same for ``export.export_model``: an ``OnDisk`` in the place of each parameter.

    ``dtype`` is that of what is read.
    """
    files = open_checked(directory, spec)
    read = _parameters(files, spec, cut, jnp.dtype(dtype))
    flat = {path: OnDisk(shape, part, files) for path, shape, part in read}
    return unflatten_dict(flat, sep="/")


def merging_maps(directory: Path, spec: DecoderSpec, cut: CutRecord) -> dict[str, Any]:
    """The linear maps by which a cut merges the KV heads of each layer that it keeps.

    ``y = x @ kernel + bias`` takes a teacher layer's keys (before RoPE, with their bias) or values,
    all heads side by side, to those of the cut model's heads for the same input. By part ("k",
    "v") {"out": {"kernel": [P, K*H, K'*H], "bias": [P, K'*H]}} in float32, as a projector with a
    map per layer holds them; the bias is 0. ``directory`` and ``spec`` are the teacher's. Keys
    behind a norm are merged by their mean, as the cut does with what is normed.
    """
    count, left, width = spec.num_kv_heads, len(cut.kv_heads), spec.head_dim
    turns = _turns_of_layers(open_checked(directory, spec), spec, left)
    basis = np.eye(count * width).reshape(-1, count, width)

    def merged(part: str, layer: int) -> np.ndarray:
        heads = turned(f"blocks/attention/{part}/kernel", basis, turns(layer), range(count))
        return heads.reshape(-1, left, count // left, width).mean(2).reshape(-1, left * width)

    maps = {}
    for part in ("k", "v"):
        kernel = np.stack([merged(part, layer) for layer in cut.layers]).astype(np.float32)
        maps[part] = {"out": {"kernel": kernel, "bias": np.zeros_like(kernel[:, 0])}}
    return maps


@dataclass(frozen=True)
class OnDisk:
    """A parameter that is read when it is indexed.

    Raises KavaError then, for NaN and infinity.
    """

    shape: Shape
    read: Read
    files: TensorFiles

    def __getitem__(self, layer: int | EllipsisType) -> np.ndarray:
        """One layer of a stacked parameter, or with ``...`` the whole."""
        first = slice(layer, layer + 1) if isinstance(layer, int) else slice(0, self.shape[0])
        part = self.read((first, *(slice(0, size) for size in self.shape[1:])))
        check_finite(self.files)
        return part[0] if isinstance(layer, int) else part


def _parameters(
    files: TensorFiles, spec: DecoderSpec, cut: CutRecord, dtype: np.dtype
) -> Iterator[tuple[str, Shape, Read]]:
    """Path, shape and reader of every parameter of the cut model."""
    ours = cut_spec(spec, cut)
    shapes = parameter_shapes(ours)
    turns = _turns_of_layers(files, spec, ours.num_kv_heads)
    for row in rows_of(ours):
        axes = row.our_axes.split()
        if {"K", "N"} & set(axes) and ours.num_kv_heads < spec.num_kv_heads:
            exact = layer_reader(row, files, spec, np.dtype(np.float64))
            read = _merged(exact, row, spec, ours.num_kv_heads, turns, dtype)
        else:
            read = layer_reader(row, files, spec, dtype)
        if "F" in axes and cut.units is not None:
            chosen = dict(zip(cut.layers, cut.units, strict=True))
            read = _of_units(read, axes.index("F"), chosen)
        layers = cut.layers if row.stacked else 0
        yield row.ours, shapes[row.ours], stacked(read, layers, row.our_shape(ours), dtype)


def _of_units(read: ReadLayer, axis: int, units: dict[int, tuple[int, ...]]) -> ReadLayer:
    """The chosen units of each layer, along one axis."""

    def chosen(index: Index, layer: int) -> np.ndarray:
        wanted = np.array(units[layer][index[axis]])
        # Files are read in one stretch, from the first unit to the last.
        between = slice(int(wanted[0]), int(wanted[-1]) + 1)
        part = read((*index[:axis], between, *index[axis + 1 :]), layer)
        return np.take(part, wanted - wanted[0], axis)

    return chosen


def _merged(
    exact: ReadLayer,
    row: Row,
    spec: DecoderSpec,
    left: int,
    turns: Callable[[int], Turns],
    dtype: np.dtype,
) -> ReadLayer:
    """A parameter of q, k, v or o with its heads turned, and KV heads merged.

    ``exact`` reads the teacher's in float64.
    """
    axes, own = row.our_axes.split(), "K" in row.our_axes
    at, width = axes.index("K" if own else "N"), axes.index("H")
    count, each = (left, spec.num_kv_heads // left) if own else (spec.num_heads, 1)
    readers = 1 if own else spec.num_heads // spec.num_kv_heads

    def read(index: Index, layer: int) -> np.ndarray:
        asked = range(count)[index[at]]
        heads = range(asked.start * each, asked.stop * each)
        theirs, inside = [*index], [slice(None)] * len(index)
        theirs[at] = slice(heads.start, heads.stop)
        # Turns mix the numbers of a head, so heads are read whole and cut afterwards.
        theirs[width], inside[width] = slice(None), index[width]
        owners = [head // readers for head in heads]
        part = turned(row.ours, exact(tuple(theirs), layer), turns(layer), owners)
        grouped = part.reshape(*part.shape[:at], len(asked), each, *part.shape[at + 1 :])
        return cast(grouped.mean(at + 1)[tuple(inside)], dtype, row.name(layer))

    return read


def _turns_of_layers(files: TensorFiles, spec: DecoderSpec, left: int) -> Callable[[int], Turns]:
    """How the KV heads of a layer are turned before they are merged; found when first asked."""
    rows = {row.ours: row for row in rows_of(spec)}

    def whole(module: str, layer: int) -> np.ndarray:
        """Kernel and bias [D or D + 1, K, H], zero where a number is not finite."""
        parts = []
        for leaf in ("kernel", "bias"):
            if (row := rows.get(f"blocks/attention/{module}/{leaf}")) is not None:
                everything = (slice(None),) * len(row.our_axes.split())
                found = layer_reader(row, files, spec, np.dtype(np.float64))(everything, layer)
                parts.append(found.reshape(-1, spec.num_kv_heads, spec.head_dim))
        both = np.concatenate(parts)
        # ``check_finite`` names the tensor later; a decomposition would fail first, without a name.
        return np.where(np.isfinite(both), both, 0)

    # Kept for all layers: readers of q, k, v and o need them, and devices each for their slice.
    @functools.cache
    def turns(layer: int) -> Turns:
        k, v = whole("k", layer), whole("v", layer)
        return find_turns(k, v, left, turn_keys=keys_stay(spec) is None)

    return turns
