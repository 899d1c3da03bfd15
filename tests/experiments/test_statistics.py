"""Statistics of a grid, against enumerations, slow loops, hand-made examples and simulations."""

import itertools
import math
import operator
import runpy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from kava_jax.experiments.statistics import (
    Estimate,
    bootstrap_interval,
    estimate,
    holm,
    in_words,
    rank_correlation,
    sign_flip,
    steps_to_reach,
    student_interval,
)
from tests.tolerances import TOL

NEAR = TOL["float32"]


def answers(seed, *shape, share=0.5):
    return np.random.default_rng(seed).random(shape) < share


def all_sign_flips(differences) -> float:
    """Share of all ways to flip signs whose |sum| is at least the observed one, by enumeration."""
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(math.fsum(map(operator.mul, flip, differences))) for flip in signs]
    return sum(total >= sums[0] - 1e-12 for total in sums) / len(sums)


def slow_bootstrap(difference_SQ, draws, seed):
    """The hierarchical bootstrap as one says it: seeds, then each drawn seed's questions."""
    rng = np.random.default_rng(seed)
    seeds, questions = difference_SQ.shape
    means = []
    for _ in range(draws):
        picked = []
        for s in rng.integers(seeds, size=seeds):
            picked.extend(difference_SQ[s, q] for q in rng.integers(questions, size=questions))
        means.append(sum(picked) / len(picked))
    return np.array(means)


def all_draws(difference_SQ):
    """Mean of every draw there is, each as likely as another, in fractions and sorted."""
    seeds, questions = difference_SQ.shape
    means = []
    for picked in itertools.product(range(seeds), repeat=seeds):
        for places in itertools.product(range(questions), repeat=seeds * questions):
            rows = [difference_SQ[s] for s in picked for _ in range(questions)]
            drawn = sum(int(row[q]) for row, q in zip(rows, places, strict=True))
            means.append(Fraction(drawn, seeds * questions))
    return sorted(means)


def assert_ends_agree(interval, slow):
    """Each end lies between the slow draws' quantiles a little below and above its own.

    The share of ``n`` draws below a point has the standard error sqrt(a (1 - a) / n): four of them.
    """
    for end, a in zip(interval, (0.025, 0.975), strict=True):
        error = 4 * math.sqrt(a * (1 - a) / len(slow))
        below, above = np.quantile(slow, [max(a - error, 0), min(a + error, 1)])
        assert below <= end <= above


def difference(arm_SQ, baseline_SQ):
    """Question by question."""
    return arm_SQ.astype(int) - baseline_SQ.astype(int)


def simulated(rng, seeds, questions, spread):
    """Two arms of accuracy 0.6 and 0.4 on average over seeds, whose answers are half in common."""
    arm_S1 = 0.6 + rng.uniform(-spread, spread, (seeds, 1))
    baseline_S1 = 0.4 + rng.uniform(-spread, spread, (seeds, 1))
    hard_SQ = rng.random((seeds, questions))  # how hard each question is
    other_SQ = np.where(answers(rng, seeds, questions), hard_SQ, rng.random((seeds, questions)))
    return hard_SQ < arm_S1, other_SQ < baseline_S1


def test_a_difference_is_the_hand_count():
    arm = np.array([[1, 1, 0, 0], [1, 0, 1, 1]], bool)
    baseline = np.array([[0, 1, 1, 0], [0, 0, 0, 1]], bool)
    found = estimate(dict(zip((3, 5), difference(arm, baseline), strict=True)))
    assert found.per_seed == {3: 0.0, 5: 0.5}
    assert (found.mean, found.questions) == (0.25, 4)
    assert estimate({}) is None


@pytest.mark.parametrize("lifted", [1, 0])
def test_the_interval_is_that_of_a_slow_double_loop(lifted):
    """Of a difference, and of one arm alone."""
    arm, baseline = answers(0, 4, 9, share=0.7), answers(1, 4, 9, share=0.4)
    arm[2] = True  # one seed stands out, so that drawing seeds matters
    value_SQ = difference(arm, baseline & bool(lifted))
    found = estimate(dict(enumerate(value_SQ)))
    assert_ends_agree(found.interval, slow_bootstrap(value_SQ, 6000, seed=4))
    assert list(found.per_seed.values()) == pytest.approx(value_SQ.mean(axis=1).tolist())
    assert found.p_value == pytest.approx(all_sign_flips(list(found.per_seed.values())))


