"""Layer maps against lists written by hand, and their caches against numpy's gathers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kava_jax.alignment.layer_map import (
    CALIBRATED_MAPS,
    NAMED_MAPS,
    ORIGIN_MAPS,
    LayerMap,
    make_layer_map,
    window,
)
from kava_jax.cache import KVCache
from kava_jax.errors import KavaError

# s * 47 / 27 and s * 27 / 23, rounded by hand.
FROM_48_TO_28 = [0, 2, 3, 5, 7, 9, 10, 12, 14, 16, 17, 19, 21, 23]
FROM_48_TO_28 += [24, 26, 28, 30, 31, 33, 35, 37, 38, 40, 42, 44, 45, 47]
FROM_28_TO_24 = [0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 23, 25, 26]
FROM_28_TO_24 += [27]

SIDE_BY_SIDE = LayerMap((0, 2), ((3, 1, 4), (0, 4, 2)))
GATHERED = LayerMap((1, 2), ((4,), (0,)))


@pytest.mark.parametrize(
    ("teacher", "student", "layers"),
    [
        (48, 28, FROM_48_TO_28),
        (28, 24, FROM_28_TO_24),
        (12, 6, [0, 2, 4, 7, 9, 11]),
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
    assert found.teacher_layers == tuple((layer,) for layer in layers)
    assert found.student_layers == tuple(range(student))
    assert found.last_teacher_layer == teacher - 1
    assert (len(found), found.sources) == (student, 1)


@pytest.mark.parametrize(
    ("name", "teacher", "student", "layers"),
    [
        ("last", 12, 6, [6, 7, 8, 9, 10, 11]),
        ("last", 48, 28, list(range(20, 48))),
        ("last", 4, 2, [2, 3]),
        ("last", 3, 1, [2]),
        *((name, 5, 5, [0, 1, 2, 3, 4]) for name in ("ratio", "last")),
    ],
)
def test_one_layer_each(name: str, teacher: int, student: int, layers: list[int]) -> None:
    found = make_layer_map(name, teacher, student)
    assert found == LayerMap(tuple(range(student)), tuple((layer,) for layer in layers))


MIDDLE_OUT = (*range(8), *range(23, 30))  # 15 of 30, without a block in the middle


@pytest.mark.parametrize(
    ("origins", "depth", "straddled"),
    [
        (MIDDLE_OUT, 30, [0, 1, 2, 3, 4, 5, 6, 22, 23, 24, 25, 26, 27, 28, 29]),
        ((0, 2, 4), 6, [1, 3, 5]),  # every second: the skipped layer's own
        ((1, 2, 4), 8, [1, 3, 7]),
        ((3,), 5, [4]),
        ((0, 1, 2), 3, [0, 1, 2]),  # nothing was cut
    ],
)
def test_maps_of_a_cut_student(origins: tuple[int, ...], depth: int, straddled: list[int]) -> None:
    for name, layers in (("origin", origins), ("straddle", straddled)):
        found = make_layer_map(name, depth, len(origins), origins=origins)
        rows = tuple((layer,) for layer in layers)
        assert found == LayerMap(tuple(range(len(origins))), rows)


def test_explicit_pairs_are_put_in_student_order() -> None:
    found = make_layer_map([(5, 3), (7, 0), (5, 1)], 8, 4)
    assert found == LayerMap((0, 1, 3), ((7,), (5,), (5,)))
    assert found.last_teacher_layer == 7


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("raito", ["='raito' is unknown", *map(repr, NAMED_MAPS), *map(repr, CALIBRATED_MAPS)]),
        ("", ["='' is unknown", "list of pairs"]),
        ("cka", ["='cka' needs a calibration", "`kava calibrate CONFIG` makes it"]),
        ("calibrated", ["='calibrated' needs a calibration", "`kava calibrate CONFIG` makes it"]),
        *(
            (name, [f"={name!r}: it is not known which", "was cut from", "use 'ratio'"])
            for name in ORIGIN_MAPS
        ),
        ([], ["holds no pairs"]),
        ([(8, 0), (0, 4), (1, 1), (-1, 2)], ["[[8, 0], [-1, 2], [0, 4]]", "8 and", "of 4 layers"]),
        ([(0, 1), (1, 1), (2, 3), (3, 3), (4, 0)], ["[1, 3] appear twice"]),
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


def test_last_needs_a_teacher_as_deep_as_the_student() -> None:
    with pytest.raises(KavaError, match=r"^layer_map='last': a teacher of 4 layers .*last 6.*use"):
        make_layer_map("last", 4, 6)


def test_the_named_maps_are_the_ones_described() -> None:
    assert NAMED_MAPS == ("ratio", "last", "origin", "straddle")
    assert ORIGIN_MAPS == ("origin", "straddle")
    assert CALIBRATED_MAPS == ("cka", "calibrated")


@pytest.mark.parametrize(
    ("depths", "width", "firsts", "size"),
    [
        ((12, 6), 3, [0, 1, 3, 6, 8, 9], 3),  # centres 0, 2, 4, 7, 9, 11: one on either side
        ((12, 6), 4, [0, 1, 3, 6, 8, 8], 4),  # one before the centre, two after it
        ((12, 6), 1, [0, 2, 4, 7, 9, 11], 1),
        ((12, 6), 12, [0] * 6, 12),
        ((3, 2), 8, [0, 0], 3),
        ((2, 4), 8, [0] * 4, 2),
        ((9, 1), 8, [1], 8),
    ],
)
def test_windows(depths: tuple[int, int], width: int, firsts: list[int], size: int) -> None:
    found = window(*depths, width=width)
    assert found == tuple(tuple(range(first, first + size)) for first in firsts)


def test_windows_are_eight_wide_unless_told() -> None:
    found = window(48, 28)
    assert (len(found), found[0], found[27]) == (28, tuple(range(8)), tuple(range(40, 48)))
    assert found[14] == (21, 22, 23, 24, 25, 26, 27, 28)  # around layer 24


def test_a_window_holds_something() -> None:
    with pytest.raises(KavaError, match=r"width=0 .*use 1 or more"):
        window(4, 2, width=0)


def caches(dtype=np.float32, rows: int = 2) -> KVCache:
    """Random keys and values of 5 layers, 3 tokens, 2 heads of dim 4."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 5, rows, 3, 2, 4))
    return KVCache(jnp.asarray(k, dtype), jnp.asarray(v, dtype))


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


