import gzip
import json
import os
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest

from kava_jax.data.example import Example
from kava_jax.data.problems import problem
from kava_jax.data.sources import fingerprint, load_examples
from kava_jax.errors import KavaError

TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a", "name": "x"},
]
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


def read_answers(file, **options):
    return [row.answer for row in load_examples(file, **options)]


def test_numbers_are_read_as_they_were_written(tmp_path):
    long = "9" * 5000  # more digits than Python turns into an integer
    numbers = ["18", "18.50", "-0.1", long, "1e16", "1E-7", "-2.5e3"]
    expected = ["18", "18.50", "-0.1", long, "1" + "0" * 16, "0.0000001", "-2500"]
    text = "".join(f'{{"question": "q", "answer": {number}}}\n' for number in numbers)
    assert read_answers(write(tmp_path, "x.jsonl", text)) == expected
    assert [Decimal(number) for number in numbers] == [Decimal(number) for number in expected]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("NaN", "is NaN, a missing value"),
        ("null", "is null, a missing value"),
        ("Infinity", "is inf, which no 64-bit number holds"),
        ("1e400", "is 1e400, which no 64-bit number holds"),
        ("1e-999999999", "is 1e-999999999, which no 64-bit number holds"),
        ('"b", "answer": "c"', "'answer' is given twice"),
        ('"b", "more": [{"x": 1, "x": 2}]', "'x' is given twice"),
    ],
)
def test_what_is_no_answer_is_named_by_line(tmp_path, value, what):
    message = refused(write(tmp_path, "x.jsonl", f'{GOOD}{{"question": "q", "answer": {value}}}'))
    assert "line 2" in message
    assert what in message


def test_parquet_numbers(tmp_path):
    from pyarrow import Table, array, decimal128, float32, float64, parquet

    def written(column):
        table = Table.from_arrays([array(["q"] * len(column)), column], ["question", "answer"])
        parquet.write_table(table, tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    tenth = array(np.array([0.1, 2.5], np.float32), float32())
    assert read_answers(written(tenth)) == ["0.1", "2.5"]
    assert read_answers(written(array([1e16, 0.1], float64()))) == ["1" + "0" * 16, "0.1"]
    assert read_answers(written(array([Decimal("18.50")], decimal128(5, 2)))) == ["18.50"]
    for kind in (float32(), float64()):
        message = refused(written(array([1.0, float("nan"), None], kind)))
        assert "row 2: field 'answer' is NaN, a missing value" in message
        assert "row 3: field 'answer' is null, a missing value" in message


ROWS = [{"question": "a\u2028b", "answer": "1\n#### 1"}, {"question": "c", "answer": 2}]


def forms():
    """The same two rows in the forms that files of them have."""
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    return {
        "x.jsonl": lines,
        "x.ndjson": lines,
        "x.jsonl.gz": gzip.compress(lines),
        "zipped_by_another_name.jsonl": gzip.compress(lines),
        "x.json": b"\xef\xbb\xbf" + lines,
        "array.json": json.dumps(ROWS).encode(),
        "indented.json": b"\n" + json.dumps(ROWS, indent=2).encode(),
        "array.json.gz": gzip.compress(json.dumps(ROWS, ensure_ascii=False).encode()),
        "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    }


@pytest.mark.parametrize("name", forms())
def test_the_same_rows_in_every_form(tmp_path, name):
    rows = load_examples(write(tmp_path, name, forms()[name]))
    assert rows == [Example("a\u2028b", "1\n#### 1"), Example("c", "2")]
    assert len(load_examples(tmp_path / name, rows=1)) == 1


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "indented.json"])
def test_pipes(tmp_path, name):
    """Standard input and a named pipe in a process of its own; both can be asked for twice."""
    program = (
        "import sys; from kava_jax.data.sources import load_examples as read\n"
        "print([read(sys.argv[1]) == read(sys.argv[1]), *map(tuple, read(sys.argv[1], rows=1))])"
    )
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for where in ("-", "/dev/stdin", str(pipe)):
        with subprocess.Popen(
            [sys.executable, "-c", program, where], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            if where == str(pipe):
                pipe.write_bytes(forms()[name])
            out, _ = process.communicate(forms()[name])
        expected = [True, ("a\u2028b", "1\n#### 1", None, None)]
        assert out.decode().strip() == str(expected), where


def test_text_may_be_zipped(tmp_path):
    file = write(tmp_path, "x.txt.gz", gzip.compress(b"one<|endoftext|>two"))
    assert read_answers(file) == ["one", "two"]


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
    file = write(tmp_path, "x.jsonl", json.dumps({"messages": TURNS}))
    assert load_examples(file, messages_field="messages") == [Example("", "", tuple(TURNS))]


def conversation(tmp_path, value, **more):
    """The messages of one row whose field ``m`` is this."""
    file = write(tmp_path, "x.jsonl", json.dumps({"m": value, **more}))
    (row,) = load_examples(file, messages_field="m")
    return list(row.messages)


def test_forms_of_a_conversation(tmp_path):
    plain = [{"role": "user", "content": "u v"}, {"role": "assistant", "content": "a"}]
    parts = [{"type": "text", "text": "u "}, {"type": "text", "text": "v"}]
    sharegpt = [{"from": "human", "value": "u v"}, {"from": "gpt", "value": "a", "loss": None}]
    columns = {"role": ["user", "assistant"], "content": ["u v", "a"]}
    for form in (plain, [plain[0] | {"content": parts}, plain[1]], sharegpt, columns):
        assert conversation(tmp_path, form) == plain
    assert conversation(tmp_path, json.dumps(plain)) == plain
    silent = [{"role": "system", "content": ""}, *plain]
    assert conversation(tmp_path, silent) == silent


def test_a_conversation_in_parquet(tmp_path):
    from pyarrow import Table, parquet

    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    called = [turns[0], {"role": "assistant", "tool_calls": [call]}]
    # A table gives every message every field: what a message lacks is null.
    parquet.write_table(Table.from_pylist([{"m": turns}, {"m": called}]), tmp_path / "x.parquet")
    rows = load_examples(tmp_path / "x.parquet", messages_field="m")
    assert [list(row.messages) for row in rows] == [turns, called]


def test_tool_calls_and_what_else_a_message_holds_is_kept(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": 2.5}}}
    turns = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "", "name": "f", "tool_call_id": "1"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
    ]
    kept = [{key: v for key, v in turn.items() if v is not None} for turn in turns]
    assert conversation(tmp_path, turns) == kept
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"maxItems": 3}}}]
    for form in (tools, json.dumps(tools)):
        file = write(tmp_path, "x.jsonl", json.dumps({"m": turns, "tools": form}))
        (row,) = load_examples(file, messages_field="m")
        assert list(row.tools) == tools


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("hello", "not a list"),
        ({"role": ["user"], "content": "u"}, "(role: list, content: str), not a list of messages"),
        ({"role": ["user"], "content": []}, "(role: list, content: list), not a list"),
        ([{"from": "judge", "value": "u"}], "from 'judge'; use one of system, human"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "content of message 1 of 'm' has a part of type 'image_url'; only text",
        ),
        ([{"role": "user", "content": ""}], "content of message 1 of 'm' is empty"),
        ([TURNS[1], {"role": "assistant", "content": "a", "weight": 0}], "weight 0"),
        ([], "not a list"),
        ([{"role": "user", "content": "u"}], "assistant's reply"),
        ([{"role": "assistant", "content": "u"}], "assistant's reply"),
        (
            [{"role": "user"}, {"role": "assistant", "content": "a"}],
            "content of message 1",
        ),
        (["u", {"role": "assistant", "content": "a"}], "message 1"),
        (
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": None}],
            "message 2 of 'm' is null",
        ),
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

    assert read(" one \n<|endoftext|>\ntwo\nlines\n<|endoftext|> \n<|endoftext|>last") == [
        "one",
        "two\nlines",
        "last",
    ]
    assert read("all of it\n") == ["all of it"]
    assert read("a<|endoftext|>b<|endoftext|>") == ["a", "b"]
    assert read("a<|endoftext|>b<|endoftext|>c<|endoftext|>", rows=2) == ["a", "b"]
    assert read("a<|endoftext|>b") == ["a", "b"]


