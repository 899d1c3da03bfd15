"""Weights from a Hugging Face directory into our parameter tree, by slice and without torch.

Every tensor of the model is checked by name, shape and dtype from the file headers before a byte
of data is read. Parameters are then read one at a time, each through a ``read(index)`` that touches
only the part it is asked for, so a sharded load never holds more than one device's slice.

Left out on purpose: pickled weights, quantized tensors, and renaming guesses for unknown tensors.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from kava_jax.errors import KavaError
from kava_jax.hf.geometry import spec_from_config
from kava_jax.hf.names import Index, Row, Shape, compact, expected_tensors, rows_of, tail_path
from kava_jax.models.spec import DecoderSpec
from kava_jax.storage import Place

Read = Callable[[Index], np.ndarray]
Put = Callable[[str, Shape, np.dtype, Read], jax.Array]

_FLOATS = ("F64", "F32", "F16", "BF16")
# Old Llama exports carry the rotary frequencies, which follow from the config.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def read_json(path: Place) -> dict[str, Any]:
    """Parse a JSON object; a ``KavaError`` names the file when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KavaError(
            f"{path.parent.name}/{path.name} is unreadable JSON ({error}); restore the file"
        ) from error
    if not isinstance(value, dict):
        raise KavaError(f"{path.parent.name}/{path.name} is not a JSON object; restore the file")
    return value


def read_spec(directory: Path) -> DecoderSpec:
    """Geometry of the model in a Hugging Face directory."""
    return spec_from_config(read_json(directory / "config.json"), where=directory.name)


def load_decoder_params(
    directory: Path,
    spec: DecoderSpec,
    *,
    layers: int | None = None,
    tail: bool = False,
    head: bool = True,
    param_dtype: Any = jnp.float32,
    put: Put | None = None,
) -> dict[str, Any]:
    """Read a decoder's parameters as a nested dict of arrays, blocks stacked over layers.

    Args:
        directory: a Hugging Face directory with ``model.safetensors`` or a sharded index.
        spec: its geometry (:func:`read_spec`).
        layers: how many full blocks to keep, all by default.
        tail: also keep the norm and K/V projections of layer number ``layers`` (a cut teacher).
        head: keep the final norm and, unless tied, the LM head.
        param_dtype: dtype of the result; files may hold float64, float32, float16 or bfloat16.
        put: ``put(path, shape, dtype, read) -> jax.Array`` places one parameter; ``read(index)``
            takes a tuple of step-1 slices over ``shape`` and reads only that part from disk, as
            ``jax.make_array_from_callback`` wants it. By default the whole array is put on the
            default device.

    Raises:
        KavaError: a file is truncated or missing, or tensors are missing, unexpected, mis-shaped
            or of a dtype that cannot be read; all of them are listed.
    """
    depth = spec.num_layers if layers is None else layers
    if not 0 <= depth + tail <= spec.num_layers:
        raise KavaError(f"layers={depth} with tail={tail} exceeds num_layers={spec.num_layers}")
    dtype, put = jnp.dtype(param_dtype), put or _put_whole
    tree: dict[str, Any] = {}
    files = TensorFiles(directory)
    check_tensors(files, spec)
    for row in rows_of(spec):
        if not row.stacked and not head and not row.ours.startswith("embed/"):
            continue
        if not row.stacked or depth:
            _plant(tree, row.ours, _place(row, files, spec, depth, dtype, put))
        if tail and (path := tail_path(row)) is not None:
            reader = _layer_reader(row, files, spec, depth, dtype)
            _plant(tree, path, put(path, row.our_shape(spec), dtype, reader))
    return tree


class Tensor(NamedTuple):
    """What a file's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The safetensors files of a directory, read by slice.

    A file is open only while a slice of it is read: what is mapped counts as this process's memory,
    and a teacher's files together are as large as the teacher.
    """

    def __init__(self, directory: Path):
        """Read every file's header, and no tensor data."""
        self.tensors: dict[str, Tensor] = {}
        self.directory = directory
        for name in _weight_files(directory):
            with self._opened(directory / name) as file:
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    found = file.get_slice(key)
                    shape = tuple(found.get_shape())
                    self.tensors[key] = Tensor(directory / name, shape, found.get_dtype())

    def read(self, name: str, index: Index) -> np.ndarray:
        """One part of one tensor."""
        with self._opened(self.tensors[name].file) as file:
            return file.get_slice(name)[index]

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="np") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise KavaError(
                f"{self.directory.name}/{path.name} is truncated or damaged ({error}); "
                "download or copy it again"
            ) from error


