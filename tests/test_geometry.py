"""Sphere maths against numpy in float64, and the promises about zero, huge and tiny vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.geometry import (
    Mean,
    angular_distance,
    center,
    compare,
    cosine,
    geodesic_rotate,
    magnitude,
    masked_mean,
    unit,
)
from tests.tolerances import TOL

CLOSE = TOL["float32"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def to_jax(x: np.ndarray, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(x, dtype)


def cosine64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unit_magnitude_cosine_and_angle_equal_numpy(dtype) -> None:
    a, b = (to_jax(normal(seed, 3, 5, 16), dtype) for seed in (0, 1))
    a64, b64 = (np.asarray(x, np.float64) for x in (a, b))
    length = np.linalg.norm(a64, axis=-1)
    cos = cosine64(a64, b64)
    for got, want in (
        (unit(a), a64 / length[..., None]),
        (magnitude(a), length),
        (cosine(a, b), cos),
        (angular_distance(a, b), np.arccos(cos)),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 3.7])
def test_cosine_and_angle_do_not_depend_on_scale(scale: float) -> None:
    a, b = to_jax(normal(0, 20, 16)), to_jax(normal(1, 20, 16))
    np.testing.assert_allclose(cosine(a * scale, b), cosine(a, b), atol=CLOSE)
    np.testing.assert_allclose(angular_distance(a, b * scale), angular_distance(a, b), atol=CLOSE)
    np.testing.assert_allclose(magnitude(a * scale), scale * magnitude(a), rtol=CLOSE)


@pytest.mark.parametrize("function", [cosine, angular_distance])
def test_value_and_gradient_are_finite_everywhere(function) -> None:
    base = to_jax(normal(0, 16))
    scales = (0.0, 1.0, 1e30, 1e-30, 1e-37, 1e-42)
    others = (base, -base, base[::-1], 0 * base, 1e30 * base[::-1], -1e-30 * base)
    a = jnp.stack([base * scale for scale in scales for _ in others])
    b = jnp.stack([other for _ in scales for other in others])
    for run in (jax.vmap, lambda f: jax.jit(jax.vmap(f))):
        value, gradients = run(jax.value_and_grad(function, argnums=(0, 1)))(a, b)
        assert jnp.isfinite(value).all()
        assert all(jnp.isfinite(g).all() for g in gradients)


def test_gradient_of_cosine_equals_the_formula() -> None:
    a, b = normal(0, 16), normal(1, 16)
    length_a, length_b = np.linalg.norm(a), np.linalg.norm(b)
    want = b / (length_a * length_b) - cosine64(a, b) * a / length_a**2
    np.testing.assert_allclose(jax.grad(cosine)(to_jax(a), to_jax(b)), want, atol=CLOSE)
    tiny = jax.grad(cosine)(to_jax(a * 1e-30), to_jax(b * 1e30))
    np.testing.assert_allclose(tiny, want * 1e30, rtol=1e-4)


def test_zero_vectors_have_cosine_zero_and_a_right_angle() -> None:
    zero, one = jnp.zeros(4), jnp.ones(4)
    for a, b in ((zero, one), (one, zero), (zero, zero)):
        assert cosine(a, b) == 0
        np.testing.assert_allclose(angular_distance(a, b), np.pi / 2, rtol=CLOSE)
    assert magnitude(zero) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_comparing_equals_its_parts_and_leaves_out_what_does_not_count(dtype) -> None:
    a, b = (to_jax(normal(seed, 3, 5, 16), dtype) for seed in (0, 1))
    keep = jnp.asarray(normal(2, 3, 5) > 0)
    for found, want in zip(compare(a, b), (cosine(a, b), magnitude(a), magnitude(b)), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, want, rtol=CLOSE, atol=CLOSE)

    def total(a: jax.Array, b: jax.Array) -> jax.Array:
        return sum(part.sum() for part in compare(a, b, keep))

    poisoned = jnp.where(keep[..., None], a, jnp.nan)
    cos, of_a, of_b = compare(poisoned, b, keep)
    assert (cos[~keep] == 0).all()
    assert (of_a[~keep] == 1).all()
    assert (of_b[~keep] == 1).all()
    np.testing.assert_array_equal(cos[keep], cosine(a, b)[keep])
    found, clean = (jax.grad(total, argnums=(0, 1))(x, b) for x in (poisoned, a))
    for gradient, want in zip(found, clean, strict=True):
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(gradient, want)
        assert (gradient[~keep] == 0).all()


def test_one_vector_that_needs_care_changes_no_other() -> None:
    a, b = (to_jax(normal(seed, 6, 16)) for seed in (0, 1))
    careful = jax.grad(lambda a: cosine(a, b).sum())(a.at[0].mul(1e-30))
    plain = jax.grad(lambda a: cosine(a, b).sum())(a)
    np.testing.assert_allclose(careful[1:], plain[1:], atol=CLOSE)
    np.testing.assert_allclose(careful[0], plain[0] * 1e30, rtol=1e-4)


def test_cosine_never_passes_one_and_a_nan_stays_visible() -> None:
    a = to_jax(normal(0, 500, 64))
    assert cosine(a, a).max() <= 1
    assert cosine(a, -a).min() >= -1
    assert jnp.isnan(cosine(a.at[0, 0].set(jnp.nan), a)[0])


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 1.0, np.pi - 1e-3])
def test_small_and_flat_angles_keep_their_digits(angle: float) -> None:
    a = jnp.asarray([1.0, 0.0, 0.0])
    b = to_jax(np.array([np.cos(angle), np.sin(angle), 0.0]))
    np.testing.assert_allclose(angular_distance(a, b), angle, rtol=CLOSE)


@pytest.mark.parametrize("degrees", [0.0, 15.0, 60.0, 90.0, 180.0, 300.0])
def test_geodesic_rotation_turns_by_the_angle_and_keeps_the_length(degrees: float) -> None:
    x, towards = to_jax(normal(0, 20, 32)), to_jax(normal(1, 20, 32))
    turned = geodesic_rotate(x, towards, np.radians(degrees))
    np.testing.assert_allclose(cosine(turned, x), np.cos(np.radians(degrees)), atol=CLOSE)
    np.testing.assert_allclose(magnitude(turned), magnitude(x), rtol=CLOSE)


def test_geodesic_rotation_by_the_whole_distance_arrives() -> None:
    x, towards = to_jax(normal(0, 20, 32)), to_jax(normal(1, 20, 32))
    arrived = geodesic_rotate(x, towards, angular_distance(x, towards))
    np.testing.assert_allclose(unit(arrived), unit(towards), atol=CLOSE)


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0])
def test_geodesic_rotation_without_a_great_circle_changes_nothing(factor: float) -> None:
    x = to_jax(normal(0, 5, 8))
    np.testing.assert_array_equal(geodesic_rotate(x, factor * x, 0.5), x)
    gradient = jax.grad(lambda x: geodesic_rotate(x, factor * x, 0.5).sum())(x)
    assert jnp.isfinite(gradient).all()


def test_masked_mean_counts_only_what_the_mask_keeps() -> None:
    values, mask = normal(0, 3, 4), np.array([[1, 0, 1, 1]])
    poisoned = to_jax(np.where(mask, values, np.nan))
    mean = masked_mean(poisoned, jnp.asarray(mask))
    np.testing.assert_allclose(mean.value, values[:, [0, 2, 3]].mean(), atol=CLOSE)
    assert mean.count == 9
    gradient = jax.grad(lambda v: masked_mean(v, jnp.asarray(mask)).value)(poisoned)
    np.testing.assert_allclose(gradient, np.broadcast_to(mask / 9, (3, 4)), atol=CLOSE)
    by_row = masked_mean(poisoned, jnp.asarray(mask), axis=1)
    np.testing.assert_allclose(by_row.value, values[:, [0, 2, 3]].mean(1), atol=CLOSE)


def test_a_mean_of_nothing_is_zero_with_a_zero_gradient() -> None:
    assert Mean(jnp.float32(0), jnp.float32(0)).value == 0
    gradient = jax.grad(lambda v: masked_mean(v, jnp.zeros(3)).value)(jnp.ones(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_center_subtracts_the_masked_mean_and_clears_the_rest() -> None:
    x, mask = normal(0, 2, 6, 3), np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    keep = mask[..., None].astype(bool)
    want = np.where(keep, x - x[mask.astype(bool)].mean(0), 0.0)
    poisoned = to_jax(np.where(keep, x, np.inf))
    np.testing.assert_allclose(center(poisoned, jnp.asarray(keep), (0, 1)), want, atol=CLOSE)