def test_tinystories(shared):
    stories = load_examples(shared / "data/tinystories/tinystories_2mib.txt")
    assert len(stories) == 2317
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
    assert "line 7: field 'question' is null, a missing value" in message
    assert "line 8: field 'answer' is empty" in message
    assert "and 3 more" in refused(write(tmp_path, "y.jsonl", "{,\n" * 8))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("cut.jsonl", GOOD + '{"question": "a", "ans', "line 2: not JSON"),
        ("empty.jsonl", "", "no rows"),
        ("blank.jsonl", "\n\n", "no rows"),
        ("binary.jsonl", b"\xff\xfe\x00\x01\n" * 3, "line 1: not UTF-8"),
        ("deep.jsonl", "[" * 100_000, "row 1: nested"),
        ("surrogate.jsonl", '{"question": "\\ud800", "answer": "b"}', "surrogate"),
        ("true.jsonl", '{"question": true, "answer": "b"}', "holds bool"),
        ("binary.txt", b"\xff\x00", "UTF-8"),
        ("blank.txt", " \n<|endoftext|>", "no documents"),
        ("table.csv", "question,answer", "write its rows as one of .jsonl"),
        ("half.json", '[{"question": "a", "answer": "b"},\n{"q', "not JSON (Unterminated string"),
        ("half.json", "[{},\n {,", "at line 2, column 3 of the file"),
        ("nested.json", '{\n"version": 1,\n"data": [{"question": "a"}]\n}', "'data' holds rows"),
        (
            "cut.jsonl.gz",
            gzip.compress(GOOD.encode() * 99, mtime=0)[:-9],
            "cannot be read (Compressed",
        ),
        ("utf16.json", '[{"question": "a"}]'.encode("utf-16"), "not UTF-8"),
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


def test_fingerprint_sees_text_and_order():
    a, b = Example("x", "y"), Example("xy", "")
    assert fingerprint([a, b]) == fingerprint(iter([a, b]))
    marks = [[a, b], [b, a], [a], [a, b, b], [Example("", "", (TURNS[1], TURNS[2]))]]
    assert len({fingerprint(rows) for rows in marks}) == len(marks)
    assert fingerprint([]) == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    )
