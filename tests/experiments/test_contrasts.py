"""The comparison of a grid's arms, against figures worked out by hand or by scipy."""

import json

import numpy as np
import pytest
import scipy.stats

from kava_jax.errors import KavaError
from kava_jax.experiments.contrasts import COSINE, compare, figure_points
from kava_jax.experiments.results import pack, read_results
from kava_jax.experiments.statistics import estimate
from tests.experiments.made_up import change_run, outcome, write_made_up, write_results

QUESTIONS = 64


def right(share, seed=0):
    """A share of 64 questions, answered rightly at drawn places."""
    bits = np.arange(QUESTIONS) < round(share * QUESTIONS)
    return np.random.default_rng(seed).permutation(bits)


def answered(seed, bits, **more):
    return outcome(seed, correct={"held_out": pack(bits.tolist())}, **more)


def losing(seed, loss, **more):
    values = {"eval_loss": loss} | more.pop("values", {})
    return outcome(seed, values=values, **more)


def compared(tmp_path, runs, **grid):
    return compare(read_results(write_results(tmp_path / "grid", runs, **grid)))


def test_scores_and_differences_are_those_of_the_bits(tmp_path):
    shares = {"ce": (0.25, 0.375, 0.5), "kv": (0.5, 0.625, 0.625), "kl": (0.25, 0.25, 0.75)}
    bits = {arm: [right(share, s) for s, share in enumerate(own)] for arm, own in shares.items()}
    runs = {arm: [answered(s, b) for s, b in enumerate(own)] for arm, own in bits.items()}
    found = compared(tmp_path, runs, contrast="kv")
    assert {arm: own.score.mean for arm, own in found.arms.items()} == pytest.approx(
        {"ce": 0.375, "kv": 1.75 / 3, "kl": 1.25 / 3}
    )
    assert found.arms["kv"].score.per_seed == {0: 0.5, 1: 0.625, 2: 0.625}
    low, high = found.arms["kv"].score.interval
    assert 0.4 < low < 0.55 < 0.6 < high < 0.75
    assert found.arms["ce"].difference is None
    difference = found.arms["kv"].difference
    assert difference.mean == pytest.approx((0.25 + 0.25 + 0.125) / 3)
    assert difference.per_seed == pytest.approx({0: 0.25, 1: 0.25, 2: 0.125})
    pairs = enumerate(zip(bits["kv"], bits["ce"], strict=True))
    assert difference == estimate({s: kv.astype(int) - ce for s, (kv, ce) in pairs})
    theirs = scipy.stats.ttest_1samp([0.25, 0.25, 0.125], 0).confidence_interval(0.95)
    assert difference.student == pytest.approx((theirs.low, theirs.high))
    assert found.declared == difference


def test_the_declared_contrast_is_left_out_of_holms_correction(tmp_path):
    """With 4 seeds an arm that is ahead in all of them has p = 2 / 16, in three of them more."""
    baseline = [0.5, 0.5, 0.5, 0.5]
    ahead = [0.75, 0.625, 0.75, 0.625]
    mixed = [0.75, 0.625, 0.75, 0.375]
    arms = {"ce": baseline, "kv": ahead, "a": ahead, "b": mixed}
    runs = {
        arm: [answered(s, right(share, s)) for s, share in enumerate(own)]
        for arm, own in arms.items()
    }
    seeds = (0, 1, 2, 3)
    found = compared(tmp_path, runs, seeds=seeds, contrast="kv").arms
    raw = {arm: found[arm].difference.p_value for arm in ("kv", "a", "b")}
    # Of the 16 sign flips of (1/4, 1/8, 1/4, 1/8) six have a sum of 1/2 or more in size.
    assert raw == pytest.approx({"kv": 2 / 16, "a": 2 / 16, "b": 6 / 16})
    assert found["kv"].difference.p_holm is None
    assert found["a"].difference.p_holm == pytest.approx(2 * 2 / 16)
    assert found["b"].difference.p_holm == pytest.approx(6 / 16)
    # A further comparison is one more test: b minus a is (0, 0, 0, -1/4), half of all flips.
    further = compared(tmp_path, runs, seeds=seeds, contrast="kv", against={"b": "a"})
    assert further.further["b", "a"].mean == pytest.approx(-1 / 16)
    assert further.further["b", "a"].p_value == 1
    assert further.further["b", "a"].p_holm == 1
    assert further.arms["a"].difference.p_holm == pytest.approx(3 * 2 / 16)
    assert further.arms["kv"].difference.p_holm is None
    undeclared = compared(tmp_path, runs, seeds=seeds)
    assert undeclared.declared is None
    assert undeclared.further == {}
    assert undeclared.arms["a"].difference.p_holm == pytest.approx(3 * 2 / 16)


