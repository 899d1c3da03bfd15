"""One table: how a decoder's parameters are called and laid out by Hugging Face and by us.

Each row names a tensor on both sides and the axes of both layouts, in the letters of the dimension
key (``cache.py``). Names, shapes, import, export and reading by slice all follow from the row:
nothing about a layout is written anywhere else. Torch stores a projection as ``[out, in]`` with
heads flattened, so ``"(N H) D"`` there is ``"D N H"`` here.

Left out on purpose: fused projections (``qkv_proj``); no supported family has them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from kava_jax.models.spec import DecoderSpec

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Row:
    """One tensor. ``{i}`` in ``theirs`` is the layer number; such rows are stacked over layers."""

    ours: str
    theirs: str
    our_axes: str
    their_axes: str

    @property
    def stacked(self) -> bool:
        """Whether our side carries a leading layer axis."""
        return "{i}" in self.theirs

    def name(self, layer: int) -> str:
        """The Hugging Face tensor name for one layer (``layer`` is ignored when not stacked)."""
        return self.theirs.replace("{i}", str(layer))

    def our_shape(self, spec: DecoderSpec) -> Shape:
        """Shape on our side, without the layer axis."""
        sizes = _sizes(spec)
        return tuple(sizes[axis] for axis in self.our_axes.split())

    def their_shape(self, spec: DecoderSpec) -> Shape:
        """Shape in the Hugging Face file."""
        sizes = _sizes(spec)
        return tuple(math.prod(sizes[a] for a in group) for group in self._groups())

    def to_ours(self, part: np.ndarray, spec: DecoderSpec) -> np.ndarray:
        """Relay a Hugging Face tensor, or the part of one that ``slice_of_theirs`` asks for."""
        sizes, order, shape = _sizes(spec), [], []
        for size, group in zip(part.shape, self._groups(), strict=True):
            rest = [sizes[axis] for axis in group[1:]]
            order += group
            # The part may hold fewer heads than the model has, so their number follows from its
            # size.
            shape += [size // math.prod(rest), *rest]
        return part.reshape(shape).transpose([order.index(a) for a in self.our_axes.split()])

    def to_theirs(self, tensor: np.ndarray, spec: DecoderSpec) -> np.ndarray:
        """The inverse of :meth:`to_ours`."""
        ours = self.our_axes.split()
        order = [axis for group in self._groups() for axis in group]
        return tensor.transpose([ours.index(a) for a in order]).reshape(self.their_shape(spec))

    def slice_of_theirs(self, index: Index, spec: DecoderSpec) -> tuple[Index, Index]:
        """Which part of their tensor holds ``our_tensor[index]``, and what to cut from that part.

        Returns ``(outer, inner)``: read ``part = theirs[outer]`` (contiguous ranges, one per
        stored axis), relay it with :meth:`to_ours`, then take ``[inner]``. Of a flattened
        ``(N H)`` axis whole heads are read, so ``inner`` cuts only inside the head dimension.
        """
        sizes, ours = _sizes(spec), self.our_axes.split()
        # Shardings ask for contiguous ranges, so a slice's step is always 1.
        ranges = {a: index[i].indices(sizes[a])[:2] for i, a in enumerate(ours)}
        outer, inner = [], [slice(None)] * len(ours)
        for group in self._groups():
            first, *rest = group
            unit = math.prod(sizes[axis] for axis in rest)
            outer.append(slice(ranges[first][0] * unit, ranges[first][1] * unit))
            for axis in rest:
                inner[ours.index(axis)] = slice(*ranges[axis])
        return tuple(outer), tuple(inner)

    def _groups(self) -> list[list[str]]:
        """``"(N H) D"`` as ``[["N", "H"], ["D"]]``."""
        return [g.strip("()").split() for g in re.findall(r"\([^)]*\)|\S+", self.their_axes)]


def _sizes(spec: DecoderSpec) -> dict[str, int]:
    return {
        "N": spec.num_heads,
        "K": spec.num_kv_heads,
        "H": spec.head_dim,
        "D": spec.hidden_size,
        "F": spec.intermediate_size,
        "V": spec.vocab_size,
    }


_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."

_DENSE = (
    Row("embed/embedding", "model.embed_tokens.weight", "V D", "V D"),
    Row("blocks/attention_norm/scale", "model.layers.{i}.input_layernorm.weight", "D", "D"),
    Row("blocks/attention/q/kernel", _ATTENTION + "q_proj.weight", "D N H", "(N H) D"),
    Row("blocks/attention/k/kernel", _ATTENTION + "k_proj.weight", "D K H", "(K H) D"),
    Row("blocks/attention/v/kernel", _ATTENTION + "v_proj.weight", "D K H", "(K H) D"),
    Row("blocks/attention/o/kernel", _ATTENTION + "o_proj.weight", "N H D", "D (N H)"),
    Row("blocks/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight", "D", "D"),
    Row("blocks/mlp/gate/kernel", _MLP + "gate_proj.weight", "D F", "F D"),
    Row("blocks/mlp/up/kernel", _MLP + "up_proj.weight", "D F", "F D"),
    Row("blocks/mlp/down/kernel", _MLP + "down_proj.weight", "F D", "D F"),
    Row("final_norm/scale", "model.norm.weight", "D", "D"),
)
_QKV_BIAS = (
    Row("blocks/attention/q/bias", _ATTENTION + "q_proj.bias", "N H", "(N H)"),
    Row("blocks/attention/k/bias", _ATTENTION + "k_proj.bias", "K H", "(K H)"),
    Row("blocks/attention/v/bias", _ATTENTION + "v_proj.bias", "K H", "(K H)"),
)
_OUTPUT_BIAS = (Row("blocks/attention/o/bias", _ATTENTION + "o_proj.bias", "D", "D"),)
_MLP_BIAS = (
    Row("blocks/mlp/gate/bias", _MLP + "gate_proj.bias", "F", "F"),
    Row("blocks/mlp/up/bias", _MLP + "up_proj.bias", "F", "F"),
    Row("blocks/mlp/down/bias", _MLP + "down_proj.bias", "D", "D"),
)
_QK_NORM = (
    Row("blocks/attention/q_norm/scale", _ATTENTION + "q_norm.weight", "H", "H"),
    Row("blocks/attention/k_norm/scale", _ATTENTION + "k_norm.weight", "H", "H"),
)
_UNTIED = (Row("head/kernel", "lm_head.weight", "D V", "V D"),)

# What a cut teacher keeps of the layer after its last full block: enough to write K and V, and the
# queries that diagnostics read them with.
_TAIL_PARTS = (
    "attention_norm",
    "attention/q",
    "attention/k",
    "attention/v",
    "attention/q_norm",
    "attention/k_norm",
)


def rows_of(spec: DecoderSpec) -> tuple[Row, ...]:
    """The rows that a decoder of this spec has."""
    parts = (
        (True, _DENSE),
        (spec.qkv_bias, _QKV_BIAS),
        (spec.output_bias, _OUTPUT_BIAS),
        (spec.mlp_bias, _MLP_BIAS),
        (spec.qk_norm, _QK_NORM),
        (not spec.tie_embeddings, _UNTIED),
    )
    return tuple(row for present, rows in parts if present for row in rows)


def tail_path(row: Row) -> str | None:
    """Our path of this row in a cut teacher's tail, None if the tail does without it."""
    module, _, leaf = row.ours.removeprefix("blocks/").rpartition("/")
    return f"tail/{module}/{leaf}" if row.stacked and module in _TAIL_PARTS else None


