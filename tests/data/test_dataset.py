"""Which rows are held out, and what is said of those that are cut, dropped or stand twice."""

from functools import partial

import pytest

from kava_jax.data.batches import BatchStream
from kava_jax.data.dataset import HeldOut, make_dataset, split_examples
from kava_jax.data.example import Example
from kava_jax.data.problems import problem
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import load_tokenizer

LONG = "word " * 60


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_tokenizer("builtin:tokenizer"), max_length=48)


def made(encoder, training, held_out, **more):
    make_stream = partial(BatchStream, batch_size=2, max_length=encoder.max_length, bucket=8)
    return make_dataset(training, held_out, encoder, make_stream, more=more)


def test_held_out_rows_that_are_cut_or_dropped_are_counted(encoder):
    rows = [Example("a", "#### 1"), Example("b", LONG), Example(LONG, "#### 3")]
    held = HeldOut.of(rows, encoder)
    assert len(held.measured) == 2
    assert held.sentence == ("2 rows, 1 of them truncated, 1 more dropped (prompt fills the row)")
    assert HeldOut.of(rows[:1], encoder).sentence == "1 rows"
    notes = made(encoder, [Example("t", "1")], rows, other=rows[2:] + rows[:1]).notes
    assert f"held out: {held.sentence}" in notes
    assert "set other: 1 rows, 1 more dropped (prompt fills the row)" in notes


def test_rows_that_stand_twice_are_counted_and_kept(encoder):
    training = [Example("a", "1"), Example("a", "1"), Example("a", "2"), Example("b", "1")]
    held = [Example("a", "9"), Example("c", "1"), Example("c", "1")]
    dataset = made(encoder, training, held, test=[Example("b", "1"), Example("d", "1")])
    assert len(dataset.stream.rows) == 4
    assert [note for note in dataset.notes if "same as" in note] == [
        "data: 1 training rows are the same as an earlier one",
        "held-out: 1 rows are the same as an earlier one",
    ]
    flattered = [note for note in dataset.notes if "flatter" in note]
    assert [note.split(",")[0] for note in flattered] == [
        "held-out: 1 of 3 rows ask what a training row asks",
        "test: 1 of 2 rows ask what a training row asks",
    ]
    documents = [Example("", "one"), Example("", "two")]
    notes = made(encoder, documents, [Example("", "two"), Example("", "three")]).notes
    assert any(note.startswith("held-out: 1 of 2 rows") for note in notes)
    assert not any(
        "same" in note or "flatter" in note
        for note in made(encoder, training[2:], [Example("c", "1")]).notes
    )


def test_chat_rows_are_scored_by_their_last_reply():
    user = {"role": "user", "content": "q"}
    replies = ["#### 4", "it is 4", None]
    turns = [(user, {"role": "assistant"} | ({"content": r} if r else {})) for r in replies]
    held = HeldOut([], [Example("", "", messages) for messages in turns])
    assert [row.reply for row in held.answered] == ["#### 4"]
    assert held.answered[0].question == "q"


def test_the_generators_held_out_rows_are_those_for_choices():
    training, held = split_examples(
        load_examples,
        path="builtin:word_problems",
        split="train",
        rows=3,
        eval_path=None,
        eval_split=None,
        eval_rows=4,
    )
    assert list(training) == [problem("train", 0, i) for i in range(3)]
    assert list(held) == [problem("dev", 0, i) for i in range(4)]
