from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from kava_jax.config.file import parse_config
from kava_jax.data.batches import BatchStream, best_lengths, collate, eval_batches
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoded, Encoder
from kava_jax.data.tokenizer import load_tokenizer
from kava_jax.errors import KavaError
from kava_jax.runs.prepare import load_dataset, prepare


def row(length, prompt_length=1, first=0, truncated=False):
    return Encoded(np.arange(first, first + length, dtype=np.int32), prompt_length, truncated)


def numbered(count, length=3):
    """Rows whose every id is the row's number, so that a batch tells which rows it holds."""
    return [Encoded(np.full(length, i, np.int32), 1, False) for i in range(count)]


def stream(rows, **options):
    return BatchStream(rows, **{"batch_size": 4, "max_length": 32, "bucket": 8, **options})


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_masks_by_hand():
    batch = collate([row(6, 3, first=10), row(2, 0, first=20)], 7, pad_id=99, sink_tokens=2)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 14, 15, 99], [20, 21, 99, 99, 99, 99, 99]]
    o, x = False, True
    assert batch.valid.tolist() == [[x, x, x, x, x, x, o], [x, x, o, o, o, o, o]]
    # The answer from place 3 on; of a document all but its first token.
    assert batch.loss_mask.tolist() == [[o, o, o, x, x, x, o], [o, x, o, o, o, o, o]]
    # The prompt counts for keys and values; the first two tokens do not.
    assert batch.kv_mask.tolist() == [[o, o, x, x, x, x, o], [o, o, o, o, o, o, o]]
    assert batch.tokens.dtype == np.int32
    assert all(mask.dtype == bool for mask in batch[1:])


def test_padding_is_told_by_mask_even_when_pad_is_eos(shared):
    tokenizer = load_tokenizer(shared / "tokenizers/gpt2")
    encoder = Encoder(tokenizer)
    rows = encoder.encode_all(load_examples(shared / "data/gsm8k/test.jsonl", rows=4))
    batch = stream(rows, max_length=512, pad_id=tokenizer.eos_token_id).batch(0)
    ends = (batch.tokens == tokenizer.eos_token_id) & batch.loss_mask
    assert ends.sum(axis=1).tolist() == [1] * 4  # each row's own eos is trained on, once
    assert (batch.loss_mask & ~batch.valid).sum() == 0


