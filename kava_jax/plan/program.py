"""What one device does in a compiled program: matrix products and messages, loops multiplied in.

The compiler's own cost analysis counts the body of a loop once, so a scanned model of 48 layers
reads like one of 2. Here the program's text is read as it stands right after the partitioner,
before anything that is special to one kind of hardware: every product, every message, the true
dtypes; and every loop counts as often as it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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


class Operand(NamedTuple):
    """What an instruction reads: another one's result, or one element of it."""

    name: str
    element: int | None


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    type: str
    opcode: str
    operands: tuple["Operand", ...]
    text: str
    """Everything after the opening bracket."""


class Message(NamedTuple):
    """A collective: its kind, the bytes one device sends each time, and the devices of one group.

    A ring of n sends ``(n - 1) / n`` of what is gathered, scattered or exchanged, and twice that of
    what is summed.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]


class Product(NamedTuple):
    """A matrix product: both sides and the result as ``bf16[16,8]``, and FLOPs of one time."""

    left: str
    right: str
    result: str
    flops: float


@dataclass(frozen=True)
class Work:
    """What one device does in one run of a program."""

    products: Mapping[Product, int]
    """How often each is computed; convolutions, as which TPUs multiply, have no FLOPs (nan)."""
    messages: Mapping[Message, int]
    """How often each is sent."""

    @property
    def flops(self) -> float:
        """Of matrix products: two for each multiplication with its addition."""
        return sum((times * one.flops for one, times in self.products.items()), 0.0)

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes that one device sends, by kind of collective, the most first."""
        sent: dict[str, float] = {}
        for message, times in self.messages.items():
            sent[message.kind] = sent.get(message.kind, 0.0) + message.bytes * times
        return dict(sorted(sent.items(), key=lambda item: -item[1]))


def work_of(program: str) -> Work:
    """The work of a program, given as HLO text with ``dot`` and collectives in plain sight.

    Raises ValueError for text without an entry, and for a loop whose number of rounds is unknown.
    """
    computations, entry = _parse(program)
    return _Counter(computations).count(entry)


