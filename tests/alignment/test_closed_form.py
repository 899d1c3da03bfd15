"""Closed-form fits and layer choice against planted maps and formulas on the raw vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.alignment.closed_form import (
    choose_by_cka,
    choose_layers,
    fit,
    linear_cka,
    r_squared,
    ridge,
)
from kava_jax.alignment.grams import Grams, batch_grams, token_mean
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.errors import KavaError
from tests.tolerances import TOL

FORWARD, BACKWARD = "teacher_to_student", "student_to_teacher"
WINDOWS = ((0, 1, 2, 3), (1, 2, 3, 4))
TEACHERS, ES, ET, N = 5, 16, 8, 2048
STD, OFFSET = 20.0, 600.0
WEAK = 1e-8  # a ridge that plants no bias of its own

sums = jax.jit(batch_grams, static_argnames="windows")
mean = jax.jit(token_mean)


def moments(student: np.ndarray, teacher: np.ndarray, windows=WINDOWS) -> Grams:
    """Grams of [L, tokens, E] vectors that all count, in two batches."""
    s, t = (
        np.asarray(x, np.float32).reshape(len(x), 4, -1, x.shape[-1]) for x in (student, teacher)
    )
    mask = np.ones(s.shape[1:3], bool)
    shifts = mean(s[:, :2], mask[:2]), mean(t[:, :2], mask[:2])
    grams = Grams(*shifts, windows)
    for part in (slice(0, 2), slice(2, 4)):
        grams.add(sums(s[:, part], t[:, part], mask[part], *shifts, windows))
    return grams


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def teacher_of(seed: int, width: int = ET) -> np.ndarray:
    """Layers without a common cause, each dimension with an offset far above its content."""
    return OFFSET * normal(99, TEACHERS, 1, width) + STD * normal(seed, TEACHERS, N, width)


def side_by_side(x: np.ndarray, layers) -> np.ndarray:
    return np.concatenate([x[n] for n in layers], axis=-1)


def maps_of(fitted: dict) -> list[dict[str, np.ndarray]]:
    """Those of the keys and of the values."""
    return [fitted[part]["out"] for part in "kv"]


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def raw_r_squared(x: np.ndarray, y: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> float:
    return 1 - np.sum((y - x @ kernel - bias) ** 2) / np.sum((y - y.mean(0)) ** 2)


PLANTED = ((0, 2), (2, 4))  # per student layer


def planted_forward(seed: int, kernels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Students that are linear maps (P I O) of two teacher layers each, plus an offset."""
    teacher = teacher_of(seed)
    mapped = [side_by_side(teacher, row) @ m for row, m in zip(PLANTED, kernels, strict=True)]
    return np.stack(mapped) + 7.0, teacher


def test_a_planted_map_from_two_teacher_layers_is_found() -> None:
    kernels = normal(0, 2, 2, 2 * ET, ES)  # keys and values, student layers
    fits, devs = (
        [moments(*planted_forward(seed + i, kernels[i])) for i in (0, 1)] for seed in (10, 20)
    )
    rows = tuple(
        choose_layers(fits, devs, p, window, 2, WEAK, FORWARD) for p, window in enumerate(WINDOWS)
    )
    assert rows == PLANTED
    fitted = fit(tuple(fits), rows, FORWARD, WEAK)
    for i, side in enumerate(maps_of(fitted)):
        assert side["kernel"].dtype == side["bias"].dtype == np.float32
        assert side["kernel"].shape == (2, 2 * ET, ES)
        assert relative_error(side["kernel"], kernels[i]) < 1e-3
        assert (
            relative_error(side["bias"], np.full((2, ES), 7.0)) < 1e-2
        )  # a mean of 600 times 1e-6
        for p, row in enumerate(rows):
            score = r_squared(side["kernel"][p], side["bias"][p], devs[i], p, row, FORWARD)
            assert score == pytest.approx(1, abs=TOL["float32"])