def test_every_row_once_an_epoch_across_batch_borders():
    batches = stream(numbered(10))
    seen = [int(i) for step in range(15) for i in batches.batch(step).tokens[:, 0]]
    epochs = [seen[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_fewer_rows_than_the_batch():
    batch = stream(numbered(3), batch_size=9).batch(5)
    assert Counter(batch.tokens[:, 0].tolist()) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("bucketed", [False, True])
def test_a_step_is_a_pure_function_of_seed_and_number(bucketed):
    rows = [row(3 + i % 20, first=i) for i in range(50)]
    one, other = stream(rows, bucketed=bucketed), stream(rows, bucketed=bucketed)
    forwards = [one.batch(step) for step in range(30)]
    for step in reversed(range(30)):
        assert same(other.batch(step), forwards[step])
    assert not same(stream(rows, bucketed=bucketed, seed=1).batch(0), forwards[0])


def test_known_order():
    # Another order under an old checkpoint would repeat some rows and skip others, so it is written
    # down a second time here, in Python's whole numbers: sort by splitmix64 of seed, epoch and row.
    def key(seed, epoch, place):
        z = place
        for salt in (seed, epoch):
            z = (z + salt * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
        return z

    expected = sorted(range(8), key=lambda place: key(3, 1, place))
    batch = stream(numbered(8), batch_size=8, seed=3).batch(1)
    assert batch.tokens[:, 0].tolist() == expected == [4, 2, 7, 5, 6, 3, 0, 1]


def test_shuffle_is_even():
    batches = stream(numbered(16), batch_size=16)
    first = Counter(int(batches.batch(step).tokens[0, 0]) for step in range(1600))
    assert len(first) == 16
    assert all(60 <= count <= 145 for count in first.values())  # 100 +- 4.6 standard deviations


def test_shapes_are_few():
    rows = [row(2 + i % 29) for i in range(200)]
    batches = stream(rows, batch_size=2, max_length=30)
    shapes = {batches.batch(step).tokens.shape for step in range(300)}
    assert shapes <= {(2, 8), (2, 16), (2, 24), (2, 30)}


def test_report_by_hand():
    rows = [row(6, 3), row(8, 2, truncated=True), row(8, 8, truncated=True), row(4, 0), row(1, 0)]
    batches = stream(rows, batch_size=3, max_length=8, bucket=4)
    assert batches.counts == {
        "rows": 3,
        "truncated": 1,
        "dropped": 2,
        "tokens": 18,
        "targets": 3 + 6 + 3,
        "padding": pytest.approx(1 - 18 / 24),
        "lengths": 1,
    }
    assert batches.sentence.startswith("3 rows, 1 truncated to 8 tokens, 2 dropped")
    assert batches.sentence.endswith("25% padding, 1 padded length")


# Bucketed


def uneven(count, longest=96):
    """Rows of many lengths, short ones more often, whose every id is the row's number."""
    lengths = np.random.default_rng(0).beta(2, 5, count) * (longest - 2) + 2
    return [Encoded(np.full(int(n), i, np.int32), 1, False) for i, n in enumerate(lengths)]


def bucketed(rows, **options):
    return stream(rows, **{"max_length": 96, "bucket": 4, "bucketed": True, **options})


def epoch(batches, number, rows):
    """The epoch's rows in the order in which they come."""
    size = batches.batch_size
    first, last = number * rows, (number + 1) * rows
    steps = range(first // size, -(-last // size))
    places = np.concatenate([batches.row_indices(step) for step in steps])
    return places[first - steps[0] * size :][:rows].tolist()


@pytest.mark.parametrize(
    ("count", "size"), [(100, 7), (96, 8), (31, 32), (5, 32), (1, 4), (33, 32)]
)
def test_bucketed_every_row_comes_once_an_epoch(count, size):
    batches = bucketed(uneven(count), batch_size=size)
    epochs = [epoch(batches, number, count) for number in range(5)]
    assert all(sorted(found) == list(range(count)) for found in epochs)
    assert {len(batches.row_indices(step)) for step in range(40)} == {size}
    if count > 5:
        assert len(set(map(tuple, epochs))) == 5
        other = bucketed(uneven(count), batch_size=size, seed=1)
        assert epoch(other, 0, count) != epochs[0]


def test_bucketed_rows_meet_rows_of_their_own_length_but_where_two_buckets_meet():
    rows = uneven(1000)
    lengths = np.array([len(r.ids) for r in rows])
    batches = bucketed(rows, batch_size=16)
    sizes = sorted({batches.batch(step).tokens.shape[1] for step in range(63)})
    assert len(sizes) == 8
    assert all(size % 4 == 0 for size in sizes)
    own = np.array([min(size for size in sizes if size >= n) for n in lengths])
    mixed = 0
    for step in range(250):  # four epochs
        chosen = batches.row_indices(step)
        assert batches.batch(step).tokens.shape == (16, own[chosen].max())
        mixed += len(set(own[chosen])) > 1
    assert mixed <= 4 * 7
    shared = [batches.row_indices(step) for step in (62, 187)]  # an epoch is 62.5 steps
    assert all(own[chosen].max() == sizes[0] for chosen in shared)


def test_bucketed_rows_of_a_bucket_come_anywhere_in_an_epoch_with_any_others():
    rows = [row(4 if i < 16 else 8, first=i) for i in range(32)]
    batches = bucketed(rows, batch_size=4, max_length=8)
    places, companions = np.zeros((32, 8)), np.zeros((32, 32))
    for step in range(8, 8 * 801):  # not the first epoch, which begins with one of each length
        chosen = batches.row_indices(step)
        places[chosen, step % 8] += 1
        companions[np.ix_(chosen, chosen)] += 1
    # Of 800: 100 in each place, 160 with each other row of the bucket; 5 standard deviations.
    assert (abs(places - 100) < 47).all()
    within = companions[:16, :16][~np.eye(16, dtype=bool)]
    assert (abs(within - 160) < 57).all()
    assert not companions[:16, 16:].any()


def test_bucketed_first_batches_are_one_of_each_length_longest_first():
    batches = bucketed(uneven(1000), batch_size=16)
    sizes = [batches.batch(step).tokens.shape[1] for step in range(200)]
    assert sizes[:8] == sorted(set(sizes), reverse=True)
    assert sizes[8:62] != sorted(sizes[8:62])
    later = [batches.batch(step).tokens.shape[1] for step in range(63, 71)]
    assert later != sizes[:8]


def test_lengths_are_those_of_the_batches_asked_for():
    batches = bucketed(uneven(1000), batch_size=16)
    of_batches = [batches.batch(step).tokens.shape[1] for step in range(200)]
    assert batches.lengths(0, 200) == tuple(sorted(set(of_batches)))
    for first in (0, 7, 100):
        assert batches.lengths(first, first + 3) == tuple(sorted(set(of_batches[first:][:3])))
    assert batches.lengths(5, 5) == ()


def test_bucketed_padding_is_what_the_batches_hold():
    rows = uneven(1000)
    by_length, at_random = bucketed(rows, batch_size=16), stream(rows, batch_size=16, max_length=96)
    for batches in (by_length, at_random):
        valid = [batches.batch(step).valid for step in range(63)]
        positions = sum(v.size for v in valid)
        padding = np.float64(sum((~v).sum() for v in valid)) / positions
        assert batches.counts["padding"] == pytest.approx(padding)
        assert batches.counts["lengths"] == len({v.shape[1] for v in valid})
    assert by_length.counts["padding"] < 0.4 * at_random.counts["padding"]
    assert by_length.sentence.endswith("padded lengths")


@pytest.mark.parametrize("most", [1, 2, 3, 4, 20])
def test_best_lengths_against_every_choice(most):
    random = np.random.default_rng(most)
    for _ in range(20):
        lengths = random.integers(1, 40, size=random.integers(1, 30))
        allowed = np.unique(-(-lengths // 4) * 4)
        choices = [
            (*shorter, allowed[-1])
            for count in range(min(most, len(allowed)))
            for shorter in combinations(allowed[:-1], count)
        ]
        fewest = min(sum(min(t for t in kept if t >= n) for n in lengths) for kept in choices)
        kept = best_lengths(lengths, allowed, most)
        assert len(kept) <= most
        assert set(kept) <= set(allowed)
        assert sum(min(t for t in kept if t >= n) for n in lengths) == fewest


def test_gsm8k_has_at_most_a_tenth_padding_in_at_most_eight_shapes(shared):
    encoder = Encoder(load_tokenizer(shared / "tokenizers/qwen2"), max_length=512)
    rows = encoder.encode_all(load_examples(shared / "data/gsm8k/train.jsonl"))
    batches = bucketed(rows, batch_size=32, max_length=512, bucket=8)
    valid = [batches.batch(step).valid for step in range(700)]
    assert 1 - sum(v.sum() for v in valid) / sum(v.size for v in valid) <= 0.10
    shapes = [v.shape for v in valid]
    assert len(set(shapes)) <= 8
    assert set(shapes) == set(shapes[:8])
    assert batches.counts["padding"] <= 0.10


def test_the_config_says_how_rows_are_put_together():
    reports = {}
    for batching in ("shuffled", "bucketed"):
        data = {"path": "builtin:word_problems", "rows": 512, "eval_rows": 4, "max_length": 128}
        data |= {"batching": batching, "batch_size": 16}
        student = {"path": "builtin:demo_teacher"}
        run = prepare(parse_config({"teachers": [], "student": student, "data": data}))
        reports[batching] = load_dataset(run).stream.counts
    assert reports["bucketed"]["padding"] < 0.10 < 0.2 < reports["shuffled"]["padding"]
    assert reports["bucketed"]["tokens"] == reports["shuffled"]["tokens"]
    with pytest.raises(KavaError, match=r"data\.batching"):
        parse_config({"student": student, "data": data | {"batching": "sorted"}})


def test_a_bucket_that_was_asked_for_is_kept():
    rows = uneven(300)
    assert {bucketed(rows, bucket=96).batch(step).tokens.shape for step in range(75)} == {(4, 96)}
    sizes = {bucketed(rows, bucket=32).batch(step).tokens.shape[1] for step in range(75)}
    assert sizes <= {32, 64, 96}


def test_gsm8k_with_qwen_counts(shared):
    tokenizer = load_tokenizer(shared / "tokenizers/qwen2")
    examples = load_examples(shared / "data/gsm8k/train.jsonl", rows=500)
    rows = Encoder(tokenizer, max_length=160).encode_all(examples)
    texts = [f"Question: {e.prompt}\nAnswer: {e.answer}" for e in examples]
    lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]
    prompts = tokenizer([text.split("\nAnswer: ")[0] + "\nAnswer:" for text in texts])["input_ids"]
    full = sum(len(ids) >= 160 for ids in prompts)
    counts = stream(rows, max_length=160).counts
    assert full > 0
    assert counts["dropped"] == full
    assert counts["truncated"] == sum(length > 160 for length in lengths) - full
    assert counts["rows"] == 500 - full


def test_held_out_rows_in_order_the_last_batch_filled_with_masked_rows():
    rows = [*numbered(5), row(3, 3), *numbered(2, length=9)]
    batches = list(eval_batches(rows, 3, max_length=32, bucket=8, pad_id=7))
    assert [b.tokens.shape for b in batches] == [(3, 8), (3, 16), (3, 16)]
    assert [b.tokens[:, 0].tolist() for b in batches] == [[0, 1, 2], [3, 4, 0], [1, 7, 7]]
    assert not any(mask[1:].any() for mask in batches[-1][1:])
    assert sum(int(b.loss_mask.sum()) for b in batches) == 5 * 2 + 2 * 8


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: stream([]), "no row"),
        (lambda: bucketed([]), "no row"),
        (lambda: bucketed([row(3)], batch_size=0), "data.batch_size=0"),
        (lambda: stream([row(5, 5), row(1, 0)]), r"2 rows.*raise it"),
        (lambda: stream([row(40)]), "max_length=32 is shorter than a row of 40"),
        (lambda: stream([row(3)], batch_size=0), "data.batch_size=0"),
        (lambda: stream([row(3)], bucket=0), "data.bucket=0"),
        (lambda: list(eval_batches([row(3, 3)], 2, max_length=8)), "no row"),
    ],
)
def test_bad_input(call, what):
    with pytest.raises(KavaError, match=what):
        call()