def _parse(program: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, None
    for line in program.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, type_, opcode, text = found.groups()
            current.append(Instruction(name, type_, opcode, tuple(_operands(text)), text))
    if entry is None:
        raise ValueError("the program's text has no ENTRY")
    return computations, entry


def _operands(text: str) -> Iterator[Operand]:
    """Operands in the brackets that ``text`` is the inside and the rest of."""
    inside = text[: text.index(")")] if ")" in text else text
    for part in inside.split(", "):
        # Older versions write the type before the name.
        if found := _NAME.fullmatch(part.split(" ")[-1]):
            yield Operand(found[1], int(found[2]) if found[2] else None)


class _Counter:
    """Adds up the work of computations, each looked at once."""

    def __init__(self, computations: Mapping[str, list[Instruction]]):
        self._computations = computations
        self._known: dict[str, Work] = {}

    def count(self, name: str) -> Work:
        if name in self._known:
            return self._known[name]
        instructions = self._computations[name]
        types = {one.name: one.type for one in instructions}
        users: dict[str, list[str]] = {}
        for one in instructions:
            for operand in one.operands:
                users.setdefault(operand.name, []).append(one.opcode)
        products, messages = Counter[Product](), Counter[Message]()
        for one in instructions:
            if one.opcode in ("dot", "convolution"):
                products[_product(one, types)] += 1
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                message = _message(kind, one, users.get(one.name, []))
                messages[message] += 1
            for inner, times in self._called(one):
                work = self.count(inner)
                for product, often in work.products.items():
                    products[product] += times * often
                for message, often in work.messages.items():
                    messages[message] += times * often
        self._known[name] = Work(products, messages)
        return self._known[name]

    def _called(self, one: Instruction) -> Iterator[tuple[str, int]]:
        """Computations that an instruction runs, and how often."""
        if one.opcode == "while":
            loop = _LOOP.search(one.text)
            assert loop, one.text
            told = _TRIPS.search(one.text)
            times = int(told[1]) if told else self._rounds(loop[1])
            yield loop[1], times + 1
            yield loop[2], times
        elif one.opcode == "conditional":
            branches = _BRANCHES.search(one.text)
            assert branches, one.text
            names = [name.strip(" %") for name in (branches[1] or branches[2]).split(",")]
            yield max(names, key=lambda name: self.count(name).flops), 1
        elif one.opcode in ("call", "fusion") and (called := _CALLED.search(one.text)):
            yield called[1], 1

    def _rounds(self, condition: str) -> int:
        """How often a loop runs that counts from 0 up to a constant, as ``lax.scan`` does."""
        # Optimised programs compare in a fusion.
        fused = [_CALLED.search(one.text) for one in self._computations[condition]]
        for name in (condition, *(call[1] for call in fused if call)):
            instructions = {one.name: one for one in self._computations[name]}
            for one in instructions.values():
                if one.opcode == "compare" and "direction=LT" in one.text:
                    limits = [instructions[operand.name] for operand in one.operands]
                    constants = [limit for limit in limits if limit.opcode == "constant"]
                    if constants:
                        return int(constants[0].text.split(")")[0])
        raise ValueError(f"loop condition {condition} is not a counter below a constant")


def _product(one: Instruction, types: Mapping[str, str]) -> Product:
    left, right = (_array(types[name], element or 0) for name, element in one.operands[:2])
    flops = _dot_flops(one, types) if one.opcode == "dot" else math.nan
    return Product(left, right, _array(one.type), flops)


def _dot_flops(one: Instruction, types: Mapping[str, str]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)
    name, element = one.operands[0]
    left = _shape(types[name], element or 0)
    dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
    return 2.0 * math.prod(_shape(one.type)) * math.prod(left[dim] for dim in dims)


def _message(kind: str, one: Instruction, users: list[str]) -> Message:
    group = first_group(one.text)
    size = max(1, len(group))
    payload = sum(
        BITS[dtype] / 8 * math.prod(int(axis) for axis in axes.split(",") if axis)
        for dtype, axes in _ARRAY.findall(one.type)
        if dtype in BITS
    )
    if kind == "all-reduce" and users and all(user == "dynamic-slice" for user in users):
        # Accelerators send only the slice that is kept.
        kind, payload = "reduce-scatter", payload / size
    travels = {"all-reduce": 2.0, "collective-permute": size / max(1, size - 1)}.get(kind, 1.0)
    if kind == "reduce-scatter":
        payload *= size
    return Message(kind, payload * travels * (size - 1) / size, group)


def first_group(text: str) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the ways that XLA writes groups."""
    if "source_target_pairs=" in text:
        pairs = re.findall(r"\{(\d+),(\d+)\}", text)
        return next(((int(a), int(b)) for a, b in pairs if a != b), ())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(device) for device in listed[1].split(","))
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
    shape, place, taken = [], {}, []
    parts = {
        name: (int(before), int(size))
        for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)
    }
    for name, size in sizes.items():
        before, own = parts.get(name, (1, size))
        place[name] = len(shape) + 1
        shape += [before, own, size // (before * own)]
    devices = np.arange(math.prod(shape)).reshape(shape)
    taken = [place[name] for name in re.findall(r"'([^']+)'", axes)]
    others = [axis for axis in range(devices.ndim) if axis not in taken]
    size = math.prod(shape[axis] for axis in taken)
    return tuple(devices.transpose([*others, *taken]).reshape(-1, size)[0].tolist())


def _array(type_: str, element: int = 0) -> str:
    """An array's type, or that of one element of a tuple, without its layout."""
    dtype, axes = _ARRAY.findall(type_)[element]
    return f"{dtype}[{axes}]"


def _shape(type_: str, element: int = 0) -> list[int]:
    """Axes of an array's type, or of one element of a tuple's."""
    axes = _ARRAY.findall(type_)[element][1]
    return [int(axis) for axis in axes.split(",") if axis]
