import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kava_jax.data.problems import word_problems
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoded
from kava_jax.data.tokenizer import (
    builtin_tokenizer,
    check_same_ids,
    check_unused,
    load_tokenizer,
    pad_id,
    vocabulary_size,
)
from kava_jax.errors import KavaError

ROOT = Path(__file__).resolve().parents[2]
PINNED = "0fd2253afe811eba183eb209f9427d86876989940f563cb178d81797a87f034e"


def digest(tokenizer):
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tokenizer")


def test_512_ids_with_eos_and_pad_and_all_bytes(tokenizer):
    assert len(tokenizer) == 512
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.bos_token is None
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    alphabet = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert len(alphabet) == 256


def test_the_same_in_another_process_and_for_ever(tokenizer):
    code = (
        "import hashlib; from kava_jax.data.tokenizer import builtin_tokenizer as b;"
        "print(hashlib.sha256(b().backend_tokenizer.to_str().encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "TOKENIZERS_PARALLELISM": "true"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert other.stdout.strip() == digest(tokenizer)
    assert digest(builtin_tokenizer()) == PINNED


def test_its_script_makes_the_same_again(tokenizer):
    script = runpy.run_path(str(ROOT / "docs/results/builtin_tokenizer.py"))
    assert script["made"]().to_str() == tokenizer.backend_tokenizer.to_str()


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("12+345=<<7>>") == ["1", "2", "+", "3", "4", "5", "=<<", "7", ">>"]


def test_any_text_comes_back(tokenizer, shared):
    texts = [text for row in load_examples(shared / "data/gsm8k/test.jsonl") for text in row[:2]]
    texts += ["Ünïcode 猫 \u2028 🐈‍⬛ é", "  two  spaces , don't \n\n\t x ", "\x00\x7f", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_generated_problems_are_short(tokenizer):
    lengths = [
        len(tokenizer(f"Question: {e.prompt}\nAnswer: {e.answer}")["input_ids"])
        for e in word_problems("test", seed=0, rows=500)
    ]
    assert max(lengths) < 112


def test_saved_and_loaded_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "Mia has 12 apples.  猫\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_without_pad_token_the_eos_fills_and_the_tokenizer_stays_as_it_was(shared):
    gpt2 = load_tokenizer(shared / "tokenizers/gpt2")
    assert gpt2.pad_token is None
    assert pad_id(gpt2) == gpt2.eos_token_id == 50256
    assert pad_id(load_tokenizer(shared / "tokenizers/qwen2")) == 151643


def test_bad_addresses(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{broken")
    empty = tmp_path / "empty"
    empty.mkdir()
    for address in (tmp_path, empty, file, tmp_path / "none", "nobody/nothing", "builtin:x", ""):
        with pytest.raises(KavaError) as caught:
            load_tokenizer(address)
        message = str(caught.value)
        assert repr(str(address)) in message
        assert "\n" not in message
    with pytest.raises(KavaError, match="tokenizer='nobody/nothing@v9'"):
        load_tokenizer("nobody/nothing@v9")


def written(directory, tokenizer, swap=None, added=(), layout="tokenizer.json"):
    """A model directory with this tokenizer: two tokens exchanged, or special ones added."""
    directory.mkdir()
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    if swap:
        a, b = swap
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, token in added:
        others = [other for other in whole["added_tokens"] if other["id"] != index]
        new = {"id": index, "content": token, "special": True} | flags
        whole["added_tokens"] = sorted([*others, new], key=lambda entry: entry["id"])
        vocabulary = {t: i for t, i in vocabulary.items() if i != index} | {token: index}
    whole["model"]["vocab"] = vocabulary
    if layout == "tokenizer.json":
        (directory / layout).write_text(json.dumps(whole))
    else:
        (directory / "vocab.json").write_text(json.dumps(vocabulary))
        merges = [
            pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]
        ]
        (directory / "merges.txt").write_text("\n".join(merges))
        (directory / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return directory


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_a_model_with_other_ids_is_refused_however_its_tokenizer_is_stored(
    tokenizer, tmp_path, layout
):
    same = written(tmp_path / "same", tokenizer, layout=layout)
    assert check_same_ids(tokenizer, same, "teachers.big") == ({}, None)
    other = written(tmp_path / "other", tokenizer, swap=("a", "b"), layout=layout)
    first, second = sorted(tokenizer.convert_tokens_to_ids(["a", "b"]))
    with pytest.raises(KavaError, match=rf"teachers\.big .* disagree: id {first} is") as caught:
        check_same_ids(tokenizer, other, "teachers.big")
    assert repr(tokenizer.convert_ids_to_tokens(second)) in str(caught.value)


def test_a_tokenizer_that_cannot_be_compared_is_refused_and_none_is_said(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(KavaError, match=r"teachers\.big: its ids cannot be compared"):
        check_same_ids(tokenizer, tmp_path, "teachers.big")
    (tmp_path / "tokenizer.model").unlink()
    renamed, note = check_same_ids(tokenizer, tmp_path, "teachers.big")
    assert renamed == {}
    assert note == "teachers.big has no tokenizer of its own; its ids are taken to be the run's"


def test_a_special_token_of_another_name_matters_only_where_a_row_uses_it(tokenizer, tmp_path):
    other = written(tmp_path / "other", tokenizer, added=[(tokenizer.pad_token_id, "<|user|>")])
    renamed, note = check_same_ids(tokenizer, other, "teachers.big")
    pad = tokenizer.pad_token_id
    assert renamed == {pad: f"id {pad} is '<|pad|>' in the run and '<|user|>' there"}
    assert note is None
    row = Encoded(np.array(tokenizer("one apple")["input_ids"], np.int32), 0, False)
    said = check_unused(renamed, [row], "teachers.big")
    assert said is not None
    assert "'<|pad|>' in the run and '<|user|>' there" in said
    with_pad = row._replace(ids=np.append(row.ids, np.int32(tokenizer.pad_token_id)))
    with pytest.raises(KavaError, match=r"teachers\.big .* '<\|user\|>'"):
        check_unused(renamed, [row, with_pad], "teachers.big")


def test_tokens_that_a_model_was_not_trained_on_are_said_and_gaps_are_counted(tokenizer, tmp_path):
    more = load_tokenizer(written(tmp_path / "more", tokenizer, added=[(512, "<a>"), (600, "<b>")]))
    assert len(more) == 514
    assert vocabulary_size(more) == 601
    renamed, note = check_same_ids(more, written(tmp_path / "old", tokenizer), "teachers.big")
    assert renamed == {}
    assert note == (
        "teachers.big does not know 2 of the tokenizer's tokens, from id 512 ('<a>') on: "
        "its rows for them are untrained"
    )
