"""Every figure against loops in numpy float64, and the trap that raw cosines walk into."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kava_jax.diagnostics import (
    TokenSample,
    alignment,
    diagnose,
    sample_tokens,
)
from kava_jax.journal.verdict import collapse_signs, verdict
from tests.tolerances import TOL

CLOSE = TOL["float32"]
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])

align = jax.jit(alignment)
measure = jax.jit(diagnose)
take = jax.jit(sample_tokens, static_argnums=3)


def float32(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def sample_of(
    student: np.ndarray, target: np.ndarray, counted: np.ndarray | None = None
) -> TokenSample:
    """A sample [P, n, K, H], all of it counted unless told."""
    everything = np.ones(student.shape[1], bool)
    counted = jnp.asarray(everything if counted is None else counted)
    s, t = float32(student, target)
    return TokenSample(s, t, counted, s)


def cos64(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def unit64(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- what every step measures ---


def caches(offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Student and target [P, B, T, K, H] that share content and, if asked, a constant offset."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(2, 3, 5, 2, 8))
    student = 0.5 * target + rng.normal(size=target.shape)
    direction = rng.normal(size=(2, 1, 1, 2, 8))
    return student + offset * direction, target + offset * direction


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_alignment_equals_the_loops(offset: float) -> None:
    s, t = caches(offset)
    keep = MASK[None, :, :, None, None]
    found = align(*float32(*(np.where(keep, x, np.nan) for x in (s, t))), jnp.asarray(MASK))
    tokens = [(b, i) for b, i in np.argwhere(MASK)]
    for layer in range(2):
        own = [(layer, b, i, head) for b, i in tokens for head in range(2)]
        pairs = [(at, (layer, (at[1] + 1) % 3, *at[2:])) for at in own]
        shuffled = [cos64(s[a], t[b]) for a, b in pairs if MASK[b[1], b[2]]]
        want = {
            "cos": [cos64(s[at], t[at]) for at in own],
            "cos_shuffled": shuffled,
            "s_magnitude": [np.linalg.norm(s[at]) for at in own],
            "t_magnitude": [np.linalg.norm(t[at]) for at in own],
        }
        for name, values in want.items():
            mean = found[name]
            assert mean.count[layer] == len(values), name
            np.testing.assert_allclose(mean.sum[layer], np.sum(values), rtol=CLOSE, atol=CLOSE)


def test_a_batch_of_one_has_no_shuffled_baseline() -> None:
    s, t = float32(*(x[:, :1] for x in caches()))
    assert not alignment(s, t, jnp.asarray(MASK[:1]))["cos_shuffled"].count.any()


# --- every figure against numpy ---


def hsic64(k: np.ndarray, l: np.ndarray) -> float:
    """The unbiased HSIC as it is defined (Song et al. 2012): a mean over ordered quadruples."""
    terms = [
        k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return float(np.mean(terms))


def diagnostics64(s: np.ndarray, t: np.ndarray) -> dict[str, float]:
    """All figures of one layer [n, K, H] in float64, a vector or an eigenvalue at a time."""
    n, heads, _ = s.shape
    each = list(itertools.product(range(n), range(heads)))
    best = unit64(t).mean(0)
    s0, t0 = s - s.mean(0), t - t.mean(0)

    def retrieval(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.reshape(n, -1), b.reshape(n, -1)
        found = 0
        for i in range(n):
            found += all(cos64(a[i], b[i]) > cos64(a[i], b[j]) for j in range(n) if j != i)
        return found / n

    def rank(x: np.ndarray) -> float:
        spectrum = np.linalg.eigvalsh(np.cov(x.reshape(n, -1).T))
        return spectrum.sum() ** 2 / (spectrum**2).sum()

    def top3(x: np.ndarray) -> float:
        energy = np.sort((x.reshape(n, -1) ** 2).sum(0))
        return energy[-3:].sum() / energy.sum()

    k, l = (x.reshape(n, -1) @ x.reshape(n, -1).T for x in (s, t))
    lengths = [[np.mean([np.linalg.norm(h) for h in x[i]]) for i in range(n)] for x in (s, t)]
    ratios = np.divide(*lengths)
    q10, q50, q90 = np.quantile(ratios, [0.1, 0.5, 0.9])
    return {
        "cos_constant": np.mean([cos64(best[at[1]], t[at]) for at in each]),
        "cos_centered": np.mean([cos64(s0[at], t0[at]) for at in each]),
        "retrieval": retrieval(s, t),
        "retrieval_centered": retrieval(s0, t0),
        "cka": hsic64(k, l) / np.sqrt(hsic64(k, k) * hsic64(l, l)),
        "student_rank": rank(s),
        "target_rank": rank(t),
        "student_min_std": s.reshape(n, -1).std(0).min(),
        "target_min_std": t.reshape(n, -1).std(0).min(),
        "student_top3": top3(s),
        "target_top3": top3(t),
        "mag_ratio_q10": q10,
        "mag_ratio_q50": q50,
        "mag_ratio_q90": q90,
    }


def tokens(n: int, *, offset: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Related student and target [2, n, 2, 6] of uneven dimensions."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(2, n, 2, 6)) * np.linspace(0.3, 2, 6)
    student = 0.8 * target + rng.normal(size=target.shape)
    shared = offset * rng.normal(size=(2, 1, 2, 6))
    return student + shared, target + shared


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("n", [4, 11])
def test_every_figure_equals_float64(n: int, offset: float) -> None:
    s, t = tokens(n, offset=offset)
    # The same tokens among others that do not count and hold NaN.
    counted = np.zeros(16, bool)
    counted[np.random.default_rng(n).permutation(16)[:n]] = True
    padded = np.full((2, 2, 16, 2, 6), np.nan)
    padded[:, :, counted] = s, t
    found = measure(sample_of(*padded, counted))
    for layer in range(2):
        want = diagnostics64(s[layer], t[layer])
        assert set(want) == set(found)
        for name, value in want.items():
            np.testing.assert_allclose(
                found[name][layer], value, rtol=CLOSE, atol=CLOSE, err_msg=name
            )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_lengths_whose_squares_leave_float32_change_nothing(scale: float) -> None:
    s, t = tokens(16)
    plain, scaled = (measure(sample_of(factor * s, factor * t)) for factor in (1.0, scale))
    for name, value in scaled.items():
        unit = scale if name.endswith("std") else 1.0
        np.testing.assert_allclose(value / unit, plain[name], rtol=CLOSE, err_msg=name)


def test_the_constant_baseline_is_the_best_constant() -> None:
    _, t = tokens(16, offset=1.0)
    best = float(measure(sample_of(t, t))["cos_constant"][0])
    for seed in range(200):
        other = np.random.default_rng(seed).normal(size=(1, 2, 6))
        assert (unit64(other) * unit64(t[0])).sum(-1).mean() <= best + CLOSE


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 16])
@pytest.mark.parametrize("student", ["zero", "constant", "varied"])
@pytest.mark.parametrize("target", ["zero", "constant", "varied"])
def test_everything_is_finite_whatever_degenerates(n: int, student: str, target: str) -> None:
    varied = dict(zip(("student", "target"), tokens(16), strict=True))
    # 0.1 is no power of two: its mean over n is not itself in float32.
    makers = {"zero": lambda x: 0 * x, "constant": lambda x: 0 * x + 0.1 * x[:, :1]}
    sides = [
        makers.get(kind, lambda x: x)(varied[side])
        for side, kind in (("student", student), ("target", target))
    ]
    counted = np.arange(16) < n
    keep = counted[None, :, None, None]
    found = measure(sample_of(*(np.where(keep, x, np.nan) for x in sides), counted))
    for name, value in found.items():
        assert np.isfinite(value).all(), name
    if n < 4:
        assert not found["cka"].any()
    if n < 2 or student != "varied" or target != "varied":
        still = ("cos_centered", "retrieval_centered", "cka")
        assert not np.array([found[name] for name in still]).any()
    for side, kind in (("student", student), ("target", target)):
        if kind != "varied" or n < 2:
            assert not found[f"{side}_rank"].any()
            assert not found[f"{side}_min_std"].any()


@pytest.mark.parametrize("n", [37, 64])
def test_ties_are_not_found(n: int) -> None:
    rng = np.random.default_rng(0)
    varied, other = rng.normal(size=(2, 2, n, 2, 6))
    constant = np.broadcast_to(varied[:, :1], varied.shape)
    # One constant student is nearest to one target at most; a constant target ties with itself.
    assert (measure(sample_of(constant, other))["retrieval"] <= 1 / n + CLOSE).all()
    assert not measure(sample_of(other, constant))["retrieval"].any()
    assert not measure(sample_of(constant, constant))["retrieval"].any()
    assert (measure(sample_of(varied, varied))["retrieval"] == 1).all()
    # Twins in direction are nobody's strict favourite, whatever rounding makes of their lengths.
    pairs = n // 2
    varied[:, pairs : 2 * pairs] = 3.7 * varied[:, :pairs]
    found = measure(sample_of(varied, varied))["retrieval"]
    np.testing.assert_allclose(found, (n - 2 * pairs) / n, rtol=CLOSE)


def test_the_least_bad_target_is_found_and_no_blank_stands_in_its_way() -> None:
    content = np.random.default_rng(0).normal(size=(2, 16, 12))
    content = unit64(content - content.mean(-1, keepdims=True)).reshape(2, 16, 2, 6)
    found = measure(sample_of(content + 1, content - 1, np.arange(16) < 10))
    assert (found["retrieval"] == 1).all()  # all cosines are negative, a blank's is 0


@pytest.mark.parametrize("n", [16, 64])
def test_one_outlier_among_constants_has_no_similarity(n: int) -> None:
    """Its U-centred Gram matrix is zero in exact arithmetic: the rest is rounding, no CKA of 1."""
    s, t = np.full((2, 2, n, 2, 6), 0.1)
    s[:, 3], t[:, 3] = 7.3, 2.9
    assert not measure(sample_of(s, t))["cka"].any()


# --- CKA ---


def biased_cka(s: np.ndarray, t: np.ndarray) -> float:
    s, t = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(0) for x in (s, t))
    return (np.linalg.norm(s.T @ t) ** 2) / np.linalg.norm(s.T @ s) / np.linalg.norm(t.T @ t)


def test_cka_sees_through_rotation_scale_and_shift() -> None:
    rng = np.random.default_rng(1)
    s, t = tokens(64)
    rotation, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    turned = 3.7 * (s.reshape(2, 64, 12) @ rotation).reshape(s.shape) + rng.normal(size=(2, 6))
    plain, rotated = measure(sample_of(s, t)), measure(sample_of(turned, t))
    np.testing.assert_allclose(rotated["cka"], plain["cka"], rtol=CLOSE)
    assert (np.abs(rotated["cos_centered"] - plain["cos_centered"]) > 0.1).all()  # which sees it
    np.testing.assert_allclose(measure(sample_of(turned, s))["cka"], 1.0, rtol=CLOSE)
    # It does see some dimensions stretched and others shrunk.
    assert (measure(sample_of(s * np.linspace(5, 0.1, 6), s))["cka"] < 0.95).all()


def test_cka_of_independent_tokens_is_near_zero_though_they_are_no_more_than_dimensions() -> None:
    s, t = np.random.default_rng(2).normal(size=(2, 2, 64, 2, 32))
    assert biased_cka(s[0], t[0]) > 0.4  # what debiasing is for
    assert (np.abs(measure(sample_of(s, t))["cka"]) < 0.05).all()


# --- the trap ---

OFFSET, EXAMPLES, LENGTH, HEADS, WIDTH, LAYERS = 4.0, 8, 32, 2, 32, 3


def with_shared_offset(seed: int, relation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys of both sides and their contents' cosines: unit contents across a shared offset.

    Each layer and head has its own offset of length 4. The student's content is ``relation`` times
    the target's and noise for the rest: 0 is independent.
    """
    rng = np.random.default_rng(seed)
    offset = unit64(rng.normal(size=(LAYERS, 1, 1, HEADS, WIDTH)))

    def content() -> np.ndarray:
        x = rng.normal(size=(LAYERS, EXAMPLES, LENGTH, HEADS, WIDTH))
        return unit64(x - (x * offset).sum(-1, keepdims=True) * offset)

    target = content()
    student = unit64(relation * target + (1 - relation) * content())
    agreement = (student * target).sum(-1)
    return OFFSET * offset + student, OFFSET * offset + target, agreement


