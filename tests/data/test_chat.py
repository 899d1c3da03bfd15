"""Conversations against transformers' own rendering and its mask of the assistant's tokens."""

import json
from datetime import date, datetime
from functools import partial

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from kava_jax.data.batches import BatchStream, collate
from kava_jax.data.dataset import make_dataset
from kava_jax.data.example import Example
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import load_tokenizer
from kava_jax.errors import KavaError

START, END = "<|im_start|>", "<|im_end|>"
# ChatML that says itself which of its tokens the assistant generates.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: reasoning is written behind the last question only.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ 'tools: ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + ' ' }}"
    "{{ ARGUMENTS }}{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '.\n' }}" + MARKED.replace(
    "{% generation %}", ""
).replace("{% endgeneration %}", "")


def talk(*contents, **of_last):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    turns[-1] |= of_last
    return Example("", "", tuple(turns))


@pytest.fixture
def qwen(shared):
    return load_tokenizer(shared / "tokenizers/qwen2")


def encoded(tokenizer, template, example, **options):
    tokenizer.chat_template = template
    return Encoder(tokenizer, format="chat", max_length=4096, **options).encode(example)


def trained(tokenizer, row):
    """The runs of targets as texts."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.targets, [0]])))
    return [tokenizer.decode(row.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


TALKS = [
    talk("2+2?", "4", "And 3+3?", "6", "Thanks.", "You are\n\nwelcome! "),
    talk("one", " two"),
    Example("", "", ({"role": "system", "content": ""}, *talk("a", "b", "c", "d").messages)),
]


@pytest.mark.parametrize("example", TALKS)
def test_all_replies_are_those_that_the_template_marks(qwen, example):
    row = encoded(qwen, MARKED, example, train_on="assistant")
    theirs = qwen.apply_chat_template(
        [dict(message) for message in example.messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    # Theirs ends with a newline that is never generated; ours ends with the end token.
    assert theirs["input_ids"][: len(row.ids)] == row.ids.tolist()
    assert qwen.decode(theirs["input_ids"][len(row.ids) :]) == "\n"
    assert theirs["assistant_masks"][: len(row.ids)] == row.targets.astype(int).tolist()
    batch = collate([row], 128, 0, 4)
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == np.flatnonzero(row.targets).tolist()


def test_the_last_reply_alone_is_the_last_of_all(qwen):
    last = encoded(qwen, MARKED, TALKS[0])
    every = encoded(qwen, MARKED, TALKS[0], train_on="assistant")
    assert last.ids.tolist() == every.ids.tolist()
    assert trained(qwen, last) == trained(qwen, every)[-1:]
    assert trained(qwen, every) == [f"4{END}", f"6{END}", f"You are\n\nwelcome! {END}"]


def test_a_boundary_inside_a_merge_leaves_the_prompt_as_it_is_generated_from(qwen):
    example = talk("a", "\nb", "c", "\nd")  # two newlines are one token
    row = encoded(qwen, MARKED, example, train_on="assistant")
    assert trained(qwen, row) == [f"\nb{END}", f"\nd{END}"]
    prompt = Encoder(qwen, format="chat").encode_prompt(talk("a", ""))
    assert row.ids[: len(prompt)].tolist() == prompt.tolist()
    assert row.prompt_length == len(prompt)


def test_a_cut_conversation_keeps_its_first_replies(qwen):
    whole = encoded(qwen, MARKED, TALKS[0], train_on="assistant")
    place = int(np.flatnonzero(whole.targets)[1]) + 1
    short = Encoder(qwen, format="chat", max_length=place, train_on="assistant").encode(TALKS[0])
    assert short.truncated
    assert trained(qwen, short) == [f"4{END}"]
    assert not Encoder(qwen, format="chat", max_length=place).encode(TALKS[0]).has_loss


def test_reasoning_that_a_template_drops_from_earlier_turns(qwen):
    example = talk("2+2?", "4", "3+3?", "6", reasoning_content="easy")
    row = encoded(qwen, REASONING, example, train_on="assistant")
    assert trained(qwen, row) == [f"4{END}", f"<think>\neasy\n</think>\n\n6{END}"]
    rendered = qwen.apply_chat_template([dict(m) for m in example.messages], tokenize=False)
    assert qwen.decode(row.ids) == rendered.rstrip()
    qwen.eos_token = "<|endoftext|>"  # which this template never writes
    with pytest.raises(KavaError, match=r"no end token after each reply.*data.train_on=last"):
        encoded(qwen, REASONING, example, train_on="assistant")


def test_a_reply_of_weight_0_is_read_only(qwen):
    example = talk("a", "b", "c", "d")
    example.messages[1]["weight"] = 0
    assert trained(qwen, encoded(qwen, MARKED, example, train_on="assistant")) == [f"d{END}"]


@pytest.mark.parametrize(
    ("written", "as_text"),
    [("call.function.arguments | tojson", False), ("call.function.arguments", True)],
)
def test_tool_calls_are_written_as_the_template_wants_them(qwen, written, as_text):
    """Arguments come as JSON text or as objects; templates take the one or the other."""
    tools = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    arguments = {"x": 1, "y": "ü"}
    template = TOOLS.replace("ARGUMENTS", written)
    call = {"function": {"name": "f", "arguments": json.dumps(arguments, ensure_ascii=False)}}
    turns = [*talk("u", "").messages]
    turns[1] = {"role": "assistant", "tool_calls": [call]}
    turns += [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "It is 7."}]
    row = encoded(qwen, template, Example("", "", tuple(turns), tools), train_on="assistant")
    shown = f"<tool_call>f {json.dumps(arguments, ensure_ascii=False)}</tool_call>{END}"
    assert trained(qwen, row) == [shown, f"It is 7.{END}"]
    if not as_text:
        turns[1] = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
        turns[1]["tool_calls"][0]["function"]["arguments"] = arguments
    theirs = qwen.apply_chat_template(turns, tools=list(tools), tokenize=False)
    assert theirs.startswith("tools: [")
    assert qwen.decode(row.ids) == theirs.rstrip()


def test_the_date_is_the_given_one_and_counts_in_the_fingerprint(qwen, monkeypatch):
    class Fixed(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2024, 7, 6)

    example, days = talk("a", "b"), (date(2024, 7, 6), date(2024, 7, 7))
    rows = [encoded(qwen, DATED, example, today=day) for day in days]
    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)
    theirs = qwen.apply_chat_template([dict(m) for m in example.messages], tokenize=False)
    assert qwen.decode(rows[0].ids) == theirs.rstrip()
    assert "06 Jul 2024." in theirs
    assert "07 Jul 2024." in qwen.decode(rows[1].ids)

    def fingerprint(template, day):
        qwen.chat_template = template
        encoder = Encoder(qwen, format="chat", today=day)
        make_stream = partial(BatchStream, batch_size=1, max_length=encoder.max_length)
        return make_dataset([example], [example], encoder, make_stream).tokens

    assert len({fingerprint(DATED, day) for day in days}) == 2
    assert len({fingerprint(MARKED, day) for day in days}) == 1
    assert fingerprint(MARKED, days[0]) == fingerprint(MARKED, days[0])


def test_a_date_that_cannot_be_pinned_is_refused(qwen):
    with pytest.raises(KavaError, match=r"write the format into its strftime_now\(\.\.\.\)"):
        encoded(qwen, "{% set f = '%d' %}{{ strftime_now(f) }}" + MARKED, talk("a", "b"))
