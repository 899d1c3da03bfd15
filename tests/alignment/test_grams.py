"""Streamed moments against float64 covariances of the raw vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kava_jax.alignment.grams import BatchGrams, Grams, batch_grams, token_mean
from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import replicated
from tests.tolerances import TOL

LS, LT, ES, ET, ROWS, TOKENS = 3, 6, 4, 5, 16, 80
WINDOWS = ((0, 1, 2), (1, 2, 3), (3, 4, 5))
OFFSET, STD = 600.0, 20.0

sums = jax.jit(batch_grams, static_argnames="windows")
mean = jax.jit(token_mean)


def offset_data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student, teacher and mask: shared offsets of +-600, contents that depend on each other, NaN
    where the mask is zero."""
    rng = np.random.default_rng(seed)
    mask = rng.random((ROWS, TOKENS)) < 0.7
    source = rng.normal(size=(ROWS, TOKENS, 7))
    made = []
    for layers, width in ((LS, ES), (LT, ET)):
        mix = rng.normal(size=(layers, 7, width)) / np.sqrt(7)
        offset = OFFSET * rng.choice([-1.0, 1.0], (layers, 1, 1, width))
        noise = rng.normal(size=(layers, ROWS, TOKENS, width))
        content = STD * (np.einsum("bti,lio->lbto", source, mix) + noise)
        made.append(np.where(mask[None, :, :, None], offset + content, np.nan).astype(np.float32))
    return made[0], made[1], mask


def stream(pieces, shift_from=None) -> Grams:
    """Grams of several (student, teacher, mask) pieces, shifted by the first one's mean."""
    student, teacher, mask = pieces[0] if shift_from is None else shift_from
    shifts = mean(student, mask), mean(teacher, mask)
    grams = Grams(*shifts, WINDOWS)
    for student, teacher, mask in pieces:
        grams.add(sums(student, teacher, mask, *shifts, WINDOWS))
    return grams


def rows(data, part: slice):
    student, teacher, mask = data
    return student[:, part], teacher[:, part], mask[part]


def counted(x: np.ndarray, mask: np.ndarray, layers) -> np.ndarray:
    """[tokens, layers side by side] in float64."""
    return np.concatenate([x[n][mask] for n in layers], axis=1).astype(np.float64)


def direct_cov(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)


def moments(grams: Grams) -> dict[str, np.ndarray]:
    """Every block and mean that can be asked for, pairs of layers included, in content units."""
    found = {}
    for p, window in enumerate(WINDOWS):
        found[f"student {p}"] = grams.student_cov(p) / STD**2
        found[f"student mean {p}"] = grams.student_mean(p) / STD
        for layers in (window, (window[2], window[0])):
            found[f"teacher {layers}"] = grams.teacher_cov(layers) / STD**2
            found[f"teacher mean {layers}"] = grams.teacher_mean(layers) / STD
            found[f"cross {p} {layers}"] = grams.cross_cov(p, layers) / STD**2
    return found


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    assert found.keys() == wanted.keys()
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


def direct_moments(student, teacher, mask) -> dict[str, np.ndarray]:
    wanted = {}
    for p, window in enumerate(WINDOWS):
        s = counted(student, mask, [p]) / STD
        wanted[f"student {p}"], wanted[f"student mean {p}"] = direct_cov(s, s), s.mean(0)
        for layers in (window, (window[2], window[0])):
            t = counted(teacher, mask, layers) / STD
            wanted[f"teacher {layers}"], wanted[f"teacher mean {layers}"] = (
                direct_cov(t, t),
                t.mean(0),
            )
            wanted[f"cross {p} {layers}"] = direct_cov(t, s)
    return wanted


def test_moments_are_those_of_the_raw_vectors_under_a_large_offset() -> None:
    data = offset_data()
    wanted = direct_moments(*data)
    assert worst(moments(stream([data])), wanted) < TOL["float32"]
    # The offset is large enough to matter: the same without a shift misses.
    unshifted = Grams(np.zeros((LS, ES)), np.zeros((LT, ET)), WINDOWS)
    unshifted.add(sums(*data, jnp.zeros((LS, ES)), jnp.zeros((LT, ET)), WINDOWS))
    assert worst(moments(unshifted), wanted) > 10 * TOL["float32"]


def test_uneven_batches_come_to_the_same_as_one() -> None:
    data = offset_data(1)
    whole = stream([data])
    nothing = (data[0], data[1], np.zeros_like(data[2]))
    pieces = [rows(data, part) for part in (slice(0, 2), slice(2, 15), slice(15, 16))]
    pieces.insert(1, nothing)
    streamed = stream(pieces)
    assert streamed.count == whole.count == int(data[2].sum())
    # Not the same shift either: the first piece's mean is another one.
    assert worst(moments(streamed), moments(whole)) < TOL["float32"]
    assert worst(moments(streamed), direct_moments(*data)) < TOL["float32"]