@pytest.mark.parametrize("value", [[[1, -1, 0], [1, 1, 0]], [[0, 0, 0], [0, -1, 1]]])
def test_the_interval_is_that_of_every_draw_there_is(value):
    """2 seeds and 3 questions make 2**2 * 3**6 draws, all equally likely."""
    value_SQ = np.array(value)
    means = all_draws(value_SQ)
    assert len(means) == 2916
    cut = math.ceil(len(means) * 0.025)  # so many of them lie at each end
    assert bootstrap_interval(value_SQ) == pytest.approx((means[cut - 1], means[-cut]))


def test_with_many_seeds_the_ends_are_those_of_adding_both_variances():
    """The drawn means are nearly normal, with the variance over seeds plus that over questions."""
    value_SQ = difference(*simulated(np.random.default_rng(5), 40, 300, 0.1))
    variance = np.var(value_SQ.mean(axis=1)) + np.mean(np.var(value_SQ, axis=1)) / 300
    half = 1.959964 * math.sqrt(variance / 40)
    ends = value_SQ.mean() - half, value_SQ.mean() + half
    for end, expected in zip(bootstrap_interval(value_SQ), ends, strict=True):
        assert abs(end - expected) < half / 50 + 1 / (40 * 300)  # whole answers, nearly normal


@pytest.mark.parametrize(("seeds", "questions", "spread"), [(8, 64, 0.1), (5, 100, 0.05)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(seeds, questions, spread):
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(200):
        low, high = bootstrap_interval(difference(*simulated(rng, seeds, questions, spread)))
        held += low <= 0.2 <= high
    assert 0.85 <= held / 200 <= 0.99


def test_pairing_narrows_the_interval():
    arm = answers(7, 6, 200)
    baseline = arm & answers(8, 6, 200, share=0.8)  # wrong on a fifth of what the arm gets right
    low, high = bootstrap_interval(difference(arm, baseline))
    wide_low, wide_high = bootstrap_interval(difference(arm, np.roll(baseline, 1, axis=1)))
    assert high - low < 0.8 * (wide_high - wide_low)


def test_swapping_arms_turns_the_interval_round():
    value_SQ = difference(answers(9, 9, 150), answers(10, 9, 150))
    low, high = bootstrap_interval(value_SQ)
    assert bootstrap_interval(-value_SQ) == (-high, -low)


def test_equal_arms_differ_by_nothing():
    found = estimate(dict(enumerate(np.zeros((5, 30), int))))
    assert (found.mean, *found[1:4]) == (0.0, (0.0, 0.0), (0.0, 0.0), 1.0)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8, 10])
def test_the_p_value_is_that_of_flipping_all_signs(seeds):
    differences = np.random.default_rng(seeds).normal(0.4, 1.0, seeds)
    assert sign_flip(differences) == pytest.approx(all_sign_flips(differences))
    ties = np.round(differences) / 10
    assert sign_flip(ties) == pytest.approx(all_sign_flips(ties))


def test_five_seeds_never_go_below_a_sixteenth():
    assert sign_flip(np.ones(5)) == 2 / 2**5 == 0.0625
    assert sign_flip(np.ones(3)) == 0.25


def test_beyond_sixteen_seeds_random_flips_come_close():
    differences, sums = np.random.default_rng(14).integers(-3, 6, 18), np.zeros(1, int)
    for d in differences:
        sums = np.concatenate([sums + d, sums - d])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()))
    # scipy doubles the smaller tail: twice the standard error of a share of 65536 draws, four times
    error = 4 * 2 * math.sqrt(exact / 2 / 65536)
    assert abs(sign_flip(differences.astype(float)) - exact) < error


def test_values_get_students_interval():
    arm, baseline = np.array([1.10, 1.25, 1.02]), np.array([1.30, 1.35, 1.31])
    found = estimate(dict(enumerate(arm - baseline)))
    ends = scipy.stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    assert found.mean == pytest.approx(-0.59 / 3)
    assert found.interval == found.student == pytest.approx(tuple(ends))
    assert found.per_seed == pytest.approx({0: -0.20, 1: -0.10, 2: -0.29})
    assert (found.p_value, found.questions) == (0.25, None)


