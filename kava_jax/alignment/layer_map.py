"""Which teacher layers each student layer is compared with.

Maps are made from a name or from a written list by ``make_layer_map``; the two that are measured
(``CALIBRATED_MAPS``) come out of a calibration as a ``LayerMap``. Left out on purpose: how a layer
is chosen or fitted by measurement (``calibrate``), and what bridges the widths (``projector``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from reprlib import repr as shortened
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import ConfigDict, StrictInt, TypeAdapter, ValidationError

from kava_jax.errors import KavaError

# Maps by a rule, of which two need a student whose layers were cut from the teacher, and maps that
# are measured before training.
OriginMap = Literal["origin", "straddle"]
RuleMap = Literal["ratio", "last", OriginMap]
MeasuredMap = Literal["cka", "calibrated"]
LayerMapName = RuleMap | MeasuredMap
ORIGIN_MAPS: tuple[OriginMap, ...] = get_args(OriginMap)
NAMED_MAPS: tuple[RuleMap, ...] = get_args(RuleMap)
CALIBRATED_MAPS: tuple[MeasuredMap, ...] = get_args(MeasuredMap)


@dataclass(frozen=True)
class LayerMap:
    """Which teacher layers each mapped student layer is compared with, in student order.

    Layers are counted from 0. ``teacher_layers`` has one row per student layer, all rows equally
    long: the layers of a row are side by side in the target, their heads concatenated.

    Raises KavaError, naming every wrong row, for anything else: maps are read from files too.
    """

    # For pydantic, which reads maps from files: a misspelt key must not pass.
    __pydantic_config__ = ConfigDict(extra="forbid")

    student_layers: tuple[StrictInt, ...]
    teacher_layers: tuple[tuple[StrictInt, ...], ...]

    def __post_init__(self) -> None:
        """Refuse what the class does not describe."""
        problem = _problem_of_layers(self.student_layers, self.teacher_layers)
        if problem is not None:
            raise KavaError(f"layer map: {problem}")

    def __len__(self) -> int:
        """Number of rows, which is the number of mapped student layers."""
        return len(self.student_layers)

    @property
    def last_teacher_layer(self) -> int:
        """The deepest teacher layer that is needed; the teacher is cut after it."""
        return max(max(row) for row in self.teacher_layers)

    @property
    def sources(self) -> int:
        """How many teacher layers are side by side in the target."""
        return len(self.teacher_layers[0])

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The teacher layers that are needed, ascending."""
        return tuple(sorted({layer for row in self.teacher_layers for layer in row}))

    def among(self, layers: tuple[int, ...]) -> "LayerMap":
        """The same map where the teacher's layers are counted among these alone."""
        # A teacher's cache may hold only the layers that are read, so their places differ.
        place = {layer: number for number, layer in enumerate(layers)}
        rows = tuple(tuple(place[layer] for layer in row) for row in self.teacher_layers)
        return LayerMap(self.student_layers, rows)

    def student_side(self, vectors: Any) -> Any:
        """The mapped layers [P, B, T, K, H] of the student's arrays [L, B, T, K, H], in any tree.

        When all layers in order are mapped, these are the arrays themselves. Raises KavaError for
        fewer layers than the map reads.
        """
        return jax.tree.map(lambda x_LBTKH: _take(x_LBTKH, self.student_layers, "student"), vectors)

    def teacher_side(self, vectors: Any) -> Any:
        """The teacher's side of every row [P, B, T, sources * K, H] from its [L, B, T, K, H].

        All heads of a row's first layer, then all of its second. Raises KavaError for fewer layers
        than the map reads.
        """
        return jax.tree.map(self._target, vectors)

    def _target(self, x_LBTKH: Float[Array, "L B T K H"]) -> Float[Array, "P B T J H"]:
        """One array of the teacher's as the target; J = sources * K."""
        by_column = zip(*self.teacher_layers, strict=True)
        columns = [_take(x_LBTKH, column, "teacher") for column in by_column]
        # One column is passed on as it is, because ``concatenate`` would copy it.
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=3)

    def rows(self) -> list[tuple[int, str]]:
        """(student layer, its teacher layers in words, ``"7"`` or ``"7 + 8 + 9"``) for printing."""
        texts = [" + ".join(map(str, row)) for row in self.teacher_layers]
        return list(zip(self.student_layers, texts, strict=True))

    def table(self, field: str) -> list[str]:
        """The map as lines of text for a terminal: ``field``, headings, one line per row."""
        wide = len(self.teacher_layers[0]) > 1
        heading = "student layer", "teacher layers, side by side" if wide else "teacher layer"
        width = len(heading[0])
        lines = [f"{student:>{width}} | {text}" for student, text in self.rows()]
        return [field, " | ".join(heading), *lines]

    def as_dict(self) -> dict[str, Any]:
        """The map as plain data for a JSON file; ``from_dict`` reads it back."""
        return _PLAIN.dump_python(self, mode="json")

    @classmethod
    def from_dict(cls, raw: Any, where: str) -> "LayerMap":
        """The map that ``as_dict`` wrote.

        Raises KavaError, naming ``where`` (a file, or a field of one), for anything else.
        """
        try:
            return _PLAIN.validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("layer map", *first["loc"])))
            raise KavaError(
                f"{where}: {field}={shortened(first['input'])} is not valid: {first['msg']}; make "
                f"it again with `kava calibrate CONFIG`"
            ) from None
        except KavaError as error:
            raise KavaError(f"{where}: {error}") from None