def test_padding_does_not_count_whatever_it_holds() -> None:
    student, teacher, mask = offset_data(2)
    student[:, ~mask], teacher[:, ~mask] = 0.0, np.inf
    found = moments(stream([(student, teacher, mask)]))
    assert worst(found, moments(stream([offset_data(2)]))) == 0.0


def test_the_batch_axis_may_be_sharded() -> None:
    data = offset_data(3)
    # Not quite the mean, or the plain sums would be rounding and nothing else.
    shifts = mean(data[0], data[2]) - STD, mean(data[1], data[2]) - STD
    alone = sums(*data, *shifts, WINDOWS)
    mesh = make_mesh(8, 1, 1)
    by_row = NamedSharding(mesh, PartitionSpec(None, "data"))
    places = (by_row, by_row, NamedSharding(mesh, PartitionSpec("data")), *[replicated(mesh)] * 2)
    placed = [jax.device_put(x, place) for x, place in zip((*data, *shifts), places, strict=True)]
    spread = jax.jit(
        batch_grams, static_argnums=5, in_shardings=places, out_shardings=replicated(mesh)
    )(*placed, WINDOWS)
    assert isinstance(spread, BatchGrams)
    assert {len(leaf.sharding.device_set) for leaf in spread} == {8}
    assert all(leaf.is_fully_replicated for leaf in spread)
    assert spread.count == alone.count
    for left, right in zip(spread, alone, strict=True):
        scale = float(jnp.abs(right).max())
        np.testing.assert_allclose(left, right, rtol=0, atol=TOL["across_meshes"] * scale)


def test_the_band_ends_with_the_last_layer_and_is_float32() -> None:
    student, teacher, mask = offset_data(4)
    # A quarter of the rows: what is looked at is rounding of inputs, not that of long sums.
    student, teacher, mask = student[:, :4], teacher[:, :4], mask[:4]
    half = jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)
    shifts = mean(half[0], mask), mean(half[1], mask)
    batch = sums(*half, mask, *shifts, WINDOWS)
    assert batch.teacher.shape == (3, LT, ET, ET)
    assert batch.cross.shape == (LS, 3, ET, ES)
    assert {leaf.dtype for leaf in batch[:5]} == {jnp.dtype("float32")}
    for offset in range(3):
        filled = np.abs(batch.teacher[offset]).max((1, 2)) > 0
        np.testing.assert_array_equal(filled, np.arange(LT) + offset < LT)
    # The rounded inputs are what is summed, not rounded products.
    grams = Grams(*shifts, WINDOWS)
    grams.add(batch)
    rounded = [np.asarray(x, np.float32) for x in half]
    assert worst(moments(grams), direct_moments(*rounded, mask)) < TOL["bf16_inputs"]


def test_every_product_asks_for_full_float32() -> None:
    """On a CPU it is the default; on an accelerator it is TF32 or bf16 otherwise."""
    data = offset_data()
    shifts = jnp.zeros((LS, ES)), jnp.zeros((LT, ET))
    program = sums.lower(*data, *shifts, WINDOWS).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("[HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize(
    "windows",
    [
        ((0, 1), (1, 2)),
        ((0, 1), (1, 2), (2, 3, 4)),
        ((0, 1), (1, 2), (2, 4)),
        ((0, 1), (1, 2), (5, 6)),
        ((-1, 0), (1, 2), (2, 3)),
        ((1, 0), (1, 2), (2, 3)),
        ((), (), ()),
        (),
    ],
)
def test_wrong_windows_are_refused(windows) -> None:
    with pytest.raises(KavaError, match="windows: ") as caught:
        Grams(np.zeros((LS, ES)), np.zeros((LT, ET)), windows)
    assert "\n" not in str(caught.value)
    with pytest.raises(KavaError, match="windows: "):
        sums(*offset_data(), jnp.zeros((LS, ES)), jnp.zeros((LT, ET)), windows)


def test_what_cannot_be_asked_is_said() -> None:
    data = offset_data(5)
    grams = stream([data])
    with pytest.raises(KavaError, match=r"layers \[0, 3\] are further apart than the window of 3"):
        grams.teacher_cov((0, 3))
    with pytest.raises(KavaError, match=r"layers \[3\] are outside the window \[0, 1, 2\]"):
        grams.cross_cov(0, (2, 3))
    empty = Grams(np.zeros((LS, ES)), np.zeros((LT, ET)), WINDOWS)
    with pytest.raises(KavaError, match="count=0 tokens"):
        empty.student_mean(0)


@pytest.mark.parametrize("side", [0, 1])
def test_a_counted_nan_is_an_error_and_counts_nothing(side: int) -> None:
    data = offset_data(6)
    grams = stream([data])
    before = moments(grams)
    spoiled = [data[0].copy(), data[1].copy(), data[2]]
    row, token = np.argwhere(data[2])[0]
    spoiled[side][1, row, token, 2] = np.nan
    with pytest.raises(KavaError, match="not finite"):
        grams.add(sums(*spoiled, mean(data[0], data[2]), mean(data[1], data[2]), WINDOWS))
    assert worst(moments(grams), before) == 0.0
