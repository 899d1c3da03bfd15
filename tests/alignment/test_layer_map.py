"""Layer maps against lists written by hand."""

import pytest

from kava_jax.alignment.layer_map import make_layer_map
from kava_jax.errors import KavaError

# s * 47 / 27 and s * 27 / 23, rounded by hand.
FROM_48_TO_28 = [0, 2, 3, 5, 7, 9, 10, 12, 14, 16, 17, 19, 21, 23]
FROM_48_TO_28 += [24, 26, 28, 30, 31, 33, 35, 37, 38, 40, 42, 44, 45, 47]
FROM_28_TO_24 = [0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 23, 25, 26]
FROM_28_TO_24 += [27]


@pytest.mark.parametrize(
    ("teacher", "student", "layers"),
    [
        (48, 28, FROM_48_TO_28),
        (28, 24, FROM_28_TO_24),
        (4, 2, [0, 3]),
        (3, 3, [0, 1, 2]),
        (4, 3, [0, 2, 3]),  # 1.5 goes up
        (6, 3, [0, 3, 5]),  # and so does 2.5, which Python's round() would send to 2
        (2, 4, [0, 0, 1, 1]),  # a student deeper than its teacher
        (2, 3, [0, 1, 1]),
        (1, 3, [0, 0, 0]),
        (48, 1, [47]),
        (1, 1, [0]),
    ],
)
def test_ratio(teacher: int, student: int, layers: list[int]) -> None:
    found = make_layer_map("ratio", teacher, student)
    assert list(found.teacher_layers) == layers
    assert found.student_layers == tuple(range(student))
    assert found.last_teacher_layer == teacher - 1


def test_explicit_pairs_are_put_in_student_order() -> None:
    found = make_layer_map([(5, 3), (7, 0), (5, 1)], 8, 4)
    assert found.pairs == ((7, 0), (5, 1), (5, 3))
    assert found.teacher_layers == (7, 5, 5)
    assert found.student_layers == (0, 1, 3)
    assert found.last_teacher_layer == 7


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("raito", ["'raito' is unknown", "'ratio'"]),
        ([], ["holds no pairs"]),
        ([(8, 0), (0, 4), (1, 1), (-1, 2)], ["[[8, 0], [-1, 2], [0, 4]]", "8 and", "of 4 layers"]),
        ([(0, 1), (1, 1), (2, 3), (3, 3), (4, 0)], ["[1, 3] stand twice"]),
    ],
)
def test_errors_name_the_field_and_every_bad_item(setting, words: list[str]) -> None:
    with pytest.raises(KavaError) as caught:
        make_layer_map(setting, 8, 4, field="teachers.1.layer_map")
    message = str(caught.value)
    assert message.startswith("teachers.1.layer_map")
    assert "\n" not in message
    for word in words:
        assert word in message
