"""Reads from a compiled program what one device does: matrix products and messages.

The compiler's own cost analysis counts the body of a loop once, so a scanned model of 48 layers
reads like one of 2, and it does not count messages at all. This module reads the program's text as
the partitioner left it, before any pass that is special to one kind of hardware. There every
product and message is visible in its true dtype, and every loop is counted as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

# XLA stores a boolean in a byte. What is not listed, such as a token, counts as no bytes.
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    f"{kind}{bits}": bits for kind in "su" for bits in (4, 8, 16, 32, 64)
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_NAME = re.compile(r"%?([\w.\-]+)(?:#(\d+))?")
_CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCHES = re.compile(r"(?:branch_computations=\{(.*?)\}|true_computation=%?([\w.\-]+))")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")

# Kind of a message, and the devices of one group that exchange it.
Ring = tuple[str, tuple[int, ...]]


class Work(NamedTuple):
    """What one device does in one run of a program."""

    products: Mapping[str, int]
    """Number of matrix products by the dtypes of their two sides: ``bf16``, or ``bf16 x f32``."""
    flops: float
    """Of matrix products: two for each multiplication with its addition. NaN where a product is
    written as a convolution, as compilers for TPUs do."""
    messages: Mapping[Ring, float]
    """Bytes sent. In a ring of n devices, each sends ``(n - 1) / n`` of what is gathered, scattered
    or exchanged, and twice that of what is summed."""

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes that one device sends, by kind of collective, the most first."""
        sent: dict[str, float] = {}
        for (kind, _), payload in self.messages.items():
            sent[kind] = sent.get(kind, 0.0) + payload
        return dict(sorted(sent.items(), key=lambda item: -item[1]))


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    type: str
    opcode: str
    operands: list[tuple[str, int]]
    """Name of each instruction that is read, and which element of its result."""
    text: str
    """Everything after the opening bracket."""


Computations = Mapping[str, list[Instruction]]


def work_of(program: str) -> Work:
    """The work of a program, given as HLO text with ``dot`` and collectives in plain sight.

    Raises ValueError for text without an entry, and for a loop whose number of rounds is unknown.
    """
    computations, entry = _parse(program)

    # A program may call one computation from several places; it is read once.
    @cache
    def count(name: str) -> Work:
        return _work(name, computations, count)

    return count(entry)


def _parse(program: str) -> tuple[Computations, str]:
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, None
    for line in program.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, type_, opcode, text = found.groups()
            # Older versions write the type of an operand before its name.
            parts = [part.split(" ")[-1] for part in text.partition(")")[0].split(", ")]
            named = [operand for part in parts if (operand := _NAME.fullmatch(part))]
            operands = [(operand[1], int(operand[2] or 0)) for operand in named]
            current.append(Instruction(name, type_, opcode, operands, text))
    if entry is None:
        raise ValueError("the program's text has no ENTRY")
    return computations, entry


def _work(name: str, computations: Computations, count: Callable[[str], Work]) -> Work:
    """Adds up one computation; ``count`` gives the work of those that it calls."""
    instructions = computations[name]
    types = {one.name: one.type for one in instructions}
    products, messages, flops = Counter[str](), dict[Ring, float](), 0.0
    for one in instructions:
        kind = one.opcode.removesuffix("-start")
        if kind in ("dot", "convolution"):
            left, right = (_array(types[side], element) for side, element in one.operands[:2])
            products[" x ".join(sorted({left[0], right[0]}))] += 1
            contracted = _CONTRACTED.search(one.text)
            dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
            # Batch axes are in the result, so result x contracted axes is every multiplication.
            multiplied = math.prod(_array(one.type)[1]) * math.prod(left[1][dim] for dim in dims)
            flops += 2.0 * multiplied if kind == "dot" else math.nan
        elif kind in KINDS:
            ring, payload = _message(kind, one, instructions)
            messages[ring] = messages.get(ring, 0.0) + payload
        for inner, times in _called(one, computations, count):
            work = count(inner)
            flops += times * work.flops
            products.update({sides: times * often for sides, often in work.products.items()})
            for ring, payload in work.messages.items():
                messages[ring] = messages.get(ring, 0.0) + times * payload
    return Work(products, flops, messages)


