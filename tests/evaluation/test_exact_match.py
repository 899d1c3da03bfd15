import math

import numpy as np
import pytest

from kava_jax.data.example import Example
from kava_jax.data.problems import word_problems
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import load_tokenizer
from kava_jax.errors import KavaError
from kava_jax.evaluation.exact_match import exact_match


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_tokenizer("builtin:tokenizer"))


class Parrot:
    """A generator that looks its answers up by the prompt it is shown, and notes the shapes."""

    def __init__(self, encoder, answers, tail=(), length=200):
        self.tokenizer, self.answers, self.tail, self.length = (
            encoder.tokenizer,
            answers,
            list(tail),
            length,
        )
        self.shapes = set()

    def __call__(self, tokens_BT, valid_BT):
        assert tokens_BT.dtype == np.int32
        assert valid_BT.dtype == bool
        assert (np.diff(valid_BT.astype(int), axis=1) >= 0).all()  # padded on the left
        self.shapes.add(tokens_BT.shape)
        rows = np.full((len(tokens_BT), self.length), 7, np.int32)  # 7: junk after the end
        for row, tokens, valid in zip(rows, tokens_BT, valid_BT, strict=True):
            prompt = self.tokenizer.decode(tokens[valid])
            question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            ids = self.tokenizer(self.answers[question])["input_ids"] + self.tail
            row[: len(ids)] = ids[: self.length]
        return rows


def ended(encoder, answers, **options):
    return Parrot(encoder, answers, tail=[encoder.tokenizer.eos_token_id], **options)


def test_counts_by_hand(encoder):
    wanted = "1+1=<<1+1=2>>2\n#### 2"
    said = {
        "right": " 1+1=<<1+1=2>>2\n#### 2",
        "right number, no mark": " so it is 2",
        "wrong": " #### 3",
        "first mark right, last wrong": " #### 2\n#### 3",
        "right, then the next question": " #### 2\n\nQuestion: 9?\nAnswer: 9",
        "nothing": "",
    }
    examples = [Example(question, wanted) for question in said]
    result = exact_match(ended(encoder, said), encoder, examples, batch_size=4, max_new_tokens=200)
    assert result.rows == 6
    assert result.strict == pytest.approx(3 / 6)
    assert result.flexible == pytest.approx(3 / 6)
    assert result.strict_error == pytest.approx(np.std([1, 0, 0, 1, 1, 0], ddof=1) / math.sqrt(6))
    assert [s.question for s in result.samples] == list(said)
    assert [s.gold for s in result.samples] == ["2"] * 6
    assert result.samples[0].generated == said["right"]
    assert result.samples[4].generated == " #### 2\n\n"
    assert result.samples[5].generated == ""


def test_order_shapes_and_full_marks_on_generated_problems(encoder):
    examples = word_problems("test", seed=0, rows=50)
    parrot = ended(encoder, {e.prompt: " " + e.answer for e in examples})
    result = exact_match(parrot, encoder, examples, batch_size=8, max_new_tokens=200)
    assert (result.strict, result.flexible, result.strict_error) == (1.0, 1.0, 0.0)
    assert [s.question for s in result.samples] == [e.prompt for e in examples]
    assert parrot.shapes <= {(8, 32), (8, 64)}


def test_max_new_tokens_cuts_the_answer(encoder):
    examples = [Example("q", "#### 12")]
    for limit, strict in ((200, 1.0), (3, 0.0)):
        parrot = ended(encoder, {"q": " #### 12"})
        result = exact_match(parrot, encoder, examples, batch_size=1, max_new_tokens=limit)
        assert result.strict == strict


def test_stops_of_the_harness(encoder):
    for stop in ("Question:", "</s>", "<|im_end|>"):
        parrot = Parrot(encoder, {"q": f" #### 12{stop} 99 #### 99"})
        result = exact_match(
            parrot, encoder, [Example("q", "#### 12")], batch_size=2, max_new_tokens=60
        )
        assert result.samples[0].generated == " #### 12"


def test_real_questions_through_the_real_tokenizer(shared):
    encoder = Encoder(load_tokenizer(shared / "tokenizers/qwen2"), max_length=64)
    examples = load_examples(shared / "data/gsm8k/test.jsonl", rows=40)
    parrot = ended(encoder, {e.prompt: " " + e.answer for e in examples}, length=500)
    result = exact_match(parrot, encoder, examples, batch_size=16, max_new_tokens=500)
    assert (result.strict, result.flexible) == (1.0, 1.0)


def test_conversations():
    tokenizer = load_tokenizer("builtin:tokenizer")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, format="chat")
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "#### 4"))
    talk = tuple({"role": role, "content": content} for role, content in turns)
    parrot = ended(encoder, {"user:a\nassistant:b\nuser:c\nassistant:": "#### 4"})
    result = exact_match(parrot, encoder, [Example("", "", talk)], batch_size=1, max_new_tokens=200)
    assert result.strict == 1.0
    assert result.samples[0].question == "c"


def test_bad_input(encoder):
    for examples, what in (([], "at least one row"), ([Example("", "text")], "no prompt")):
        with pytest.raises(KavaError, match=what):
            exact_match(ended(encoder, {}), encoder, examples, batch_size=1, max_new_tokens=1)
