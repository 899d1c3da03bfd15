import numpy as np
import pytest

from kava_jax.data.example import Example
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import load_tokenizer
from kava_jax.errors import KavaError

MIA = Example("Mia has 12 apples?", "12+7=19\n#### 19")
TEXT = "Question: Mia has 12 apples?\nAnswer: 12+7=19\n#### 19"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def builtin():
    return load_tokenizer("builtin:tokenizer")


@pytest.fixture(scope="module")
def qwen(shared):
    return load_tokenizer(shared / "tokenizers/qwen2")


def talk(*contents):
    """User and assistant by turns."""
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))


def split(encoder, row):
    decode = encoder.tokenizer.decode
    return decode(row.ids[: row.prompt_length]), decode(row.ids[row.prompt_length :])


def test_question_and_answer(builtin):
    encoder = Encoder(builtin)
    row = encoder.encode(MIA)
    assert split(encoder, row) == (
        "Question: Mia has 12 apples?\nAnswer:",
        " 12+7=19\n#### 19<|endoftext|>",
    )
    assert row.ids.dtype == np.int32
    assert row.ids[-1] == builtin.eos_token_id
    assert not row.truncated
    # The ids of the whole text, tokenized at once, are the same: the boundary is a BPE boundary.
    assert row.ids[:-1].tolist() == builtin(TEXT)["input_ids"]


@pytest.mark.parametrize("name", ["tokenizers/qwen2", "tokenizers/gpt2", "models/stories260k"])
@pytest.mark.parametrize("format", ["qa", "{question}\n{answer}\n", "chat"])
def test_the_prompt_for_generation_is_the_prompt_that_was_trained_on(shared, name, format):
    tokenizer = load_tokenizer(shared / name)
    if format == "chat" and tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, format=format, max_length=4096)
    for example in load_examples(shared / "data/gsm8k/test.jsonl", rows=50):
        row = encoder.encode(example)
        prompt = encoder.encode_prompt(example)
        assert row.ids[: row.prompt_length].tolist() == prompt.tolist()
        assert 0 < row.prompt_length < len(row.ids)
        assert not row.truncated
        answer = tokenizer.decode(row.ids[row.prompt_length :], skip_special_tokens=True)
        assert answer.removesuffix("<|im_end|>").strip() == example.answer


def test_whole_text_with_bos_exactly_once(shared):
    tokenizer = load_tokenizer(shared / "models/stories260k")
    row = Encoder(tokenizer).encode(MIA)
    # transformers' own ids of the whole text (it adds the BOS here), and our eos
    assert row.ids.tolist() == [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    assert row.ids.tolist().count(tokenizer.bos_token_id) == 1
    gpt2 = load_tokenizer(shared / "tokenizers/gpt2")  # has a BOS and does not add it
    assert Encoder(gpt2).encode(MIA).ids.tolist() == [*gpt2(TEXT)["input_ids"], 50256]


def test_truncation_is_marked_and_a_full_prompt_leaves_no_loss(builtin):
    length = len(Encoder(builtin).encode(MIA).ids)
    prompt = len(Encoder(builtin).encode_prompt(MIA))
    expected = {
        length: (length, False, True),
        length - 1: (length - 1, True, True),
        prompt + 1: (prompt + 1, True, True),
        prompt: (prompt, True, False),
        prompt - 1: (prompt - 1, True, False),
    }
    for limit, (kept, truncated, has_loss) in expected.items():
        row = Encoder(builtin, max_length=limit).encode(MIA)
        assert (len(row.ids), row.truncated, row.has_loss) == (kept, truncated, has_loss)
        assert row.prompt_length == min(prompt, limit)


def test_template(builtin):
    template = "{{Q}} {prompt} ->  {answer} (end)"
    encoder = Encoder(builtin, format=template)
    prompt, answer = split(encoder, encoder.encode(Example("1+1", "2 {answer}")))
    assert prompt == "{Q} 1+1 ->"
    assert answer == "  2 {answer} (end)<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{q} {x} {answer}", "{q}, {x}"),
        ("{prompt} {answer:>4}", "{answer:>4}"),
        ("{prompt!r} {answer}", "{prompt!r}"),
        ("{} {answer}", "{}"),
        ("{answer} {prompt}", "needs {prompt}"),
        ("{prompt}", "needs {prompt}"),
        ("{prompt} {answer} {answer}", "one {answer}"),
        ("{prompt {answer}", "brace"),
        ("template", "is unknown; use qa, chat, or a text with {prompt} and {answer}"),
        ("", "is unknown"),
    ],
)
def test_bad_templates(builtin, template, what):
    with pytest.raises(KavaError) as caught:
        Encoder(builtin, format=template)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chat_trains_on_the_last_reply_and_its_end_only(qwen):
    encoder = Encoder(qwen, format="chat")
    turns = talk("2+2?", "4", "And 3+3?", "6")
    prompt, answer = split(encoder, encoder.encode(Example("", "", turns)))
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer == "6<|im_end|>"
    _, answer = split(encoder, encoder.encode(MIA))
    assert answer == MIA.answer + "<|im_end|>"


