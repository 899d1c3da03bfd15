import hashlib
import os
import subprocess
import sys

import pytest

from kava_jax.data.problems import WordProblems
from kava_jax.data.sources import load_examples
from kava_jax.data.tokenizer import builtin_tokenizer, load_tokenizer, pad_id
from kava_jax.errors import KavaError

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
    # The shipped teacher carries its own copy; a drift here would only part the two.
    assert digest(builtin_tokenizer()) == PINNED


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
        for e in WordProblems("test", seed=0, rows=500)
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
    with pytest.raises(KavaError, match="revision 'v9'"):
        load_tokenizer("nobody/nothing", revision="v9")
