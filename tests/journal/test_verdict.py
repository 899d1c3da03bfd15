"""Words and warnings by hand."""

import re

import pytest

from kava_jax.journal.verdict import (
    alarms,
    alignment_gap,
    collapse_signs,
    collapsed_layers,
    oscillates,
    verdict,
)


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


HEALTHY = {
    "cos_shuffled": 0.2,
    "alignment_gap": 0.6,
    "cos_centered": 0.7,
    "retrieval": 0.8,
    "sampled_tokens": 1000,
    "student_rank": 30.0,
    "target_rank": 60.0,
}


def test_a_healthy_alignment_shows_no_sign() -> None:
    assert collapse_signs(HEALTHY) == []


@pytest.mark.parametrize(
    ("changed", "start", "figures"),
    [
        ({"alignment_gap": 0.04, "cos_shuffled": 0.92}, "The gap", [0.92, 0.04, 0.05]),
        ({"alignment_gap": 0.06, "cos_shuffled": 0.3}, "The gap", [0.3, 0.06, 0.07]),
        ({"cos_centered": 0.0996}, "The centred cosine", [0.0996, 0.1]),
        ({"cos_centered": -0.3}, "The centred cosine", [-0.3, 0.1]),
        ({"retrieval": 0.003}, "The share of tokens retrieved", [0.003, 0.003, 3]),
        ({"retrieval": 0}, "The share of tokens retrieved", [0, 0.003, 3]),
        ({"student_rank": 5.9}, "The student's effective rank", [60, 5.9, 6]),
    ],
)
def test_each_sign_says_its_figure_and_what_was_expected(changed, start, figures) -> None:
    (sentence,) = collapse_signs(HEALTHY | changed)
    assert sentence.startswith(start)
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    assert [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", sentence)] == figures


@pytest.mark.parametrize(
    "changed",
    [
        {"alignment_gap": 0.05, "cos_shuffled": 0.9},
        {"alignment_gap": 0.0701, "cos_shuffled": 0.3},
        {"cos_centered": 0.1},
        {"retrieval": 0.0031},
        {"student_rank": 6.0},
        {"target_rank": 0.0, "student_rank": 0.0},
    ],
)
def test_at_the_threshold_there_is_no_sign(changed) -> None:
    assert collapse_signs(HEALTHY | changed) == []


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_is_missing_is_skipped(missing: float | None) -> None:
    worst = {"cos_centered": 0.0, "retrieval": 0.0, "student_rank": 1.0}
    assert len(collapse_signs(HEALTHY | worst | {"alignment_gap": 0.0})) == 4
    nothing = dict.fromkeys(worst, missing)
    assert collapse_signs(HEALTHY | nothing | {"alignment_gap": missing}) == []
    assert collapse_signs(HEALTHY | {"alignment_gap": 0.0, "cos_shuffled": missing}) == []
    assert collapse_signs(HEALTHY | {"retrieval": 0.0, "sampled_tokens": None}) == []
    assert collapse_signs({"cos_shuffled": 0.2, "alignment_gap": 0.6}) == []


def test_retrieval_among_three_tokens_says_nothing() -> None:
    assert collapse_signs(HEALTHY | {"retrieval": 1.0, "sampled_tokens": 3}) == []
    assert collapse_signs(HEALTHY | {"retrieval": 1.0, "sampled_tokens": 4}) == []
    assert len(collapse_signs(HEALTHY | {"retrieval": 0.75, "sampled_tokens": 4})) == 1


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
    assert words is None or "beta" in found[0]
    # Where the loss cannot have a magnitude term, no remedy speaks of its weight.
    without = alarms(mag_ratio=mag_ratio, mag_loss=None)
    assert len(without) == len(found)
    assert not any("beta" in alarm for alarm in without)


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


def test_every_layer_is_judged_by_itself_keys_and_values_apart() -> None:
    layers = {
        "a/cos_sim_k": [0.99, 0.5, None, 0.3],
        "a/cos_shuffled_k": [0.98, 0.1, 0.1, None],
        "a/cos_sim_v": [0.9, 0.9, 0.9, 0.9],
        "a/cos_shuffled_v": [0.1, 0.1, 0.1, 0.1],
        "b/cos_sim_v": [0.10, 0.2],
        "b/cos_shuffled_v": [0.06, -0.2],
        "b/cka_v": [0.0, 0.0],
        "c/cos_sim_o": [0.5, 0.99],
        "c/cos_shuffled_o": [0.1, 0.98],
    }
    assert collapsed_layers(layers) == {"a keys": [0], "b values": [0], "c outputs": [1]}
    assert collapsed_layers({}) == {}
    assert collapsed_layers({"a/cos_sim_k": [0.99]}) == {}  # no baseline, no verdict
