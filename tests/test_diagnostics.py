"""Baselines against loops in numpy, and the words and warnings by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.diagnostics import alarms, alignment, alignment_gap, oscillates, verdict
from tests.tolerances import TOL

CLOSE = TOL["float32"]
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])


def caches(offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Student and target [L, B, T, K, H] that share content and, if asked, a constant offset."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(2, 3, 5, 2, 8))
    student = 0.5 * target + rng.normal(size=target.shape)
    direction = rng.normal(size=(2, 1, 1, 2, 8))
    return student + offset * direction, target + offset * direction


def cos64(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def by_loops(s: np.ndarray, t: np.ndarray) -> dict[str, np.ndarray]:
    """Every baseline, per layer, one vector at a time."""
    tokens = np.argwhere(MASK)
    found: dict[str, list[float]] = {}
    for layer in range(2):
        cos, shuffled, constant, centered = [], [], [], []
        for head in range(2):
            own = {(b, i): s[layer, b, i, head] for b, i in tokens}
            aim = {(b, i): t[layer, b, i, head] for b, i in tokens}
            units = [x / np.linalg.norm(x) for x in aim.values()]
            best = np.mean(units, axis=0)
            mean_s, mean_t = (np.mean(list(x.values()), axis=0) for x in (own, aim))
            for (b, i), x in own.items():
                cos.append(cos64(x, aim[b, i]))
                constant.append(cos64(best, aim[b, i]))
                centered.append(cos64(x - mean_s, aim[b, i] - mean_t))
                if ((b + 1) % 3, i) in aim:
                    shuffled.append(cos64(x, aim[(b + 1) % 3, i]))
        for name, values in (
            ("cos", cos),
            ("cos_shuffled", shuffled),
            ("cos_constant", constant),
            ("cos_centered", centered),
        ):
            found.setdefault(name, []).append(float(np.mean(values)))
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_every_baseline_equals_the_loops(offset: float) -> None:
    s, t = caches(offset)
    keep = MASK[None, :, :, None, None]
    poisoned = [jnp.asarray(np.where(keep, x, np.nan), jnp.float32) for x in (s, t)]
    layers = jax.jit(alignment, static_argnames="per_layer")(
        *poisoned, jnp.asarray(MASK), per_layer=True
    )
    whole = alignment(*poisoned, jnp.asarray(MASK))
    for name, want in by_loops(s, t).items():
        np.testing.assert_allclose(getattr(layers, name).value, want, atol=CLOSE, err_msg=name)
        np.testing.assert_allclose(getattr(whole, name).value, want.mean(), atol=CLOSE)
    length = np.linalg.norm(s, axis=-1)[:, MASK.astype(bool)].mean()
    np.testing.assert_allclose(whole.s_magnitude.value, length, rtol=CLOSE)


def test_a_shared_offset_flatters_the_cosine_and_the_baselines_show_it() -> None:
    s, t = (jnp.asarray(x, jnp.float32) for x in caches(offset=10.0))
    found = alignment(s, t, jnp.asarray(MASK))
    assert found.cos.value > 0.95
    assert found.cos_constant.value > 0.95
    assert found.cos_centered.value < 0.6
    assert verdict(float(found.cos.value)) == "Excellent"
    assert verdict(float(found.cos.value), float(found.cos_shuffled.value)) == "collapsed"


def test_the_constant_baseline_is_the_best_constant() -> None:
    _, t = caches(1.0)
    target = jnp.asarray(t[:1, :, :, :1], jnp.float32)
    best = alignment(target, target, jnp.asarray(MASK)).cos_constant.value
    for seed in range(200):
        other = np.random.default_rng(seed).normal(size=8)
        rivals = [cos64(other, t[0, b, i, 0]) for b, i in np.argwhere(MASK)]
        assert np.mean(rivals) <= best + CLOSE


def test_a_batch_of_one_has_no_shuffled_baseline() -> None:
    s, t = (jnp.asarray(x[:, :1], jnp.float32) for x in caches())
    assert alignment(s, t, jnp.asarray(MASK[:1])).cos_shuffled.count == 0


@pytest.mark.parametrize(
    ("cos", "word"),
    [
        (0.951, "Excellent"),
        (0.95, "Good"),
        (0.80, "Good"),
        (0.79, "Acceptable"),
        (0.50, "Acceptable"),
        (0.49, "Poor"),
        (-1.0, "Poor"),
    ],
)
def test_bands(cos: float, word: str) -> None:
    assert verdict(cos) == word
    assert verdict(cos, float("nan")) == word
    assert verdict(cos, cos - 0.5) == word


def test_the_word_is_withdrawn_when_the_gap_says_so() -> None:
    assert verdict(0.96, 0.92) == "collapsed"  # gap 0.04
    assert verdict(0.50, 0.45 - 1e-6) == "collapsed"  # gap 0.05, but 0.09 of what was possible
    assert verdict(0.99, 0.93) == "Excellent"
    assert verdict(1.0, 1.0) == "collapsed"
    assert alignment_gap(0.9, None) is None
    assert alignment_gap(0.9, float("nan")) is None
    assert alignment_gap(0.75, 0.5) == 0.25


@pytest.mark.parametrize(
    ("mag_ratio", "words"),
    [
        (1.0, None),
        (0.5, None),
        (2.0, None),
        (0.4, "outside 0.5 to 2.0"),
        (2.1, "outside 0.5 to 2.0"),
        (0.05, "collapsed"),
        (11.0, "exploded"),
    ],
)
def test_magnitude_alarms(mag_ratio: float, words: str | None) -> None:
    found = alarms(mag_ratio=mag_ratio, mag_loss=0.1)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_loss_alarms() -> None:
    swinging = [0.5, 0.3, 0.5, 0.3, 0.5, 0.3]
    found = alarms(mag_ratio=1.0, mag_loss=1.5, dir_losses=swinging)
    assert len(found) == 2
    assert "learning rates" in found[0]
    assert "lower beta" in found[1]


def test_oscillation_is_large_and_repeated() -> None:
    assert oscillates([0.5, 0.3, 0.5, 0.3, 0.5, 0.3])
    assert not oscillates([0.5, 0.3, 0.5])
    assert not oscillates([0.8, 0.6, 0.45, 0.3, 0.2, 0.1])
    assert not oscillates([0.500, 0.501, 0.500, 0.501, 0.500, 0.501])