# As DeepSeek-R1's distilled models have it: thoughts are opened to generate and cut from replies.
THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The same, but a reply keeps what it says it thought.
KEPT = THINKING.replace(".split('</think>')[-1]", "")


@pytest.mark.parametrize(
    ("template", "answer", "trained"),
    [
        (THINKING, "#### 19", "\n</think>\n\n#### 19<|im_end|>"),
        (
            THINKING,
            "<think>\n12+7=19\n</think>\n\n#### 19",
            "12+7=19\n</think>\n\n#### 19<|im_end|>",
        ),
        (THINKING, "12+7=19</think>#### 19", "12+7=19\n</think>\n\n#### 19<|im_end|>"),
        (KEPT, "<think>12+7=19</think>#### 19", "12+7=19</think>#### 19<|im_end|>"),
        (KEPT, "<think>\n12+7=19</think>#### 19", "12+7=19</think>#### 19<|im_end|>"),
    ],
)
def test_a_reply_after_an_opened_thinking_block(shared, template, answer, trained):
    tokenizer = load_tokenizer(shared / "tokenizers/qwen2")
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, format="chat")
    example = Example("Mia has 12 apples?", answer)
    prompt = "<|User|>Mia has 12 apples?<|Assistant|><think>\n"
    row = encoder.encode(example)
    assert split(encoder, row) == (prompt, trained)
    np.testing.assert_array_equal(encoder.encode_prompt(example), row.ids[: row.prompt_length])


def test_chat_template_without_an_end_token_gets_eos(builtin):
    tokenizer = load_tokenizer("builtin:tokenizer")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, format="chat")
    assert split(encoder, encoder.encode(MIA)) == (
        f"user: {MIA.prompt}\nassistant:",
        f" {MIA.answer}<|endoftext|>",
    )


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (None, "chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if add_generation_prompt %}x{% else %}y{% endif %}", "generation prompt"),
    ],
)
def test_chat_templates_that_do_not_serve(template, what):
    tokenizer = load_tokenizer("builtin:tokenizer")
    tokenizer.chat_template = template
    with pytest.raises(KavaError, match=what):
        Encoder(tokenizer, format="chat").encode(MIA)


def test_documents_lose_nothing(builtin, shared):
    stories = load_examples(shared / "data/tinystories/tinystories_2mib.txt", rows=30)
    rows = Encoder(builtin, max_length=100).encode_all(stories)
    expected = []
    for story in stories:
        expected += [*builtin(story.answer)["input_ids"], builtin.eos_token_id]
    assert np.concatenate([row.ids for row in rows]).tolist() == expected
    assert all(row.prompt_length == 0 and not row.truncated and row.has_loss for row in rows)
    assert max(len(row.ids) for row in rows) <= 100
    assert min(len(row.ids) for row in rows) > 40  # no crumbs


def test_document_windows_by_hand(builtin):
    ids = [
        len(row.ids) for row in Encoder(builtin, max_length=4).encode_all([Example("", "1" * 9)])
    ]
    assert ids == [4, 3, 3]  # nine digits and eos
    row = Encoder(builtin, max_length=4).encode(Example("", "1" * 9))
    assert (len(row.ids), row.truncated) == (4, True)


def test_document_has_bos_and_eos_where_the_tokenizer_has_them(shared):
    tokenizer = load_tokenizer(shared / "models/stories260k")
    (row,) = Encoder(tokenizer).encode_all([Example("", "Once upon a time")])
    assert row.ids.tolist() == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]
    assert row.ids[0] == tokenizer.bos_token_id


def test_encode_all_equals_one_by_one(qwen, shared):
    examples = load_examples(shared / "data/gsm8k/test.jsonl", rows=40)
    encoder = Encoder(qwen, max_length=150)
    together = encoder.encode_all(examples)
    for row, alone in zip(together, map(encoder.encode, examples), strict=True):
        assert row.ids.tolist() == alone.ids.tolist()
        assert row[1:] == alone[1:]
    assert encoder.encode_all([]) == []


def test_bad_input(builtin):
    conversation = Example("", "", talk("a", "b"))
    no_eos = load_tokenizer("builtin:tokenizer")
    no_eos.eos_token = None
    for call, what in [
        (lambda: Encoder(builtin, max_length=1), "data.max_length=1"),
        (lambda: Encoder(no_eos), "eos"),
        (lambda: Encoder(builtin, format="{prompt}"), "data.format"),
        (lambda: Encoder(builtin).encode(conversation), "data.format=chat"),
        (lambda: Encoder(builtin).encode_prompt(Example("", "text")), "no prompt"),
    ]:
        with pytest.raises(KavaError, match=what):
            call()
