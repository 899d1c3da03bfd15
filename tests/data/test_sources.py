import json

import pytest

from kava_jax.data.example import Example
from kava_jax.data.problems import problem
from kava_jax.data.sources import fingerprint, load_examples
from kava_jax.errors import KavaError

GOOD = '{"question": "a", "answer": "b"}\n'


def write(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refused(path, **options):
    with pytest.raises(KavaError) as caught:
        load_examples(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_gsm8k(shared):
    rows = load_examples(shared / "data/gsm8k/train.jsonl")
    assert len(rows) == 7473
    assert "\u2028" in rows[2381].prompt + rows[2381].answer
    assert rows[0].prompt.startswith("Natalia sold clips to 48")
    assert rows[0].answer.endswith("#### 72")


def test_a_data_set_directory_through_datasets_equals_the_file(shared):
    directory = load_examples(shared / "data/gsm8k", split="test")
    assert directory == load_examples(shared / "data/gsm8k/test.jsonl")
    assert "val" in refused(shared / "data/gsm8k", split="val")


def test_jsonl_oddities(tmp_path):
    text = '\ufeff{"question": "a\u2028b", "answer": 3}\r\n\r\n{"answer": 2.5, "question": "c"}'
    rows = load_examples(write(tmp_path, "x.jsonl", text))
    assert rows == [Example("a\u2028b", "3"), Example("c", "2.5")]
    file = write(tmp_path, "y.json", '{"q": "1", "a": "2"}\n' * 3)
    assert (
        load_examples(file, prompt_field="q", answer_field="a", rows=2) == [Example("1", "2")] * 2
    )
    assert load_examples(file, prompt_field=None, answer_field="q")[0] == Example("", "1")


def test_parquet(tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(
        Table.from_pylist([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]),
        tmp_path / "x.parquet",
    )
    assert load_examples(tmp_path / "x.parquet") == [Example("a", "b"), Example("c", "d")]
    message = refused(tmp_path / "x.parquet", answer_field="reply")
    assert "row 1: field 'reply' is missing (fields here: question, answer)" in message
    assert "parquet" in refused(write(tmp_path, "bad.parquet", b"PAR1 nonsense"))


def test_conversations(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "name": "x"},
    ]
    file = write(tmp_path, "x.jsonl", json.dumps({"messages": turns}))
    expected = Example("", "", (("system", "s"), ("user", "u"), ("assistant", "a")))
    assert load_examples(file, messages_field="messages") == [expected]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("hello", "not a list"),
        ([], "not a list"),
        ([{"role": "user", "content": "u"}], "assistant's reply"),
        ([{"role": "assistant", "content": "u"}], "assistant's reply"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "'content' is missing"),
        (["u", {"role": "assistant", "content": "a"}], "message 1"),
        ([{"role": "user", "content": "u"}, {"role": "assistant", "content": None}], "NoneType"),
    ],
)
def test_broken_conversations(tmp_path, messages, what):
    file = write(tmp_path, "x.jsonl", json.dumps({"m": messages}))
    message = refused(file, messages_field="m")
    assert "line 1" in message
    assert what in message


def test_documents(tmp_path):
    def read(text, **k):
        return [e.answer for e in load_examples(write(tmp_path, "x.txt", text), **k)]

    assert read(" one \n<|endoftext|>\ntwo\nlines\n<|endoftext|> \n<|endoftext|>cut o") == [
        "one",
        "two\nlines",
    ]
    assert read("all of it\n") == ["all of it"]
    assert read("a---b---", separator="---") == ["a", "b"]
    assert read("a---b---c---", separator="---", rows=2) == ["a", "b"]


def test_tinystories(shared):
    stories = load_examples(shared / "data/tinystories/tinystories_2mib.txt")
    assert len(stories) == 2316
    assert all(s.prompt == "" and s.answer == s.answer.strip() for s in stories)


def test_builtin():
    rows = load_examples("builtin:word_problems", split="test", seed=4, rows=10)
    assert list(rows) == [problem("test", 4, i) for i in range(10)]
    assert len(load_examples("builtin:word_problems")) == 7473
    shared = load_examples("builtin:word_problems/shared", split="dev", seed=4, rows=10)
    assert list(shared) == [problem("dev", 4, i, "shared") for i in range(10)]
    assert len(load_examples("builtin:word_problems", split="confirm")) == 1319
    assert "split='validation'" in refused("builtin:word_problems", split="validation")
    assert "builtin:word_problems/none' names no mixture" in refused("builtin:word_problems/none")


def test_all_broken_lines_are_named(tmp_path):
    lines = [GOOD, "{oops\n", "\n", '{"q": 1, "answer": "b"}\n', "[1]\n", GOOD]
    lines += ['{"question": null, "answer": "b"}\n', '{"question": "a", "answer": " "}\n']
    message = refused(write(tmp_path, "x.jsonl", "".join(lines)))
    assert "x.jsonl" in message
    assert "5 broken" in message
    assert "line 2: not JSON" in message
    assert "line 4: field 'question' is missing (fields here: q, answer)" in message
    assert "line 5: a JSON list" in message
    assert "line 7: field 'question' holds NoneType" in message
    assert "line 8: field 'answer' is empty" in message
    assert "and 3 more" in refused(write(tmp_path, "y.jsonl", "{\n" * 8))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("cut.jsonl", GOOD + '{"question": "a", "ans', "line 2: not JSON"),
        ("empty.jsonl", "", "no rows"),
        ("blank.jsonl", "\n\n", "no rows"),
        ("binary.jsonl", b"\xff\xfe\x00\x01\n" * 3, "line 1: not UTF-8"),
        ("deep.jsonl", "[" * 100_000, "line 1: "),
        ("surrogate.jsonl", '{"question": "\\ud800", "answer": "b"}', "surrogate"),
        ("true.jsonl", '{"question": true, "answer": "b"}', "holds bool"),
        ("binary.txt", b"\xff\x00", "UTF-8"),
        ("blank.txt", " \n<|endoftext|>", "no documents"),
        ("table.csv", "question,answer", "unknown ending"),
    ],
)
def test_broken_files(tmp_path, name, content, what):
    message = refused(write(tmp_path, name, content))
    assert name in message
    assert what in message


def test_missing_sources(tmp_path):
    for path in (tmp_path / "none.jsonl", "none.parquet", "builtin:riddles", "", "nobody/nothing"):
        assert repr(str(path)) in refused(path)
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(tmp_path / "folder")


def test_bad_options(tmp_path):
    file = write(tmp_path, "x.txt", "a")
    assert "data.rows=0" in refused(file, rows=0)
    assert "data.separator=''" in refused(file, separator="")


def test_fingerprint_sees_text_and_order():
    a, b = Example("x", "y"), Example("xy", "")
    assert fingerprint([a, b]) == fingerprint(iter([a, b]))
    marks = [[a, b], [b, a], [a], [a, b, b], [Example("", "", (("user", "x"), ("assistant", "y")))]]
    assert len({fingerprint(rows) for rows in marks}) == len(marks)
    assert fingerprint([]) == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    )
