"""Weights from a Hugging Face directory into our parameter tree, by slice and without torch.

Every tensor of the model is checked by name, shape and dtype from the file headers before a byte
of data is read, and every number that is read for being finite. Parameters are read one at a time,
each through a ``read(index)`` that touches only the part it is asked for, so a sharded load never
holds more than one device's slice.

Left out on purpose: pickled weights, quantized tensors, and renaming guesses for unknown tensors.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from kava_jax.errors import KavaError
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.locate import read_json
from kava_jax.hf.names import (
    Index,
    Row,
    Shape,
    compact,
    expected_tensors,
    misfits,
    parameter_shapes,
    rows_of,
    tail_path,
)
from kava_jax.hf.tensor_files import HEAD, TensorFiles
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.hosts import from_all

Read = Callable[[Index], np.ndarray]
ReadLayer = Callable[[Index, int], np.ndarray]
Put = Callable[[str, Shape, np.dtype, Read], jax.Array]

_FLOATS = ("F64", "F32", "F16", "BF16")
# Old Llama exports carry the rotary frequencies, which follow from the config.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_HEADLESS = (
    ". A model without lm_head.weight can only be a teacher whose logits are not used; if its head "
    "is the embedding, set tie_word_embeddings to true in config.json, else use its full checkpoint"
)


def read_spec(directory: Path) -> DecoderSpec:
    """Geometry of the model in a Hugging Face directory."""
    return spec_from_config(read_json(directory / "config.json"), where=directory.name)


def load_model(directory: Path) -> tuple[nnx.GraphDef[Decoder], Params]:
    """A whole model as ``nnx.merge`` and ``generate`` take it, in float32 on the default device.

    Raises KavaError as :func:`load_decoder_params` does.
    """
    spec = read_spec(directory)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
    return graph, load_decoder_params(directory, spec)


def put_whole(path: str, shape: Shape, dtype: np.dtype, read: Read) -> jax.Array:
    """The whole parameter on the default device."""
    del path, dtype
    return jnp.asarray(read(tuple(slice(0, size) for size in shape)))


def load_decoder_params(
    directory: Path,
    spec: DecoderSpec,
    *,
    layers: int | None = None,
    tail: bool = False,
    head: bool = True,
    param_dtype: Any = jnp.float32,
    put: Put = put_whole,
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
            or of a dtype that cannot be read, or hold NaN or infinity in what is read; all of them
            are listed. Every process of a run must ask, and is told what any of them has found.
    """
    depth = spec.num_layers if layers is None else layers
    if not 0 <= depth + tail <= spec.num_layers:
        raise KavaError(f"layers={depth} with tail={tail} exceeds num_layers={spec.num_layers}")
    dtype, files = jnp.dtype(param_dtype), open_checked(directory, spec, head=head)
    flat: dict[str, jax.Array] = {}
    shapes = parameter_shapes(spec, layers=layers, tail=tail, head=head)
    for row in rows_of(spec):
        read, shape = layer_reader(row, files, spec, dtype), row.our_shape(spec)
        for path, held in ((row.ours, range(depth) if row.stacked else 0), (tail_path(row), depth)):
            if path in shapes:
                flat[path] = put(path, shapes[path], dtype, stacked(read, held, shape, dtype))
    check_finite(files)
    return unflatten_dict(flat, sep="/")


def open_checked(directory: Path, spec: DecoderSpec, *, head: bool = True) -> TensorFiles:
    """The directory's files, with a tied head settled and every tensor checked.

    Without ``head`` a base model will do, which has none. Raises one ``KavaError`` that lists every
    missing, unexpected or unfit tensor.
    """
    files = TensorFiles(directory)
    if spec.tie_embeddings:
        # Before the check: a head that is stored alone would count as a missing embedding.
        files.settle_tied_head()
    expected = expected_tensors(spec)
    present = {name for name in files.tensors if not _IGNORED.search(name)}
    if not head and HEAD not in present:
        expected.pop(HEAD, None)
    if spec.tie_embeddings and HEAD in present:
        expected |= {HEAD: (spec.vocab_size, spec.hidden_size)}
    told = misfits(expected, {name: files.tensors[name].shape for name in present})
    dtypes = {name: files.tensors[name].dtype for name in expected if name in present}
    unread = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    if unread:
        told.append(f"wrong dtype (readable are {', '.join(_FLOATS)}): {', '.join(unread)}")
    if told:
        raise KavaError(
            f"{files.directory.name}: tensors do not fit config.json ({spec.family}): "
            f"{'; '.join(told)}; use matching weights and config.json"
            + (_HEADLESS if HEAD in expected and HEAD not in present else "")
        )
    return files


def check_finite(files: TensorFiles) -> None:
    """Raise one ``KavaError`` with the tensors that held NaN or infinity where they were read.

    A process knows of the slices of its own devices alone, so all tell each other.
    """
    names = compact(sorted(files.not_finite))
    where = sorted({files.tensors[name].file.name for name in files.not_finite})
    own = f"{', '.join(names)} in {', '.join(where)}" if names else ""
    # All processes raise the same error. One that went on would wait for the others at the next
    # collective operation.
    found = next(filter(None, from_all(own, f"weights of {files.directory.name} read")), "")
    if found:
        raise KavaError(
            f"{files.directory.name}: NaN or infinity in {found}; download or convert it again "
            f"(float16 turns large numbers to infinity, bfloat16 does not)"
        )


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Cast floats; a ``KavaError`` when a value would overflow in float16 or out of float64."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    # Looking costs a pass over the data, so it is done only for float16 and for narrowing from
    # float64. bfloat16 has float32's exponents and ends at 3.39e38, far above any weight.
    narrow = dtype == np.float16 or array.dtype == np.float64
    if narrow and not np.array_equal(np.isfinite(result), np.isfinite(array)):
        raise KavaError(f"dtype={dtype} cannot hold the values of {name}; use bfloat16 or float32")
    return result


def layer_reader(row: Row, files: TensorFiles, spec: DecoderSpec, dtype: np.dtype) -> ReadLayer:
    """``read(index, layer)`` of one layer of a parameter, or of one without layers, in our layout.

    ``index`` has one step-1 slice for each axis of ``row.our_shape(spec)``.
    """

    if row.by_expert:
        experts = map(row.of_expert, range(spec.num_experts))
        readers = [layer_reader(expert, files, spec, dtype) for expert in experts]
        return lambda index, layer: np.stack([one(index[1:], layer) for one in readers[index[0]]])

    def read(index: Index, layer: int) -> np.ndarray:
        outer, inner = row.slice_of_theirs(index, spec)
        part = row.to_ours(files.read_weight(row.name(layer), outer), spec)[inner]
        return cast(np.ascontiguousarray(part), dtype, row.name(layer))

    return read


def stacked(read: ReadLayer, layers: Sequence[int] | int, shape: Shape, dtype: np.dtype) -> Read:
    """Reader of a single layer, or of several stacked ones; ``shape`` is that of one layer."""
    if isinstance(layers, int):
        return lambda index: read(index, layers)

    def of_layers(index: Index) -> np.ndarray:
        first, *rest = index
        sizes = (len(range(n)[s]) for s, n in zip(rest, shape, strict=True))
        # Filled layer by layer, so that at most one layer is in memory twice.
        whole = np.empty((len(layers[first]), *sizes), dtype)
        for place, layer in enumerate(layers[first]):
            whole[place] = read(tuple(rest), layer)
        return whole

    return of_layers