def test_only_seeds_that_both_have_are_compared(tmp_path):
    runs = {
        "ce": [answered(s, right(0.5, s)) for s in (0, 2)],
        "kv": [answered(s, right(0.75, s)) for s in (0, 1, 2)],
        "one": [answered(s, right(0.25, s)) for s in (1, 2)],
        "none": [answered(1, right(0.25))],
        "empty": [],
    }
    found = compared(tmp_path, runs)
    assert list(found.arms) == ["ce", "kv", "one", "none"]
    assert set(found.arms["kv"].difference.per_seed) == {0, 2}
    one = found.arms["one"].difference
    assert one == ({2: -0.25}, None, None, None, QUESTIONS, None)
    assert found.arms["none"].difference is None
    assert found.arms["none"].score == ({1: 0.25}, None, None, None, QUESTIONS, None)


def test_seeds_that_the_grid_no_longer_has_do_not_count(tmp_path):
    runs = {"ce": [answered(s, right(0.5, s)) for s in (0, 1, 7)]}
    found = compared(tmp_path, runs, seeds=(0, 1))
    assert set(found.arms["ce"].score.per_seed) == {0, 1}


def test_losses_have_students_interval_and_diverged_runs_are_named(tmp_path):
    losses = {"ce": (1.0, 1.25, 1.5), "kv": (0.75, 1.125, None)}
    runs = {arm: [losing(s, loss) for s, loss in enumerate(own)] for arm, own in losses.items()}
    found = compared(tmp_path, runs, score="eval_loss").arms
    theirs = scipy.stats.ttest_1samp(losses["ce"], 0).confidence_interval(0.95)
    assert found["ce"].score.mean == pytest.approx(1.25)
    assert found["ce"].score.interval == pytest.approx((theirs.low, theirs.high))
    assert set(found["kv"].score.per_seed) == {0, 1}
    assert found["kv"].score.mean == pytest.approx(0.9375)
    difference = found["kv"].difference
    assert difference.per_seed == pytest.approx({0: -0.25, 1: -0.125})
    assert difference.questions is None
    assert difference.interval == difference.student


def test_other_figures_are_means_over_seeds(tmp_path):
    def run(seed, cosine, seconds, spread, old, loss=1.0):
        values = {"eval_loss": loss, "eval_cos_sim": cosine, "eval_alignment_gap": None}
        values |= {"old/exact_match_strict": float(old.mean()), "old/eval_loss": 2.0 + seed}
        values |= {"old/exact_match_rows": 64.0, "eval_big/cos_sim": 0.5}
        kept = {"held_out": pack(right(0.5).tolist()), "old": pack(old.tolist())}
        norm = {"median": 1.0, "log_std": spread, "intervals": 9}
        times = {"step_seconds": seconds, "gradient_norm": norm}
        return outcome(seed, values=values, correct=kept, **times)

    runs = {
        "ce": [run(s, None, 0.25, 0.5, right(0.25, s)) for s in (0, 1, 2)],
        "kv": [
            run(0, 0.5, 0.5, 0.125, right(0.5)),
            run(1, 0.75, 0.375, 0.25, right(0.375, 1), None),
            run(2, None, 9.0, 0.375, right(0.25, 2), 2.0),
        ],
    }
    found = compared(tmp_path, runs).arms["kv"]
    assert found.cosine == pytest.approx(0.625)
    assert found.gap is None
    assert found.loss == pytest.approx(1.5)
    assert found.relative_time == pytest.approx(0.5 / 0.25)  # medians
    assert found.gradient_spread == pytest.approx(0.25)
    assert found.sets == pytest.approx({"old/exact_match_strict": 0.375, "old/eval_loss": 3.0})
    kept = found.set_differences["old"]
    assert kept.per_seed == pytest.approx({0: 0.25, 1: 0.125, 2: 0.0})
    assert kept.p_holm is None


def test_steps_to_reach_what_the_baseline_ended_with(tmp_path):
    def run(seed, losses):
        curve = [{"step": 100 * at, "eval_loss": loss} for at, loss in enumerate(losses)]
        return losing(seed, losses[-1], curve=curve)

    runs = {
        "ce": [run(0, (4.0, 3.0, 2.0)), run(1, (4.0, 2.0, 1.0))],
        # 2.0 lies a third of the way from 2.5 to 1.0; 1.0 is reached at step 100.
        "both": [run(0, (4.0, 2.5, 1.0)), run(1, (4.0, 1.0, 0.5))],
        "half": [run(0, (4.0, 2.5, 1.0)), run(1, (4.0, 2.0, 1.5))],
        "short": [run(0, (1.0,))],
    }
    found = compared(tmp_path, runs, seeds=(0, 1), score="eval_loss").arms
    assert found["both"].reached == pytest.approx([100 + 100 / 3, 100])
    assert found["half"].reached == [pytest.approx(100 + 100 / 3), None]
    assert found["short"].reached == []
    assert found["ce"].reached == []


