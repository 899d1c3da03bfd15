"""Which tokens are sampled, against a count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.diagnostics import join, sample_tokens
from kava_jax.errors import KavaError

MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])

take = jax.jit(sample_tokens, static_argnums=3)


def numbered(mask: np.ndarray, layers: int = 2) -> tuple[jax.Array, jax.Array]:
    """Caches whose vectors hold their row-major position (and the layer), NaN where masked."""
    place = np.where(mask, np.arange(mask.size).reshape(mask.shape), np.nan)[None, ..., None, None]
    student = place + 1000 * np.arange(layers).reshape(-1, 1, 1, 1, 1) + np.zeros((1, 1, 1, 2, 3))
    return tuple(jnp.asarray(x, jnp.float32) for x in (student, -student))


# Of MASK the positions 0 1 2, 5 6 7 8 9, 11 12 count: ten tokens.
@pytest.mark.parametrize(
    ("size", "places"),
    [
        (1, [7]),  # rank 5
        (4, [1, 5, 8, 11]),  # ranks 1.25, 3.75, 6.25, 8.75, rounded down
        (3, [1, 7, 11]),  # ranks 1.67, 5, 8.33
        (10, [0, 1, 2, 5, 6, 7, 8, 9, 11, 12]),
        (12, [0, 1, 2, 5, 6, 7, 8, 9, 11, 12]),
        (40, [0, 1, 2, 5, 6, 7, 8, 9, 11, 12]),
    ],
)
def test_sampling_by_hand_count(size: int, places: list[int]) -> None:
    sample = take(*numbered(MASK), jnp.asarray(MASK), size)
    assert sample.student.shape == sample.target.shape == (2, size, 2, 3)
    assert sample.counted.tolist() == [i < len(places) for i in range(size)]
    n = len(places)
    for layer in range(2):
        want = np.broadcast_to(np.array(places)[:, None, None] + 1000 * layer, (n, 2, 3))
        np.testing.assert_array_equal(sample.student[layer, :n], want)
        np.testing.assert_array_equal(sample.target[layer, :n], -want)
    assert not sample.student[:, n:].any()
    assert not sample.target[:, n:].any()


def test_sampling_where_nothing_counts_and_of_bfloat16() -> None:
    nothing = np.zeros_like(MASK)
    sample = take(*numbered(nothing), jnp.asarray(nothing), 4)
    assert not sample.counted.any()
    assert not sample.student.any()
    half = [x.astype(jnp.bfloat16) for x in numbered(MASK)]
    assert take(*half, jnp.asarray(MASK), 4).student.dtype == jnp.float32


def test_sampling_a_million_tokens_does_not_overflow() -> None:
    mask = np.ones((1024, 1024), bool)
    mask[3, 5] = False
    total, size = mask.sum(), 3000
    place = jnp.arange(mask.size, dtype=jnp.float32).reshape(1, *mask.shape, 1, 1)
    found = take(place, place, jnp.asarray(mask), size).student.reshape(-1)
    ranks = [int((2 * i + 1) * int(total) // (2 * size)) for i in range(size)]
    np.testing.assert_array_equal(found, np.flatnonzero(mask)[ranks])


def test_joined_samples_are_one() -> None:
    one, other = (take(*numbered(MASK), jnp.asarray(MASK), size) for size in (4, 12))
    joined = join([one, other])
    assert joined.student.shape == joined.target.shape == (2, 16, 2, 3)
    np.testing.assert_array_equal(joined.student[:, :4], one.student)
    np.testing.assert_array_equal(joined.target[:, 4:], other.target)
    assert joined.counted.tolist() == [True] * 14 + [False] * 2


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(KavaError, match="size=0"):
        sample_tokens(*numbered(MASK), jnp.asarray(MASK), 0)