_PLAIN = TypeAdapter(LayerMap)


def make_layer_map(
    setting: str | Sequence[tuple[int, int]],
    teacher_layers: int,
    student_layers: int,
    *,
    origins: tuple[int, ...] | None = None,
    field: str = "layer_map",
) -> LayerMap:
    """A checked map between two depths, from one of ``NAMED_MAPS`` or [teacher, student] pairs.

    ``origins`` are the teacher layers that the student's were cut from, ascending; None where that
    is not known.

    Raises KavaError, naming ``field``, for an unknown name, a map that has to be measured
    (``CALIBRATED_MAPS``), ``"last"`` with a teacher shallower than the student, one of
    ``ORIGIN_MAPS`` without origins, an empty list, a layer that does not exist, or a student layer
    used twice.
    """
    if not isinstance(setting, str):
        return _from_pairs(setting, teacher_layers, student_layers, field)
    if setting in CALIBRATED_MAPS:
        raise KavaError(
            f"{field}={setting!r} needs a calibration; `kava calibrate CONFIG` makes it"
        )
    layers = _by_rule(setting, teacher_layers, student_layers, origins, field)
    return LayerMap(tuple(range(len(layers))), tuple((layer,) for layer in layers))


def _by_rule(
    rule: str, teacher_layers: int, student_layers: int, origins: Sequence[int] | None, field: str
) -> Sequence[int]:
    """The teacher layer of each student layer."""
    if rule == "ratio":
        return [_nearest(teacher_layers, student_layers, s) for s in range(student_layers)]
    if rule == "last":
        if teacher_layers < student_layers:
            raise KavaError(
                f"{field}='last': a teacher of {teacher_layers} layers has no last "
                f"{student_layers} for the student; use 'ratio'"
            )
        return range(teacher_layers - student_layers, teacher_layers)
    if rule not in ORIGIN_MAPS:
        known = ", ".join(map(repr, (*NAMED_MAPS, *CALIBRATED_MAPS)))
        raise KavaError(f"{field}={rule!r} is unknown; use {known} or a list of pairs")
    if origins is None:
        raise KavaError(
            f"{field}={rule!r}: it is not known which of the teacher's layers the student was cut "
            f"from; use 'ratio' or a list of pairs"
        )
    # The output of a layer that is left should be what the missing layers after it would make.
    straddled = (*(layer - 1 for layer in origins[1:]), teacher_layers - 1)
    return straddled if rule == "straddle" else origins