def test_cosine_and_gap_are_ranked_with_the_score_over_all_runs(tmp_path):
    rng = np.random.default_rng(0)
    runs, cosines, gaps, scores = {"ce": [losing(s, 3.0) for s in range(3)]}, [], [], []
    for arm in ("a", "b", "c"):
        runs[arm] = []
        for seed in range(3):
            cosine, gap, loss = rng.random(3).tolist()
            values = {"eval_cos_sim": cosine, "eval_alignment_gap": gap}
            runs[arm].append(losing(seed, loss, values=values))
            cosines, gaps, scores = [*cosines, cosine], [*gaps, gap], [*scores, loss]
    results = read_results(write_results(tmp_path / "grid", runs, score="eval_loss"))
    found, points = compare(results), figure_points(results, COSINE)
    assert len(points) == found.cosine.n == 9
    assert points[4] == (1, cosines[4], scores[4])
    theirs = [scipy.stats.spearmanr(figure, scores).statistic for figure in (cosines, gaps)]
    assert [found.cosine.rho, found.gap.rho] == pytest.approx(theirs)
    alone = compared(tmp_path / "alone", {"ce": runs["ce"]}, score="eval_loss")
    assert alone.cosine == (None, None, None, 0)
    # Without a KV loss there is no alignment, whatever was logged.
    fields = {arm: {"loss.kv_weight": 0} for arm in "ab"}
    less = compared(tmp_path / "less", runs, score="eval_loss", fields=fields)
    assert less.cosine.n == 3


def test_a_grid_without_its_baseline_shows_what_is_there(tmp_path):
    found = compared(tmp_path, {"ce": [], "kv": [answered(0, right(0.5))]})
    assert list(found.arms) == ["kv"]
    assert found.arms["kv"].difference is None
    assert found.arms["kv"].score.mean == 0.5


def test_the_same_figures_from_a_whole_made_up_grid(tmp_path):
    """The bits and the exact match that a run reports say the same."""
    results = read_results(write_made_up(tmp_path / "grid"))
    found = compare(results)
    for arm, own in results.arms.items():
        reported = [run.values["exact_match_strict"] for run in own.values()]
        assert found.arms[arm].score.mean == pytest.approx(np.mean(reported))


def spoil_runs(directory, line):
    with (directory / "runs.jsonl").open("a") as file:
        file.write("\n" + line)


def spoil_grid(directory, **fields):
    path = directory / "grid.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"grid": content["grid"] | fields}))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda d: (d / "grid.json").unlink(), r"grid.json is missing; name a directory made by"),
        (lambda d: (d / "grid.json").write_text("{"), r"grid.json is no grid of this version"),
        (lambda d: (d / "grid.json").write_text("[]"), r"grid.json is no grid of this version"),
        (lambda d: spoil_grid(d, seeds=[]), r"is no grid of this version \(ValidationError"),
        (lambda d: spoil_runs(d, "{}"), r"runs.jsonl line 10 is no run of this version"),
        (lambda d: spoil_runs(d, '{"arm": "kv'), r"runs.jsonl line 10 is no run of this version"),
        (
            lambda d: change_run(d, "kv", 0, lambda run: run.update(more=1)),
            r"runs.jsonl line 7 is no run of this version; restore the file",
        ),
        (
            lambda d: (d / "kv.json").write_text("{}"),
            r"kv.json is no part of a grid's results, .* earlier version; `python docs/results/one",
        ),
        (
            lambda d: change_run(d, "kv", 1, lambda run: run.update(data="others")),
            r"arms.kv: seed 1 was run on other data than arms.ce; remove",
        ),
        (
            lambda d: change_run(d, "kv", 1, lambda run: run.update(correct={})),
            r"arms.kv: no answers with seeds \[1\]; set score: eval_loss",
        ),
        (
            lambda d: change_run(d, "kv", 1, lambda run: run.update(correct={"held_out": "3:e0"})),
            r"arms.kv: \[3, 64\] questions were answered, by seed",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, spoil, problem):
    directory = write_made_up(tmp_path / "grid")
    spoil(directory)
    with pytest.raises(KavaError, match=problem) as error:
        compare(read_results(directory))
    assert "\n" not in str(error.value)


def test_arms_that_answered_other_numbers_of_questions_are_refused(tmp_path):
    runs = {arm: [answered(0, right(0.5)[:size])] for arm, size in (("ce", 64), ("kv", 32))}
    with pytest.raises(KavaError, match=r"arms.kv: \[32, 64\] questions were answered"):
        compared(tmp_path, runs)