def look(student: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """All figures per layer, by the way a run takes them."""
    s, t = float32(student, target)
    mask = jnp.ones((EXAMPLES, LENGTH), bool)
    found = align(s, t, mask)
    sampled = measure(take(s, t, mask, 200))
    means = {"cos": found["cos"].value, "cos_shuffled": found["cos_shuffled"].value}
    return {name: np.asarray(x, np.float64) for name, x in (means | sampled).items()}


def signs(figures: dict[str, np.ndarray]) -> list[str]:
    names = ("cos_shuffled", "cos_centered", "retrieval", "student_rank", "target_rank")
    means = {name: float(figures[name].mean()) for name in names}
    gap = float((figures["cos"] - figures["cos_shuffled"]).mean())
    return collapse_signs(means | {"alignment_gap": gap, "sampled_tokens": 200})


@pytest.mark.parametrize("seed", range(4))
def test_the_trap_a_shared_offset_scores_high_and_means_nothing(seed: int) -> None:
    student, target, agreement = with_shared_offset(seed, relation=0.0)
    found = look(student, target)
    # The raw cosine is excellent, and just what the closed form says of unrelated keys.
    share = OFFSET**2 / (1 + OFFSET**2)
    assert (found["cos"] >= 0.9).all()
    chance = 5 / np.sqrt(WIDTH * EXAMPLES * LENGTH * HEADS) / (1 + OFFSET**2)
    np.testing.assert_allclose(found["cos"], share, atol=chance)
    exact = share + agreement.mean((1, 2, 3)) / (1 + OFFSET**2)
    np.testing.assert_allclose(found["cos"], exact, atol=CLOSE)
    # Everything else says that there is nothing.
    np.testing.assert_allclose(found["cos"] - found["cos_shuffled"], 0, atol=2 * chance)
    assert (np.abs(found["cos_centered"]) < 0.05).all()
    assert (found["retrieval"] <= 4 / 200).all()
    assert (found["retrieval_centered"] <= 4 / 200).all()
    assert (np.abs(found["cka"]) < 0.05).all()
    assert (found["cos_constant"] > found["cos"]).all()  # a constant would do better
    assert verdict(found["cos"].mean()) == "Good"
    for cos, shuffled in zip(found["cos"], found["cos_shuffled"], strict=True):
        assert verdict(float(cos), float(shuffled)) == "collapsed"
    assert [sentence.split(" is ")[0] for sentence in signs(found)] == [
        f"The gap over a shuffled cosine of {found['cos_shuffled'].mean():.3g}",
        "The centred cosine",
        "The share of tokens retrieved",
    ]


@pytest.mark.parametrize("seed", range(4))
def test_the_same_offset_on_keys_that_agree_is_healthy(seed: int) -> None:
    found = look(*with_shared_offset(seed, relation=0.8)[:2])
    assert (found["cos"] > 0.99).all()
    assert (found["cos_centered"] > 0.9).all()
    assert (found["retrieval"] == 1).all()
    assert (found["retrieval_centered"] == 1).all()
    assert (found["cka"] > 0.9).all()
    for cos, shuffled in zip(found["cos"], found["cos_shuffled"], strict=True):
        assert verdict(float(cos), float(shuffled)) == "Excellent"
    assert signs(found) == []


def test_a_student_that_shrinks_to_a_line_shows_in_its_rank() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(2, 64, 2, 32))
    line = rng.normal(size=(2, 64, 1, 1)) * rng.normal(size=(2, 1, 2, 32))
    found = measure(sample_of(line, target))
    np.testing.assert_allclose(found["student_rank"], 1.0, rtol=CLOSE)
    assert (found["target_rank"] > 20).all()
    ranks = {side: float(found[side][0]) for side in ("student_rank", "target_rank")}
    (sign,) = collapse_signs(ranks)
    assert "effective rank" in sign


# --- one device or eight ---


def test_eight_devices_see_what_one_sees() -> None:
    shape = (LAYERS, EXAMPLES, LENGTH, HEADS, WIDTH)
    target, noise = np.random.default_rng(0).normal(size=(2, *shape))
    student = target + noise
    mask = np.arange(LENGTH)[None, :] < np.array([32, 27, 0, 32, 32, 31, 32, 29])[:, None]
    keep = mask[None, :, :, None, None]
    arrays = [*float32(*(np.where(keep, x, np.nan) for x in (student, target))), jnp.asarray(mask)]

    def everything(s, t, mask_BT):
        sample = sample_tokens(s, t, mask_BT, 200)
        return alignment(s, t, mask_BT), sample, diagnose(sample)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    specs = (PartitionSpec(None, "data"), PartitionSpec(None, "data"), PartitionSpec("data"))
    spread = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    assert len(spread[0].sharding.device_set) == 8
    eight = jax.jit(everything)(*spread)
    sample = take(*arrays, 200)
    one = align(*arrays), sample, measure(sample)
    jax.tree.map(np.testing.assert_array_equal, eight[1], sample)
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOL["rearranged"], atol=TOL["rearranged"])