student_side = jax.jit(LayerMap.student_side, static_argnums=0)
teacher_side = jax.jit(LayerMap.teacher_side, static_argnums=0)


def test_gathers_are_numpys() -> None:
    cache = caches()
    student, teacher = student_side(GATHERED, cache), teacher_side(GATHERED, cache)
    for part in ("k", "v"):
        x = np.asarray(getattr(cache, part))
        np.testing.assert_array_equal(getattr(student, part), x[[1, 2]])
        np.testing.assert_array_equal(getattr(teacher, part), x[[4, 0]])


def test_side_by_side_are_all_heads_of_the_first_then_of_the_second() -> None:
    assert (SIDE_BY_SIDE.sources, SIDE_BY_SIDE.last_teacher_layer) == (3, 4)
    cache = caches()
    found = teacher_side(SIDE_BY_SIDE, cache)
    for part in ("k", "v"):
        x, y = np.asarray(getattr(cache, part)), np.asarray(getattr(found, part))
        assert y.shape == (2, 2, 3, 6, 4)
        for p, row in enumerate(((3, 1, 4), (0, 4, 2))):
            for head in range(6):
                np.testing.assert_array_equal(y[p, :, :, head], x[row[head // 2], :, :, head % 2])


def test_a_map_among_the_layers_that_are_kept_takes_the_same() -> None:
    layer_map = LayerMap((0, 1), ((4, 1), (3, 4)))
    assert layer_map.read_layers == (1, 3, 4)
    whole = caches()
    kept = KVCache(*(array[np.array([1, 3, 4])] for array in whole))
    for ours, theirs in zip(
        layer_map.among((1, 3, 4)).teacher_side(kept), layer_map.teacher_side(whole), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_vectors_that_hold_nan_stay_where_they_are() -> None:
    cache = caches()
    cache = KVCache(*(x.at[:, 1, 2].set(jnp.nan) for x in cache))
    bad = np.isnan(np.asarray(teacher_side(SIDE_BY_SIDE, cache).k))
    assert bad[:, 1, 2].all()
    assert bad.sum() == bad[:, 1, 2].size


def test_all_layers_in_order_are_the_arrays_themselves() -> None:
    cache, identity = caches(), make_layer_map("ratio", 5, 5)
    for side in (identity.student_side(cache), identity.teacher_side(cache)):
        assert side.k is cache.k
        assert side.v is cache.v
    first_four = make_layer_map("ratio", 4, 4).student_side(cache)
    np.testing.assert_array_equal(first_four.k, np.asarray(cache.k)[:4])


def test_a_sharded_batch_stays_where_it_is() -> None:
    cache = caches(rows=8)
    batch = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(None, "data"))
    sharded = jax.device_put(cache, batch)
    program = teacher_side.lower(SIDE_BY_SIDE, sharded).compile()
    assert "all-" not in program.as_text()  # neither gather, reduce nor to-all
    found, want = program(sharded), teacher_side(SIDE_BY_SIDE, cache)
    assert found.k.sharding.is_equivalent_to(batch, 5)
    np.testing.assert_array_equal(found.k, want.k)


def test_a_cache_that_is_too_short_is_refused_while_tracing() -> None:
    deeper = LayerMap((0, 5), ((0,), (7,)))
    with pytest.raises(
        KavaError, match=r"reads student layer 5, the cache ends with layer 4; make"
    ):
        student_side(deeper, caches())
    with pytest.raises(
        KavaError, match=r"reads teacher layer 7, the cache ends with layer 4; make"
    ):
        teacher_side(deeper, caches())


@pytest.mark.parametrize("layer_map", [SIDE_BY_SIDE, GATHERED])
def test_a_map_survives_its_file(layer_map: LayerMap) -> None:
    text = json.dumps(layer_map.as_dict(), allow_nan=False)
    found = LayerMap.from_dict(json.loads(text), "map.json")
    assert found == layer_map
    assert hash(found) == hash(layer_map)


def test_the_file_is_plain() -> None:
    raw = {"student_layers": [2], "teacher_layers": [[4, 5]]}
    assert LayerMap((2,), ((4, 5),)).as_dict() == raw
    assert LayerMap.from_dict(raw, "x") == LayerMap((2,), ((4, 5),))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student_layers": []}, ["1 rows", "0 student_layers", "row per student layer"]),
        ({"student_layers": [0, 1]}, ["1 rows", "2 student_layers"]),
        ({"student_layers": [], "teacher_layers": []}, ["0 rows", "at least one"]),
        ({"teacher_layers": [[]]}, ["hold 0 layers", "at least one"]),
        ({"student_layers": [0, 1], "teacher_layers": [[1], [1, 2]]}, ["hold 1, 2 layers"]),
        ({"student_layers": [1, 0], "teacher_layers": [[1], [2]]}, ["[1, 0] do not increase"]),
        ({"student_layers": [1, 1], "teacher_layers": [[1], [2]]}, ["[1, 1] do not increase"]),
        ({"student_layers": [-1]}, ["layers [-1] are negative", "from 0"]),
        ({"teacher_layers": [[3, -2]]}, ["layers [-2] are negative"]),
        ({"student_layers": 0}, ["student_layers=0 is not valid", "a valid tuple", "make"]),
        ({"student_layers": [True]}, ["student_layers.0=True", "a valid integer"]),
        ({"teacher_layers": [[1, 2.0]]}, ["teacher_layers.0.1=2.0", "a valid integer"]),
        ({"teacher_layers": [[1, None]]}, ["teacher_layers.0.1=None"]),
        ({"teacher_layers": [[[1], 2]]}, ["teacher_layers.0.0=[1]", "a valid integer"]),
        ({"teacher_layers": None}, ["teacher_layers=None", "a valid tuple"]),
        ({"weights": [[0.5, 0.5]]}, ["layer map.weights=[[0.5, 0.5]]", "Unexpected"]),
    ],
)
def test_a_malformed_file_is_named(change: dict, words: list[str]) -> None:
    raw = {"student_layers": [0], "teacher_layers": [[1, 2]]} | change
    with pytest.raises(KavaError) as caught:
        LayerMap.from_dict(raw, "runs/a/map.json")
    message = str(caught.value)
    assert message.startswith("runs/a/map.json: ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("raw", [None, 3, [[0, 0]], "ratio", {}, {"student_layers": [0]}])
def test_something_else_than_a_map_is_named(raw) -> None:
    with pytest.raises(KavaError, match=r"^map\.json: layer map.* is not valid: .*; make it again"):
        LayerMap.from_dict(raw, "map.json")


def test_the_class_checks_itself() -> None:
    with pytest.raises(KavaError, match=r"^layer map: .*do not increase"):
        LayerMap((1, 0), ((0,), (1,)))


def test_rows_are_words() -> None:
    assert GATHERED.rows() == [(1, "4"), (2, "0")]
    assert SIDE_BY_SIDE.rows() == [(0, "3 + 1 + 4"), (2, "0 + 4 + 2")]


def test_the_table_is_two_columns_of_plain_text() -> None:
    assert LayerMap((0, 11), ((3, 4), (11, 12))).table("teachers.0.layer_map") == [
        "teachers.0.layer_map",
        "student layer | teacher layers, side by side",
        "            0 | 3 + 4",
        "           11 | 11 + 12",
    ]
    assert GATHERED.table("x")[1] == "student layer | teacher layer"