def expected_tensors(spec: DecoderSpec) -> dict[str, Shape]:
    """Every tensor a Hugging Face directory of this spec must hold, with its shape there."""
    return {
        row.name(layer): row.their_shape(spec)
        for row in rows_of(spec)
        for layer in range(spec.num_layers if row.stacked else 1)
    }


def parameter_shapes(
    spec: DecoderSpec, *, layers: int | None = None, tail: bool = False, head: bool = True
) -> dict[str, Shape]:
    """Flat ``path -> shape`` of our parameter tree; arguments as in ``load_decoder_params``."""
    depth = spec.num_layers if layers is None else layers
    shapes: dict[str, Shape] = {}
    for row in rows_of(spec):
        if row.stacked:
            if depth:
                shapes[row.ours] = (depth, *row.our_shape(spec))
            if tail and (path := tail_path(row)) is not None:
                shapes[path] = row.our_shape(spec)
        elif head or row.ours.startswith("embed/"):
            shapes[row.ours] = row.our_shape(spec)
    return shapes


def misfits(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """Every name that is missing, unexpected or of another shape, by fault."""
    faults = {
        "missing": compact([name for name in expected if name not in found]),
        "unexpected": compact(sorted(found.keys() - expected.keys())),
        "wrong shape": [
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    return [f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names]


def compact(names: Sequence[str]) -> list[str]:
    """Names with runs of layer numbers folded: every name is still there, on fewer characters.

    ``model.layers.0.a, model.layers.1.a, model.layers.2.a`` becomes ``model.layers.{0..2}.a``.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name.replace(match[0], ".layers.{}.", 1) if match else name
        groups.setdefault(pattern, []).extend([int(match[1])] if match else [])
    folded = []
    for pattern, numbers in groups.items():
        # In a run of layers the difference between number and place stays the same.
        runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
        ends = [[number for _, number in run] for _, run in runs]
        texts = [str(r[0]) if len(r) == 1 else f"{{{r[0]}..{r[-1]}}}" for r in ends]
        folded += [pattern.replace("{}", text, 1) for text in texts] or [pattern]
    return folded