def _called(
    one: Instruction, computations: Computations, count: Callable[[str], Work]
) -> Iterator[tuple[str, int]]:
    """Computations that an instruction runs, and how often; of a choice the one with most FLOPs."""
    if one.opcode == "while":
        loop = _LOOP.search(one.text)
        assert loop, one.text
        told = _TRIPS.search(one.text)
        times = int(told[1]) if told else _rounds(loop[1], computations)
        # The condition is asked once more than the body runs.
        yield loop[1], times + 1
        yield loop[2], times
    elif one.opcode == "conditional":
        branches = _BRANCHES.search(one.text)
        assert branches, one.text
        # Which branch runs is decided at run time; the costliest one bounds the step from above.
        names = [name.strip(" %") for name in (branches[1] or branches[2]).split(",")]
        yield max(names, key=lambda name: count(name).flops), 1
    elif one.opcode in ("call", "fusion") and (called := _CALLED.search(one.text)):
        yield called[1], 1


def _rounds(condition: str, computations: Computations) -> int:
    """How often a loop runs that counts from 0 up to a constant, as ``lax.scan`` does."""
    # Optimised programs compare in a fusion.
    fused = [_CALLED.search(one.text) for one in computations[condition]]
    for name in (condition, *(call[1] for call in fused if call)):
        instructions = {one.name: one for one in computations[name]}
        for one in instructions.values():
            if one.opcode == "compare" and "direction=LT" in one.text:
                for limit in (instructions[operand] for operand, _ in one.operands):
                    if limit.opcode == "constant":
                        return int(limit.text.split(")")[0])
    raise ValueError(f"loop condition {condition} is not a counter below a constant")


def _message(kind: str, one: Instruction, instructions: list[Instruction]) -> tuple[Ring, float]:
    """What a collective sends each time."""
    group = first_group(one.text)
    size = max(1, len(group))
    # Of the result: what is gathered comes out whole, what is scattered as one slice.
    payload = sum(
        BITS[dtype] / 8 * math.prod(int(axis) for axis in axes.split(",") if axis)
        for dtype, axes in _ARRAY.findall(one.type)
        if dtype in BITS
    )
    users = {user.opcode for user in instructions if one.name in dict(user.operands)}
    if kind == "all-reduce" and users == {"dynamic-slice"}:
        # Accelerators send only the slice that is kept.
        kind, payload = "reduce-scatter", payload / size
    # A ring sums in two rounds, a scatter and a gather, hence 2. The result of a scatter is one
    # of ``size`` slices, hence ``size``.
    shares = {"all-reduce": 2.0, "reduce-scatter": size}
    # To one neighbour everything is sent.
    shares["collective-permute"] = size / max(1, size - 1)
    return (kind, group), payload * shares.get(kind, 1.0) * (size - 1) / size


def first_group(text: str) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the ways that XLA writes groups."""
    if "source_target_pairs=" in text:
        pairs = re.findall(r"\{(\d+),(\d+)\}", text)
        return next(((int(a), int(b)) for a, b in pairs if a != b), ())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(device) for device in listed[1].split(","))
    # XLA's short form: consecutive numbers, reshaped, transposed, and cut into groups.
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sizes = [int(size) for size in iota[3].split(",")]
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[4]:
            devices = devices.transpose([int(axis) for axis in iota[4].split(",")])
        return tuple(devices.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", text
    ):
        return _named_group(named[1], named[2])
    return ()


def _named_group(mesh: str, axes: str) -> tuple[int, ...]:
    """The first group over axes like ``'data','fsdp':(1)8`` of a mesh like ``'data'=2,'fsdp'=8``.

    ``'fsdp':(m)k`` is the part of an axis that has m before it and size k.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {
        name: (int(before), int(size))
        for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)
    }
    # Every axis in three: what is before its part, the part, and what is after it.
    shape = []
    for name, size in sizes.items():
        before, own = parts.get(name, (1, size))
        shape += [before, own, size // (before * own)]
    taken = [3 * list(sizes).index(name) + 1 for name in re.findall(r"'([^']+)'", axes)]
    devices = np.arange(math.prod(shape)).reshape(shape)
    devices = np.moveaxis(devices, taken, range(-len(taken), 0))
    return tuple(devices.reshape(-1, math.prod(shape[axis] for axis in taken))[0].tolist())


def _array(type_: str, element: int = 0) -> tuple[str, list[int]]:
    """Dtype and axes of an array's type, or of one element of a tuple's."""
    dtype, axes = _ARRAY.findall(type_)[element]
    return dtype, [int(axis) for axis in axes.split(",") if axis]