def window(teacher_layers: int, student_layers: int, width: int = 8) -> tuple[tuple[int, ...], ...]:
    """Per student layer the consecutive teacher layers that a calibration chooses from.

    ``min(width, teacher_layers)`` layers around the one of the ratio map. Of an even number, the
    extra one is deeper: 8 are three before the centre, the centre and four after it. At both ends
    the window is shifted inside the teacher. Raises KavaError for a width below 1.
    """
    if width < 1:
        raise KavaError(f"width={width} holds no teacher layer; use 1 or more")
    width = min(width, teacher_layers)
    centres = [_nearest(teacher_layers, student_layers, s) for s in range(student_layers)]
    starts = (centre - (width - 1) // 2 for centre in centres)
    inside = (min(max(start, 0), teacher_layers - width) for start in starts)
    return tuple(tuple(range(start, start + width)) for start in inside)


def _nearest(teacher_layers: int, student_layers: int, student: int) -> int:
    """The teacher layer at the student layer's relative depth, halves rounded up.

    ``s * (Lt - 1) / (Ls - 1)``: first meets first and last meets last. A student of one layer meets
    the teacher's last.
    """
    if student_layers == 1:
        return teacher_layers - 1
    # Fractions are exact. A float could fall on either side of one half, and the map with it.
    # Python's round() sends halves to the even neighbour.
    return (2 * Fraction(student * (teacher_layers - 1), student_layers - 1) + 1) // 2


def _from_pairs(
    setting: Sequence[tuple[int, int]], teacher_layers: int, student_layers: int, field: str
) -> LayerMap:
    """The map of [teacher, student] pairs in any order."""
    pairs = tuple(sorted(((int(t), int(s)) for t, s in setting), key=lambda pair: pair[1]))
    outside = [
        [t, s] for t, s in pairs if not (0 <= t < teacher_layers and 0 <= s < student_layers)
    ]
    if outside:
        raise KavaError(
            f"{field}: pairs {outside} are outside a teacher of {teacher_layers} and a student of "
            f"{student_layers} layers; count layers from 0, as [teacher, student]"
        )
    students = [student for _, student in pairs]
    twice = sorted({student for student in students if students.count(student) > 1})
    if not pairs or twice:
        problem = f"student layers {twice} appear twice" if twice else "it holds no pairs"
        raise KavaError(f"{field}: {problem}; give one [teacher, student] pair per student layer")
    return LayerMap(tuple(students), tuple((teacher,) for teacher, _ in pairs))


def _take(
    x_LBTKH: Float[Array, "L B T K H"], layers: tuple[int, ...], side: str
) -> Float[Array, "P B T K H"]:
    """The given layers; the array itself when that is all of them in order."""
    depth = x_LBTKH.shape[0]
    if max(layers) >= depth:  # JAX would clamp the number and go on with the wrong layer
        raise KavaError(
            f"layer map: it reads {side} layer {max(layers)}, the cache ends with layer "
            f"{depth - 1}; make the map for this {side}"
        )
    # Indexing with all layers would still be a gather, and copy the whole cache.
    return x_LBTKH if layers == tuple(range(depth)) else x_LBTKH[np.array(layers)]


def _problem_of_layers(
    students: tuple[int, ...], teachers: tuple[tuple[int, ...], ...]
) -> str | None:
    """What is wrong with the layer numbers of a map, in words, with the remedy."""
    if not students or len(students) != len(teachers):
        return (
            f"{len(teachers)} rows of teacher_layers for {len(students)} student_layers; give one "
            f"row per student layer, and at least one"
        )
    lengths = sorted({len(row) for row in teachers})
    if len(lengths) > 1 or lengths[0] < 1:
        return (
            f"rows of teacher_layers hold {', '.join(map(str, lengths))} layers; give every row "
            f"the same number, at least one"
        )
    if list(students) != sorted(set(students)):
        return f"student_layers={list(students)} do not increase; put the rows in student order"
    negative = sorted({n for row in (students, *teachers) for n in row if n < 0})
    return f"layers {negative} are negative; count layers from 0" if negative else None