def check_tensors(files: TensorFiles, spec: DecoderSpec) -> None:
    """Raise one ``KavaError`` that lists every missing, unexpected or unfit tensor."""
    expected = expected_tensors(spec)
    present = {name for name in files.tensors if not _IGNORED.search(name)}
    shapes = {name: files.tensors[name].shape for name in present}
    faults = []
    if spec.tie_embeddings and "lm_head.weight" in present:
        # Some exports store the tied head a second time; it is checked and not read.
        expected |= {"lm_head.weight": (spec.vocab_size, spec.hidden_size)}
    for word, names in (
        ("missing", [name for name in expected if name not in present]),
        ("unexpected", sorted(present - set(expected))),
    ):
        if names:
            faults.append(f"{word}: {', '.join(compact(names))}")
    known = [name for name in expected if name in present]
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(expected[name])}"
        for name in known
        if shapes[name] != expected[name]
    ]
    if wrong:
        faults.append("wrong shape: " + ", ".join(wrong))
    unread = [f"{n} is {t}" for n in known if (t := files.tensors[n].dtype) not in _FLOATS]
    if unread:
        faults.append(f"wrong dtype (readable are {', '.join(_FLOATS)}): " + ", ".join(unread))
    if faults:
        raise KavaError(
            f"{files.directory.name}: tensors do not fit config.json ({spec.family}): "
            + "; ".join(faults)
            + "; use matching weights and config.json"
        )


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Cast floats; a ``KavaError`` when a finite value would overflow to infinity."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    # Only float16 and narrowing from float64 can overflow; asking costs a pass over the data.
    narrow = dtype == np.float16 or array.dtype == np.float64
    if narrow and not np.array_equal(np.isfinite(result), np.isfinite(array)):
        raise KavaError(f"dtype={dtype} cannot hold the values of {name}; use bfloat16 or float32")
    return result


def _weight_files(directory: Path) -> list[str]:
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = read_json(directory / "model.safetensors.index.json").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise KavaError(
            f"{directory.name}/model.safetensors.index.json has no weight_map; restore the file"
        )
    names = sorted({Path(str(name)).name for name in index.values()})
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise KavaError(
            f"{directory.name} lacks {', '.join(missing)}, which its index names; "
            "download or copy them again"
        )
    return names


def _layer_reader(
    row: Row, files: TensorFiles, spec: DecoderSpec, layer: int, dtype: np.dtype
) -> Read:
    """Reader of one tensor in our layout, without a layer axis."""

    def read(index: Index) -> np.ndarray:
        outer, inner = row.slice_of_theirs(index, spec)
        part = row.to_ours(files.read(row.name(layer), outer), spec)[inner]
        return cast(np.ascontiguousarray(part), dtype, row.name(layer))

    return read


def _place(
    row: Row, files: TensorFiles, spec: DecoderSpec, depth: int, dtype: np.dtype, put: Put
) -> jax.Array:
    """Hand one parameter to ``put``; stacked ones are filled layer by layer."""
    if not row.stacked:
        return put(row.ours, row.our_shape(spec), dtype, _layer_reader(row, files, spec, 0, dtype))
    shape = (depth, *row.our_shape(spec))

    def read(index: Index) -> np.ndarray:
        layers, rest = range(*index[0].indices(depth)), index[1:]
        sizes = (len(range(*s.indices(n))) for s, n in zip(rest, shape[1:], strict=True))
        stacked = np.empty((len(layers), *sizes), dtype)
        for place, layer in enumerate(layers):
            stacked[place] = _layer_reader(row, files, spec, layer, dtype)(rest)
        return stacked

    return put(row.ours, shape, dtype, read)


def _put_whole(path: str, shape: Shape, dtype: np.dtype, read: Read) -> jax.Array:
    del path, dtype
    return jnp.asarray(read(tuple(slice(0, size) for size in shape)))


def _plant(tree: dict[str, Any], path: str, leaf: jax.Array) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