def test_students_interval_by_hand_for_two_seeds():
    """Differences 1 and 3: mean 2, standard error 1, t(1) = 12.7062 at 95 %."""
    ends = 2 - 12.7062, 2 + 12.7062
    assert student_interval(np.array([1.0, 3.0])) == pytest.approx(ends, abs=1e-4)


def test_one_seed_has_no_interval():
    assert estimate({7: np.array(0.5)}) == ({7: 0.5}, None, None, None, None, None)
    assert estimate({7: np.array([1, 0])}) == ({7: 0.5}, None, None, None, 2, None)


def said(mean, interval, p, seeds, questions=None):
    found = Estimate(dict.fromkeys(range(seeds), mean), interval, interval, p, questions)
    return in_words(found, "kv", "ce")


def test_answers_in_words():
    assert said(0.5304, (0.4711, 0.5818), 2 / 2**8, 8, 1024) == (
        "kv minus ce: +53.0 points (95 % interval +47.1 to +58.2; 8 seeds x 1024 questions; "
        "p = 0.008)"
    )


def test_values_in_words():
    assert said(-0.04123, (-0.0517, 0.00306), 0.0001, 14) == (
        "kv minus ce: -0.0412 (95 % interval -0.0517 to +0.00306; 14 seeds; p < 0.001)"
    )


def test_a_difference_that_rounds_to_nothing_has_no_minus_sign():
    words = said(-0.0001, (-0.01, 0.01), 1.0, 2, 1000)
    assert "+0.0 points (95 % interval -1.0 to +1.0;" in words


def test_one_seed_in_words():
    assert said(0.25, None, None, 1, 64) == (
        "kv minus ce: +25.0 points, with one seed only; no interval"
    )


def test_holm_by_hand():
    """0.01 * 4, 0.02 * 3, 0.022 * 2 = 0.044 raised to 0.06, and 0.7 * 1."""
    found = holm({"d": 0.022, "a": 0.7, "b": 0.01, "c": 0.02})
    assert found == pytest.approx({"b": 0.04, "c": 0.06, "d": 0.06, "a": 0.7})


def test_holm_is_capped_and_leaves_one_test_alone():
    assert holm({"a": 0.6, "b": 0.4, "c": 0.5}) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert holm({"a": 0.03}) == {"a": 0.03}
    assert holm({}) == {}


def curve(steps, values):
    return list(zip(steps, values, strict=True))


def test_steps_to_a_score_by_hand():
    points = curve([0, 100, 200, 300], [0.0, 0.1, 0.5, 0.4])
    assert steps_to_reach(points, 0.2, True) == pytest.approx(125)
    assert steps_to_reach(points, 0.5, True) == 200
    assert steps_to_reach(points, 0.1, True) == 100
    assert steps_to_reach(points, 0.0, True) == 0
    assert steps_to_reach(points, 0.51, True) is None


def test_steps_to_a_loss_by_hand():
    points = curve([10, 20, 40], [3, 2, 1])
    assert steps_to_reach(points, 2.5, False) == pytest.approx(15)
    assert steps_to_reach(points, 1.25, False) == pytest.approx(35)
    assert steps_to_reach(points, 4, False) == 10
    assert steps_to_reach(points, 0.9, False) is None


def test_a_curve_that_falls_first_is_caught_where_it_comes_back():
    points = curve([0, 10, 20], [0.4, 0.0, 1.0])
    assert steps_to_reach(points, 0.5, True) == pytest.approx(15)
    assert steps_to_reach([], 0.5, True) is None


RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def within():
    """The pooled correlation of one table of the docs, which its script has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RESULTS))
        pooled = runpy.run_path(str(RESULTS / "tables.py"))["rank_correlation_within"]

    def of(x, y, names):
        named = list(zip(names, x.tolist(), y.tolist(), strict=True))
        return pooled([[pair for own, *pair in named if own == g] for g in dict.fromkeys(names)])

    return of


def ranked(x, y):
    return rank_correlation(list(map(float, x)), list(map(float, y)))


def test_ranks_by_hand():
    """Ranks 1 2.5 2.5 4 and 2 1 3 4: from 2.5, the products add to 3, the squares to 4.5 and 5."""
    found = ranked(np.array([1.0, 7.0, 7.0, 9.0]), np.array([5, 4, 6, 100]))
    assert (found.rho, found.n) == pytest.approx((3.0 / math.sqrt(4.5 * 5.0), 4))


def test_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(15)
    x = rng.integers(0, 9, 60).astype(float)  # with ties
    y = np.exp(x / 4) + rng.normal(size=60)
    found = ranked(x, y)
    rho = scipy.stats.spearmanr(x, y).statistic
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / 57)
    ends = [math.tanh(math.atanh(rho) + side) for side in (-half, half)]
    assert found[:3] == pytest.approx((rho, *ends), abs=NEAR)


@pytest.mark.parametrize(("names", "r"), [("a" * 12, 0.7), ("a" * 10 + "b" * 10, 0.0)])
def test_the_interval_of_rho_holds_the_truth(within, names, r):
    """Normal pairs of correlation r have Spearman's rho 6 / pi * asin(r / 2)."""
    rng, truth, held = np.random.default_rng(16), 6 / math.pi * math.asin(r / 2), 0
    for _ in range(300):
        x = rng.normal(size=len(names))
        y = r * x + math.sqrt(1 - r * r) * rng.normal(size=len(names))
        found = within(x, y, list(names))
        held += found.low <= truth <= found.high
    assert 0.91 <= held / 300 <= 0.99


def test_groups_far_apart_do_not_pose_as_correlation(within):
    rng = np.random.default_rng(17)
    far = np.repeat([0.0, 100.0], 50)
    x, y = far + rng.normal(size=100), far + rng.normal(size=100)
    groups = ["low"] * 50 + ["high"] * 50
    found = within(x, y, groups)
    assert ranked(x, y).rho > 0.7
    assert abs(found.rho) < 0.25
    assert found.low < 0 < found.high
    assert found.n == 100


def test_groups_pool_to_the_weighted_mean_of_their_correlations_wherever_they_lie(within):
    """Ranks / n of a group of n without ties have the sum of squares (n^2 - 1) / (12 n)."""
    rng = np.random.default_rng(18)
    x, y = rng.normal(size=24), rng.normal(size=24)
    y[::3] += 2 * x[::3]
    third, rest = np.arange(24) % 3 == 0, np.arange(24) % 3 > 0
    rhos = [scipy.stats.spearmanr(x[of], y[of]).statistic for of in (third, rest)]
    rho = np.average(rhos, weights=[63 / 8, 255 / 16])
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (24 - 1 - 3))
    ends = [math.tanh(math.atanh(rho) + side) for side in (-half, half)]
    x[third] *= 1000
    y[rest] -= 500
    found = within(x, y, ["third", "rest", "rest"] * 8)
    assert found == (*(pytest.approx(number, abs=NEAR) for number in (rho, *ends)), 24)


def test_groups_of_one_are_not_counted(within):
    x, y = np.array([1.0, 2.0, 3.0, 50.0]), np.array([1.0, 3.0, 2.0, -50.0])
    found = within(x, y, ["a", "a", "a", "b"])
    assert found == (pytest.approx(0.5), None, None, 3)
    assert within(x[:2], y[:2], ["a", "b"]) == (None, None, None, 0)


def test_a_constant_has_no_correlation():
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert ranked(x, np.full(5, 0.1)) == (None, None, None, 5)
    assert ranked(np.full(5, 0.1), x).rho is None


def test_a_perfect_order_of_few_points_claims_no_certainty():
    few = ranked(np.arange(4), np.arange(4) ** 3)
    assert few.rho == pytest.approx(1.0)
    assert few.low < 0 < few.rho <= few.high
    many = ranked(np.arange(30), -np.arange(30))
    assert many.rho == pytest.approx(-1.0)
    assert many.low <= many.rho < many.high < -0.98
    assert ranked(np.arange(3), np.arange(3))[1:3] == (None, None)
