"""Which teacher layer each student layer is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from kava_jax.errors import KavaError


@dataclass(frozen=True)
class LayerMap:
    """Pairs (teacher layer, student layer), counted from 0, in student order."""

    pairs: tuple[tuple[int, int], ...]

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Teacher layer of every pair."""
        return tuple(teacher for teacher, _ in self.pairs)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Student layer of every pair."""
        return tuple(student for _, student in self.pairs)

    @property
    def last_teacher_layer(self) -> int:
        """The deepest teacher layer that is needed; the teacher is cut after it."""
        return max(self.teacher_layers)


def ratio_map(teacher_layers: int, student_layers: int) -> LayerMap:
    """Every student layer at its relative depth; first meets first and last meets last.

    ``teacher = round(student * (teacher_layers - 1) / (student_layers - 1))``, halves rounded up;
    a student of one layer meets the teacher's last.
    """
    if student_layers == 1:
        return LayerMap(((teacher_layers - 1, 0),))
    span = student_layers - 1
    # Integer arithmetic: Python's round() sends halves to the even neighbour.
    return LayerMap(
        tuple(
            ((2 * student * (teacher_layers - 1) + span) // (2 * span), student)
            for student in range(student_layers)
        )
    )


def make_layer_map(
    setting: str | Sequence[tuple[int, int]],
    teacher_layers: int,
    student_layers: int,
    *,
    field: str = "layer_map",
) -> LayerMap:
    """A checked map from ``"ratio"`` or explicit pairs.

    Raises KavaError, naming ``field``, for an unknown name, an empty list, a layer that does not
    exist, or a student layer used twice.
    """
    if isinstance(setting, str):
        if setting != "ratio":
            raise KavaError(f"{field}={setting!r} is unknown; use 'ratio' or a list of pairs")
        return ratio_map(teacher_layers, student_layers)
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
        problem = f"student layers {twice} stand twice" if twice else "it holds no pairs"
        raise KavaError(f"{field}: {problem}; give one [teacher, student] pair per student layer")
    return LayerMap(pairs)