def planted_backward(seed: int, kernels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A teacher whose planted layers are linear maps of the first student layer that has them."""
    student = 50.0 + STD * normal(seed, 2, N, ES)
    teacher = teacher_of(seed + 1)
    teacher[0], teacher[3] = (student[0] @ m - 600.0 for m in kernels[:2])
    teacher[1], teacher[4] = (student[1] @ m + 30.0 for m in kernels[2:])
    return student, teacher


def test_a_planted_map_from_the_student_is_found() -> None:
    kernels = normal(1, 2, 4, ES, ET)
    fits, devs = (
        [moments(*planted_backward(seed + i, kernels[i])) for i in (0, 1)] for seed in (30, 40)
    )
    rows = tuple(
        choose_layers(fits, devs, p, window, 2, WEAK, BACKWARD) for p, window in enumerate(WINDOWS)
    )
    assert rows == ((0, 3), (1, 4))
    fitted = fit(tuple(fits), rows, BACKWARD, WEAK)
    for i, side in enumerate(maps_of(fitted)):
        assert side["kernel"].shape == (2, ES, 2 * ET)
        wanted = np.stack([np.concatenate(kernels[i][j : j + 2], axis=1) for j in (0, 2)])
        assert relative_error(side["kernel"], wanted) < 1e-3
        for p, row in enumerate(rows):
            score = r_squared(side["kernel"][p], side["bias"][p], devs[i], p, row, BACKWARD)
            assert score == pytest.approx(1, abs=TOL["float32"])


def twins(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The student leans on layer 1, which layer 2 nearly repeats, and a little on layer 3."""
    teacher = teacher_of(seed)
    teacher[2] = teacher[1] + 0.3 * STD * normal(seed + 1, N, ET)
    maps = normal(2, 2, ET, ET)
    return np.stack([teacher[1] @ maps[0] + 0.5 * teacher[3] @ maps[1]] * 2), teacher


def test_a_layer_that_adds_nothing_is_passed_over() -> None:
    grams, dev = moments(*twins(50)), moments(*twins(60))
    single = [
        r_squared(*fit_one(grams, 0, (n,), FORWARD), dev, 0, (n,), FORWARD) for n in WINDOWS[0]
    ]
    assert np.argsort(single)[-2:].tolist() == [2, 1]
    chosen = choose_layers((grams,) * 2, (dev,) * 2, 0, WINDOWS[0], 2, WEAK, FORWARD)
    assert chosen == (1, 3)


def fit_one(grams: Grams, p: int, layers, direction, strength=WEAK):
    """Kernel and bias of one student layer by the public ridge."""
    cross, means = grams.cross_cov(p, layers), (grams.teacher_mean(layers), grams.student_mean(p))
    if direction == FORWARD:
        return ridge(grams.teacher_cov(layers), cross, *means, strength)
    return ridge(grams.student_cov(p), cross.T, *means[::-1], strength)


def leaning(seed: int, weights: dict[int, float]) -> Grams:
    """Moments of a student that is a weighted sum of teacher layers, and noise."""
    teacher = teacher_of(seed)
    student = sum(weight * teacher[n] for n, weight in weights.items())
    return moments(np.stack([student + STD * normal(seed + 1, N, ET)] * 2), teacher)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_keys_and_values_both_have_a_say(direction) -> None:
    nearly_even, decided = {1: 1.0, 2: 0.9}, {1: 0.3, 2: 1.0}

    def choose(k, v) -> tuple[int, ...]:
        fits, devs = ([leaning(70 + i, k), leaning(80 + i, v)] for i in (0, 4))
        window = WINDOWS[1]
        assert choose_by_cka(fits, 1, window) == (1 if k == v else 2)
        return choose_layers(fits, devs, 1, window, 1, 1e-4, direction)

    assert choose(nearly_even, nearly_even) == (1,)
    assert choose(nearly_even, decided) == choose(decided, nearly_even) == (2,)


def test_the_map_is_fitted_on_one_split_and_scored_on_the_other() -> None:
    """Either split alone speaks for layer 2, but its map does not carry over."""
    early, late = leaning(90, {1: 1.0, 2: 3.0}), leaning(94, {1: 1.0, 2: -3.0})
    for grams, dev, wanted in ((early, late, 1), (early, early, 2), (late, late, 2)):
        chosen = choose_layers((grams,) * 2, (dev,) * 2, 0, WINDOWS[0], 1, WEAK, FORWARD)
        assert chosen == (wanted,)


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_r_squared_of_a_noisy_map_is_the_known_share(noise: float) -> None:
    kernel = normal(3, 2 * ET, ES) / np.sqrt(2 * ET)

    def split(seed: int) -> Grams:
        teacher = teacher_of(seed)
        clean = side_by_side(teacher, (1, 3)) @ kernel
        return moments(np.stack([clean + noise * STD * normal(seed + 1, N, ES)] * 2), teacher)

    signal = np.sum(kernel**2) / ES  # per dimension, in units of the teacher's variance
    truth = signal / (signal + noise**2)
    fitted = fit_one(split(100), 1, (1, 3), FORWARD, 1e-4)
    assert r_squared(*fitted, split(102), 1, (1, 3), FORWARD) == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_a_rotated_student_is_predicted(direction) -> None:
    rotation = np.linalg.qr(normal(4, ET, ET))[0]

    def split(seed: int) -> Grams:
        teacher = teacher_of(seed)
        return moments(np.stack([(teacher[n] - OFFSET) @ rotation for n in (0, 2)]), teacher)

    grams, dev = split(110), split(112)
    for p, layer in enumerate((0, 2)):
        fitted = fit_one(grams, p, (layer,), direction, 1e-4)
        assert r_squared(*fitted, dev, p, (layer,), direction) >= 0.999
        assert linear_cka(dev, p, layer) == pytest.approx(1, abs=TOL["float32"])


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_an_unrelated_teacher_scores_only_where_it_was_fitted(direction) -> None:
    few = 256

    def split(seed: int, tokens: int) -> Grams:
        student = OFFSET + STD * normal(seed, 2, tokens, ES)
        return moments(student, teacher_of(seed + 1)[:, :tokens])

    grams, held_out = split(120, few), split(122, N)
    layers = (0, 2)  # 16 input dimensions either way
    fitted = fit_one(grams, 0, layers, direction, 1e-4)
    # By chance a fit explains D / n of its own tokens, and loses as much on others.
    chance = 2 * ET / few
    assert r_squared(*fitted, grams, 0, layers, direction) == pytest.approx(chance, rel=0.25)
    assert r_squared(*fitted, held_out, 0, layers, direction) == pytest.approx(-chance, rel=0.25)
    # With tokens enough both come to nothing.
    fitted = fit_one(split(124, N), 0, layers, direction, 1e-4)
    assert abs(r_squared(*fitted, held_out, 0, layers, direction)) < 0.02


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_r_squared_equals_that_of_the_raw_vectors(direction) -> None:
    student, teacher = planted_forward(130, normal(5, 2, 2 * ET, ES))
    student += 2 * STD * normal(131, *student.shape)
    grams = moments(student, teacher)
    # The scoring split has other means: the fit is off by a constant there.
    other_s, other_t = (
        student[:, ::-1] + 30.0 * normal(132, *student.shape),
        teacher[:, ::-1] - 15.0,
    )
    other = moments(other_s, other_t)
    for p, layers in ((0, (3, 0)), (1, (2, 4, 1))):
        kernel, bias = fit_one(grams, p, layers, direction, 1e-2)
        sides = side_by_side(other_t, layers), other_s[p]
        x, y = sides if direction == FORWARD else sides[::-1]
        wanted = raw_r_squared(x, y, kernel, bias)
        assert 0.02 < abs(wanted) < 0.98
        found = r_squared(kernel, bias, other, p, layers, direction)
        assert found == pytest.approx(wanted, rel=0, abs=TOL["float32"])
        # Without the offset between the splits it would be another number.
        recentred = y.mean(0) - x.mean(0) @ kernel
        assert abs(raw_r_squared(x, y, kernel, recentred) - wanted) > 0.01


def test_ridge_is_the_least_squares_solution_with_penalty_rows() -> None:
    x = 3.0 + normal(6, 300, 7) * np.linspace(0.1, 4, 7)
    y = x @ normal(7, 7, 3) + normal(8, 300, 3)
    strength = 0.05
    xc, yc = x - x.mean(0), y - y.mean(0)
    cov = xc.T @ xc / len(x)
    penalty = np.sqrt(len(x) * strength * np.diag(cov).mean())
    wanted = np.linalg.lstsq(
        np.concatenate([xc, penalty * np.eye(7)]), np.concatenate([yc, np.zeros((7, 3))])
    )[0]
    kernel, bias = ridge(cov, xc.T @ yc / len(x), x.mean(0), y.mean(0), strength)
    assert relative_error(kernel, wanted) < TOL["float32"]
    assert relative_error(bias, y.mean(0) - x.mean(0) @ wanted) < TOL["float32"]


def test_repeated_and_constant_inputs_break_nothing() -> None:
    student, teacher = planted_forward(140, normal(9, 2, 2 * ET, ES))
    teacher[:, :, 5] = OFFSET
    teacher[2, :, :4] = 2 * teacher[0, :, :4]
    student[0] = side_by_side(teacher, (0, 2)) @ normal(9, 2 * ET, ES)
    grams = moments(student, teacher)
    kernel, bias = fit_one(grams, 0, (0, 2), FORWARD, 1e-5)
    assert np.isfinite(kernel).all()
    assert np.isfinite(bias).all()
    assert r_squared(kernel, bias, grams, 0, (0, 2), FORWARD) > 0.999
    # Nothing was learnt from what never changed.
    assert np.abs(kernel[[5, ET + 5]]).max() < TOL["float32"]
    assert np.isfinite(fit((grams, grams), PLANTED, BACKWARD, 1e-5)["k"]["out"]["kernel"]).all()


def test_a_ridge_of_zero_is_refused_where_it_is_needed() -> None:
    twice = np.ones((2, 2))
    with pytest.raises(
        KavaError, match=r"strength=0 leaves 2 input dimensions.*give more"
    ) as caught:
        ridge(twice, twice, np.ones(2), np.ones(2), 0)
    assert "\n" not in str(caught.value)


def test_constant_sides_have_answers() -> None:
    kernel, bias = ridge(np.zeros((3, 3)), np.zeros((3, 2)), np.ones(3), np.array([4.0, 5.0]), 1e-4)
    np.testing.assert_array_equal(kernel, np.zeros((3, 2)))
    np.testing.assert_array_equal(bias, [4.0, 5.0])
    teacher = teacher_of(150)
    grams = moments(np.full((2, N, ES), 8.0), teacher)
    assert linear_cka(grams, 0, 1) == 0.0
    assert r_squared(np.zeros((ET, ES)), np.zeros(ES), grams, 0, (1,), FORWARD) == 0.0


def test_cka_is_that_of_the_raw_vectors_and_finds_the_planted_layer() -> None:
    teacher = teacher_of(160)
    student = np.stack([teacher[n] @ normal(10 + n, ET, ES) for n in (2, 4)])
    student += STD * normal(161, *student.shape)
    grams = moments(student, teacher)
    for p, window in enumerate(WINDOWS):
        for layer in window:
            x, y = student[p] - student[p].mean(0), teacher[layer] - teacher[layer].mean(0)
            norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
            wanted = np.linalg.norm(y.T @ x) ** 2 / norms
            assert linear_cka(grams, p, layer) == pytest.approx(wanted, abs=TOL["float32"])
    assert [choose_by_cka((grams, grams), p, window) for p, window in enumerate(WINDOWS)] == [2, 4]


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_the_fit_fits_the_projector(direction) -> None:
    rng = np.random.default_rng(11)
    k, v = ((rng.normal(size=(2, N, ES)), rng.normal(size=(TEACHERS, N, ET))) for _ in range(2))
    rows = ((1, 0), (2, 4))
    fitted = fit((moments(*k), moments(*v)), rows, direction, 1e-3)
    for p, row in enumerate(rows):
        for side, data in zip(maps_of(fitted), (k, v), strict=True):
            kernel, bias = fit_one(moments(*data), p, row, direction, 1e-3)
            assert relative_error(side["kernel"][p], kernel) < TOL["float32"]
            assert relative_error(side["bias"][p], bias) < TOL["float32"]
    projector = KVDimensionProjector(
        {"big": {"d_model": 2 * ET, "num_heads": 4, "num_layers": 2}},
        ES,
        kind="linear",
        direction=direction,
        student_heads=2,
        per_layer=True,
    )
    params = fitted
    state = nnx.to_pure_dict(nnx.state(projector, nnx.Param))
    assert jax.tree.map(np.shape, state) == {"pairs": {"big": jax.tree.map(np.shape, params)}}
    nnx.update(projector, {"pairs": {"big": jax.tree.map(jnp.asarray, params)}})
    shape = (2, 1, 3, 4, 4) if direction == FORWARD else (2, 1, 3, 2, 8)
    source = {part: jnp.asarray(rng.normal(size=shape), jnp.float32) for part in "kv"}
    projected = projector.project("big", source)
    for part, side in zip("kv", maps_of(fitted), strict=True):
        x, y = source[part], projected[part]
        flat = np.asarray(x, np.float64).reshape(2, 3, -1)
        wanted = np.stack([flat[p] @ side["kernel"][p] + side["bias"][p] for p in (0, 1)])
        np.testing.assert_allclose(np.asarray(y).reshape(2, 3, -1), wanted, atol=TOL["float32"])


def test_wrong_counts_and_rows_are_refused() -> None:
    grams = moments(normal(12, 2, N, ES), teacher_of(170))
    for count in (0, 5):
        with pytest.raises(KavaError, match=f"count={count} layers out of a window of 4"):
            choose_layers((grams,) * 2, (grams,) * 2, 0, WINDOWS[0], count, WEAK, FORWARD)
    for rows in (((0,),), ((0,), (1, 2)), ((), ())):
        with pytest.raises(KavaError, match="layer_map: "):
            fit((grams, grams), rows, FORWARD, WEAK)
    with pytest.raises(KavaError, match="outside the window"):
        fit((grams, grams), ((0,), (0,)), FORWARD, WEAK)
