"""One table: how a decoder's parameters are called and laid out by Hugging Face and by us.

Each row names a tensor on both sides and the axes of both layouts, in the letters of the dimension
key (``cache.py``). Names, shapes, import, export and reading by slice all follow from the row:
nothing about a layout is written anywhere else. Torch stores a projection as ``[out, in]`` with
heads flattened, so ``"(N H) D"`` there is ``"D N H"`` here.

Where Hugging Face stores several of our tensors as one (``qkv_proj``), each row says which part of
it is its own.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby

import numpy as np

from kava_jax.models.spec import DecoderSpec

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Row:
    """One tensor. ``{i}`` in ``theirs`` is the layer number; such rows are stacked over layers.

    ``{e}`` is the number of an expert: such a row is as many tensors there, and one here, whose
    first axis is E.
    """

    ours: str
    theirs: str
    our_axes: str
    their_axes: str
    parts: tuple[str, ...] = ()
    """Where theirs holds several tensors, one after the other along the first axis: the first axis
    of each of them."""
    place: int = 0
    """Which of them this one is."""
    expert: int | None = None
    """Of which expert; None for the row of them all."""

    @property
    def stacked(self) -> bool:
        """Whether our side carries a leading layer axis."""
        return "{i}" in self.theirs

    @property
    def by_expert(self) -> bool:
        """Whether Hugging Face stores a tensor for each expert."""
        return "{e}" in self.theirs

    def of_expert(self, expert: int) -> "Row":
        """The row of one expert's tensor."""
        theirs = self.theirs.replace("{e}", str(expert))
        axes = self.our_axes.removeprefix("E ")
        return replace(self, theirs=theirs, our_axes=axes, expert=expert)

    def name(self, layer: int) -> str:
        """The Hugging Face tensor name for one layer (``layer`` is ignored when not stacked)."""
        return self.theirs.replace("{i}", str(layer))

    def our_shape(self, spec: DecoderSpec) -> Shape:
        """Shape on our side, without the layer axis."""
        sizes = _sizes(spec)
        return tuple(sizes[axis] for axis in self.our_axes.split())

    def their_shape(self, spec: DecoderSpec) -> Shape:
        """Shape in the Hugging Face file, of this row's part of the tensor."""
        sizes = _sizes(spec)
        return tuple(math.prod(sizes[a] for a in group) for group in _groups(self.their_axes))

    def stored_shape(self, spec: DecoderSpec) -> Shape:
        """Shape of the whole tensor in the file."""
        own = self.their_shape(spec)
        return (self._start(spec, len(self.parts)), *own[1:]) if self.parts else own

    def _start(self, spec: DecoderSpec, place: int) -> int:
        """Where along the first axis of the file's tensor a part begins."""
        sizes = _sizes(spec)
        before = (_groups(axes)[0] for axes in self.parts[:place])
        return sum(math.prod(sizes[axis] for axis in group) for group in before)

    def to_ours(self, part: np.ndarray, spec: DecoderSpec) -> np.ndarray:
        """Relay a Hugging Face tensor, or the part of one that ``slice_of_theirs`` asks for."""
        sizes, order, shape = _sizes(spec), [], []
        for size, group in zip(part.shape, _groups(self.their_axes), strict=True):
            rest = [sizes[axis] for axis in group[1:]]
            order += group
            # The part may hold fewer heads than the model has, so their number follows from its
            # size.
            shape += [size // math.prod(rest), *rest]
        return part.reshape(shape).transpose([order.index(a) for a in self.our_axes.split()])

    def to_theirs(self, tensor: np.ndarray, spec: DecoderSpec) -> np.ndarray:
        """The inverse of :meth:`to_ours`."""
        ours = self.our_axes.split()
        order = [axis for group in _groups(self.their_axes) for axis in group]
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
        for group in _groups(self.their_axes):
            first, *rest = group
            unit = math.prod(sizes[axis] for axis in rest)
            outer.append(slice(ranges[first][0] * unit, ranges[first][1] * unit))
            for axis in rest:
                inner[ours.index(axis)] = slice(*ranges[axis])
        start, own = self._start(spec, self.place), outer[0]
        return (slice(own.start + start, own.stop + start), *outer[1:]), tuple(inner)


def _groups(axes: str) -> list[list[str]]:
    """``"(N H) D"`` as ``[["N", "H"], ["D"]]``."""
    return [g.strip("()").split() for g in re.findall(r"\([^)]*\)|\S+", axes)]


def _sizes(spec: DecoderSpec) -> dict[str, int]:
    return {
        "N": spec.num_heads,
        "K": spec.num_kv_heads,
        "H": spec.head_dim,
        "D": spec.hidden_size,
        "F": spec.intermediate_size,
        "V": spec.vocab_size,
        "E": spec.num_experts,
    }


_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."


_EMBEDDING = Row("embed/embedding", "model.embed_tokens.weight", "V D", "V D")
_OUTPUT = Row("blocks/attention/o/kernel", _ATTENTION + "o_proj.weight", "N H D", "D (N H)")
_FINAL_NORM = Row("final_norm/scale", "model.norm.weight", "D", "D")
_SEPARATE = (
    Row("blocks/attention/q/kernel", _ATTENTION + "q_proj.weight", "D N H", "(N H) D"),
    Row("blocks/attention/k/kernel", _ATTENTION + "k_proj.weight", "D K H", "(K H) D"),
    Row("blocks/attention/v/kernel", _ATTENTION + "v_proj.weight", "D K H", "(K H) D"),
)
_MLP_SEPARATE = (
    Row("blocks/mlp/gate/kernel", _MLP + "gate_proj.weight", "D F", "F D"),
    Row("blocks/mlp/up/kernel", _MLP + "up_proj.weight", "D F", "F D"),
    Row("blocks/mlp/down/kernel", _MLP + "down_proj.weight", "F D", "D F"),
)


def _fused(rows: tuple[Row, ...], theirs: str) -> tuple[Row, ...]:
    """The same rows where Hugging Face stores their tensors as one, in this order."""
    parts = tuple(row.their_axes.removesuffix(" D") for row in rows)
    return tuple(
        replace(row, theirs=theirs, parts=parts, place=place) for place, row in enumerate(rows)
    )


_FUSED = _fused(_SEPARATE, _ATTENTION + "qkv_proj.weight")
_MLP_FUSED = (*_fused(_MLP_SEPARATE[:2], _MLP + "gate_up_proj.weight"), _MLP_SEPARATE[2])


def _experts(module: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The rows of a mixture of experts, by Hugging Face's names of its parts."""
    start = f"model.layers.{{i}}.{module}."
    return (
        Row("blocks/mlp/router/kernel", start + "gate.weight", "D E", "E D"),
        Row("blocks/mlp/gate/kernel", f"{start}experts.{{e}}.{gate}.weight", "E D F", "F D"),
        Row("blocks/mlp/up/kernel", f"{start}experts.{{e}}.{up}.weight", "E D F", "F D"),
        Row("blocks/mlp/down/kernel", f"{start}experts.{{e}}.{down}.weight", "E F D", "D F"),
    )


# By DecoderSpec.projections: those of attention, but for the output's, and those of the MLP.
_PROJECTIONS = {
    "separate": (_SEPARATE, _MLP_SEPARATE),
    "fused": (_FUSED, _MLP_FUSED),
    "experts": (_SEPARATE, _experts("mlp", "gate_proj", "up_proj", "down_proj")),
    "block_sparse_moe": (_SEPARATE, _experts("block_sparse_moe", "w1", "w3", "w2")),
}


def _bias(kernel: Row) -> Row:
    """The row of a projection's bias: its axes are those that the projection makes."""
    made = _groups(kernel.their_axes)[0]
    ours, theirs = kernel.ours.replace("kernel", "bias"), kernel.theirs.replace("weight", "bias")
    return Row(ours, theirs, " ".join(made), f"({' '.join(made)})")


def _norm(ours: str, theirs: str) -> Row:
    return Row(f"blocks/{ours}/scale", f"model.layers.{{i}}.{theirs}.weight", "D", "D")


_ATTENTION_IN = _norm("attention_norm", "input_layernorm")
_ATTENTION_OUT = _norm("attention_out_norm", "post_attention_layernorm")
_MLP_OUT = _norm("mlp_out_norm", "post_feedforward_layernorm")
# By where the norms are: attention's, and the MLP's. One name of Hugging Face's is another norm's
# in the next family.
_NORMS = {
    "before": ((_ATTENTION_IN,), (_norm("mlp_norm", "post_attention_layernorm"),)),
    "after": ((_ATTENTION_OUT,), (_MLP_OUT,)),
    "both": (
        (_ATTENTION_IN, _ATTENTION_OUT),
        (_norm("mlp_norm", "pre_feedforward_layernorm"), _MLP_OUT),
    ),
}
_QK_NORM = (
    Row("blocks/attention/q_norm/scale", _ATTENTION + "q_norm.weight", "H", "H"),
    Row("blocks/attention/k_norm/scale", _ATTENTION + "k_norm.weight", "H", "H"),
)
_QK_NORM_OVER_HEADS = (
    Row("blocks/attention/q_norm/scale", _ATTENTION + "q_norm.weight", "N H", "(N H)"),
    Row("blocks/attention/k_norm/scale", _ATTENTION + "k_norm.weight", "K H", "(K H)"),
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
    attention, mlp = zip(_NORMS[spec.norm_places], _PROJECTIONS[spec.projections], strict=True)
    parts = (
        (True, (_EMBEDDING, *chain(*attention), _OUTPUT, *chain(*mlp), _FINAL_NORM)),
        (spec.qkv_bias, map(_bias, _SEPARATE)),
        (spec.output_bias, [_bias(_OUTPUT)]),
        (spec.mlp_bias, map(_bias, _MLP_SEPARATE)),
        (spec.qk_norm, _QK_NORM_OVER_HEADS if spec.qk_norm_over_heads else _QK_NORM),
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
        row.name(layer): row.stored_shape(spec)
        for row in stored_rows(spec)
        for layer in range(spec.num_layers if row.stacked else 1)
    }


def stored_rows(spec: DecoderSpec) -> Iterator[Row]:
    """The rows as Hugging Face stores them: those of experts one by one."""
    for row in rows_of(spec):
        yield from map(row.of_expert, range(spec.num_experts)) if row.by_expert else [row]


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
