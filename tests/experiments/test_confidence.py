"""Length and confidence: planted relations, scipy and slow loops as oracles, and a real forward."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from kava_jax.config_file import parse_config
from kava_jax.data.batches import collate
from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError
from kava_jax.experiments.confidence import (
    Sample,
    entropy_and_surprisal,
    length_and_confidence,
    take_sample,
)
from kava_jax.experiments.statistics import rank_correlation
from kava_jax.runs.prepare import prepare
from kava_jax.training.comparison import read
from tests.tiny import write_model
from tests.tolerances import TOL

NEAR = TOL["float32"]


def sample_of(entropy_n, length_n, *, row=None, position=None, token=None, seed=0):
    """One layer and head whose keys have these lengths and random directions."""
    n = len(entropy_n)
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal((n, 1, 1, 4))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    row = np.arange(n) * 10 // n if row is None else row
    position = rng.integers(100, size=n) if position is None else position
    token = rng.integers(7, size=n) if token is None else token
    vectors = {"k": np.asarray(length_n)[:, None, None, None] * direction}
    return Sample(row, position, token, np.asarray(entropy_n), np.full(n, np.nan), vectors)


def head_of(sample, **settings):
    """The only head, every position kept unless told."""
    settings = {"skip": 0, "draws": 100} | settings
    return length_and_confidence(sample, "entropy", **settings).heads[0]


def ranks(x):
    return scipy.stats.rankdata(x, axis=0)


def residual_rho(x, y, controls):
    """Partial rank correlation by one least-squares regression on everything at once."""
    design = np.column_stack([np.ones(len(x)), *controls])
    both = np.column_stack([ranks(x), ranks(y)])
    left = both - design @ np.linalg.lstsq(design, both, rcond=None)[0]
    return np.corrcoef(left.T)[0, 1]


def test_a_monotone_relation_is_one_whatever_is_controlled_for():
    entropy = np.random.default_rng(1).exponential(size=400)
    for sign in (1, -1):
        head = head_of(sample_of(entropy, np.exp(sign * entropy) + 1))
        assert head.plain == pytest.approx((sign, sign, sign), abs=NEAR)
        assert sign * head.at_position.rho == pytest.approx(1, abs=NEAR)
        assert sign * head.same_token.rho == pytest.approx(1, abs=NEAR)


def test_independent_lengths_are_about_nothing():
    rng = np.random.default_rng(2)
    head = head_of(sample_of(rng.exponential(size=3000), rng.uniform(1, 2, 3000)))
    for found in (head.plain, head.at_position, head.same_token):
        assert abs(found.rho) < 4 / np.sqrt(3000)
        assert found.low < 0 < found.high
    for read_out in (head.direction, head.direction_and_length):
        assert abs(read_out) < 4 / np.sqrt(1500)


def test_a_position_effect_does_not_pose_as_confidence():
    rng = np.random.default_rng(3)
    position = rng.integers(200, size=4000)
    entropy, length = (position + 30 * rng.standard_normal(4000) + 300 for _ in range(2))
    head = head_of(sample_of(entropy, length, position=position))
    assert head.plain.rho > 0.6
    assert head.with_position == pytest.approx(scipy.stats.spearmanr(length, position)[0], abs=NEAR)
    assert abs(head.at_position.rho) < 0.07
    assert abs(head.same_token.rho) < 0.07


def test_a_token_effect_does_not_pose_as_confidence():
    rng = np.random.default_rng(4)
    token = rng.choice(5, p=[0.4, 0.3, 0.15, 0.1, 0.05], size=4000)
    entropy, length = (token + 0.3 * rng.standard_normal(4000) + 9 for _ in range(2))
    head = head_of(sample_of(entropy, length, token=token))
    assert head.plain.rho > 0.7
    assert head.at_position.rho > 0.7
    assert abs(head.same_token.rho) < 0.07
    often = np.bincount(token)[token]
    expected = scipy.stats.spearmanr(length, np.log(often))[0]
    assert head.with_frequency == pytest.approx(expected, abs=NEAR)


def test_a_length_that_the_token_decides_says_nothing_for_the_same_token():
    """As at layer 0; that rounding makes the lengths of one token differ changes nothing."""
    rng = np.random.default_rng(5)
    token = rng.integers(6, size=500)
    length = (1 + token) * (1 + 1e-8 * rng.standard_normal(500))
    head = head_of(sample_of(token + rng.standard_normal(500) + 9, length, token=token))
    assert head.plain.rho > 0.5
    assert head.same_token == (None, None, None)


def test_every_rho_is_that_of_one_regression_in_float64():
    rng = np.random.default_rng(6)
    position, token = rng.integers(20, size=(2, 300)) // np.array([[1], [4]])
    entropy = np.round(rng.exponential(size=300) + 0.03 * position, 1)  # rounded: many ties
    length = np.round(2 + entropy + token + rng.exponential(size=300), 1)
    head = head_of(sample_of(entropy, length, position=position, token=token))
    expected = scipy.stats.spearmanr(length, entropy)[0]
    assert head.plain.rho == pytest.approx(expected, abs=NEAR)
    controls = [ranks(position)]
    expected = residual_rho(length, entropy, controls)
    assert head.at_position.rho == pytest.approx(expected, abs=NEAR)
    controls += list(np.eye(token.max() + 1)[token].T[1:])
    expected = residual_rho(length, entropy, controls)
    assert head.same_token.rho == pytest.approx(expected, abs=NEAR)


def test_the_interval_is_that_of_drawing_whole_texts_slowly():
    rng = np.random.default_rng(7)
    row = np.repeat(np.arange(6), [5, 9, 7, 12, 8, 10])
    position = np.concatenate([np.arange(count) for count in np.bincount(row)])
    entropy = np.round(rng.exponential(size=len(row)) + row, 1)
    length = np.round(9 + entropy + 2 * rng.standard_normal(len(row)), 1)
    head = head_of(sample_of(entropy, length, row=row, position=position), seed=3)
    slow, picks = [], np.random.default_rng(3)
    for _ in range(100):
        own = np.concatenate([np.flatnonzero(row == r) for r in picks.integers(6, size=6)])
        plain = scipy.stats.spearmanr(length[own], entropy[own])[0]
        slow.append((plain, residual_rho(length[own], entropy[own], [ranks(position[own])])))
    low, high = np.quantile(slow, [0.025, 0.975], axis=0)
    assert head.plain[1:] == pytest.approx((low[0], high[0]), abs=NEAR)
    assert head.at_position[1:] == pytest.approx((low[1], high[1]), abs=NEAR)


def test_texts_that_differ_widen_the_interval():
    rng = np.random.default_rng(8)
    row = np.repeat(np.arange(12), 50)
    entropy, length = (
        20 + 3 * rng.standard_normal(12)[row] + rng.standard_normal(600) for _ in "ab"
    )
    found = head_of(sample_of(entropy, length, row=row)).plain
    alone = rank_correlation(length, entropy)  # takes the tokens for independent
    assert found.high - found.low > 2 * (alone.high - alone.low)


def test_what_the_direction_says_is_read_on_other_texts():
    rng = np.random.default_rng(9)
    sample = sample_of(np.ones(2000), rng.uniform(1, 2, 2000))
    vector = sample.vectors["k"][:, 0, 0]
    length = np.linalg.norm(vector, axis=-1)
    direction = vector / length[:, None]
    of_direction = head_of(sample._replace(entropy=9 + direction[:, 2]))
    assert of_direction.direction > 0.99
    each = [abs(scipy.stats.spearmanr(x, direction[:, 2])[0]) for x in direction.T]
    assert of_direction.coordinate == pytest.approx(np.median(each), abs=NEAR)
    turned = np.where(sample.row % 2, -1, 1) * direction[:, 2]  # what even texts teach misleads
    assert head_of(sample._replace(entropy=9 + turned)).direction < -0.99
    of_length = head_of(sample._replace(entropy=length))
    assert abs(of_length.direction) < 0.13  # four standard errors, 1000 tokens
    assert of_length.direction_and_length > 0.99


def test_first_tokens_are_left_out_and_too_few_texts_refused():
    rng = np.random.default_rng(10)
    position = np.tile(np.arange(20), 20)
    sink = position < 4
    entropy, length = (np.where(sink, 50, 1) + rng.exponential(size=400) for _ in range(2))
    sample = sample_of(entropy, length, row=np.repeat(np.arange(20), 20), position=position)
    with_sinks = length_and_confidence(sample, "entropy", skip=0, draws=100)
    without = length_and_confidence(sample, "entropy", skip=4, draws=100)
    assert (with_sinks.tokens, without.tokens, without.rows) == (400, 320, 20)
    assert with_sinks.heads[0].plain.rho > 0.3
    expected = scipy.stats.spearmanr(entropy[~sink], length[~sink])[0]
    assert without.heads[0].plain.rho == pytest.approx(expected, abs=NEAR)
    with pytest.raises(KavaError, match="skip=20 leaves 0 tokens of 0 texts"):
        length_and_confidence(sample, "entropy", skip=20)
    with pytest.raises(KavaError, match="1 texts, too few"):
        length_and_confidence(sample._replace(row=0 * position), "entropy")


@pytest.mark.parametrize("scale", [1, 30])
def test_entropy_and_surprisal_are_scipys_however_small(scale):
    rng = np.random.default_rng(11)
    logits = (scale * rng.standard_normal((2, 6, 11))).astype(np.float32)
    tokens = rng.integers(11, size=(2, 6)).astype(np.int32)
    entropy, surprisal = entropy_and_surprisal(jnp.array(logits), jnp.array(tokens))
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(entropy, scipy.stats.entropy(np.exp(log_p), axis=-1), rtol=NEAR)
    told = np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(surprisal[:, 1:], -told, rtol=NEAR)


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """A random Qwen2 with biases, its graph and parameters, and rows of several lengths."""
    directory = write_model(tmp_path_factory.mktemp("model") / "qwen2", seed=3)
    run = prepare(parse_config({"student": {"path": str(directory)}, "data": {"path": "no.jsonl"}}))
    rng = np.random.default_rng(12)
    rows = [Encoded(rng.integers(512, size=n).astype(np.int32), p, False) for n, p in LENGTHS]
    # five times the weights: entropies that differ by more than rounding
    params = jax.tree.map(lambda x: 5 * x, run.blueprint.load_student())
    return run.blueprint.student.graph, params, rows


LENGTHS = ((9, 3), (12, 0), (5, 2), (9, 4))  # of rows and of their prompts


def test_a_sample_holds_every_real_token_with_what_the_model_did_there(looked):
    graph, params, rows = looked
    batches = [collate(rows[:2], 12, 1, 4), collate(rows[2:], 12, 1, 4)]
    sample = take_sample(graph, params, batches)
    assert sample.row.tolist() == np.repeat(np.arange(4), [n for n, _ in LENGTHS]).tolist()
    look = jax.jit(lambda params, batch: _whole(graph, params, batch))
    for number, row in enumerate(rows):
        own = sample.row == number
        n, prompt = LENGTHS[number]
        assert sample.token[own].tolist() == row.ids.tolist()
        assert sample.position[own].tolist() == list(range(n))
        # alone, without padding, and by scipy in float64
        logits, cache, bias, turned = look(params, collate([row], n, 1, 4))
        log_p = scipy.special.log_softmax(np.asarray(logits[0], np.float64), axis=-1)
        trained = max(prompt, 1)  # a row's first target
        expected = np.full(n, np.nan)
        expected[trained:] = -log_p[np.arange(trained, n) - 1, row.ids[trained:]]
        np.testing.assert_allclose(sample.surprisal[own], expected, rtol=NEAR)
        expected = np.full(n, np.nan)
        expected[trained - 1 : n - 1] = scipy.stats.entropy(np.exp(log_p), axis=-1)[
            trained - 1 : n - 1
        ]
        np.testing.assert_allclose(sample.entropy[own], expected, rtol=NEAR)
        keys = np.asarray(cache.k[:, 0]).swapaxes(0, 1)
        near = {"rtol": NEAR, "atol": NEAR}
        np.testing.assert_allclose(sample.vectors["k"][own], keys, **near)
        np.testing.assert_allclose(
            sample.vectors["k_without_bias"][own], keys - np.asarray(bias)[None], **near
        )
        np.testing.assert_allclose(
            sample.vectors["v"][own], np.asarray(cache.v[:, 0]).swapaxes(0, 1), **near
        )
        # RoPE turns keys and leaves their lengths: it does not matter which are measured
        turned = np.asarray(turned[:, 0]).swapaxes(0, 1)
        assert np.abs(turned[1:] - keys[1:]).max() > 0.01
        lengths = (np.linalg.norm(x, axis=-1) for x in (turned, keys))
        np.testing.assert_allclose(*lengths, rtol=NEAR)


def _whole(graph, params, batch):
    reading = read(graph, params, batch, key_space="pre_rope")
    turned = read(graph, params, batch, key_space="post_rope").cache.k
    model = reading.model
    return model.logits(reading.hidden), reading.cache, model.key_bias(), turned


def test_a_sample_of_a_model_becomes_one_result_for_every_head(looked):
    graph, params, rows = looked
    sample = take_sample(graph, params, [collate(rows, 12, 1, 4)])
    for outcome, counts in (("entropy", (15, 3)), ("surprisal", (19, 4))):
        found = length_and_confidence(sample, outcome, skip=4, draws=100)
        assert (found.tokens, found.rows) == counts  # by hand
        names = [(head.part, head.layer, head.head) for head in found.heads]
        parts = ("k", "k_without_bias", "v")
        assert names == [(p, layer, h) for p in parts for layer in (0, 1) for h in (0, 1)]
        counted = (sample.position >= 4) & ~np.isnan(getattr(sample, outcome))
        for head in found.heads:
            vectors = sample.vectors[head.part][counted, head.layer, head.head]
            expected = scipy.stats.spearmanr(
                np.linalg.norm(vectors, axis=-1), getattr(sample, outcome)[counted]
            )[0]
            assert head.plain.rho == pytest.approx(expected, abs=NEAR)
        json.dumps(found)  # plain numbers
