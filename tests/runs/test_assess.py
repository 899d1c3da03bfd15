"""``assess``: the held-out figures of a model on any data, against transformers' own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kava_jax.config.file import load_config, parse_config
from kava_jax.data.problems import word_problems
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.errors import KavaError, StoppedError
from kava_jax.runs.assess import assess
from kava_jax.runs.evaluate import choice_note
from tests.tiny import write_model, write_rows
from tests.tolerances import TOL

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = 4
SMALL = ("data.max_length=256", "data.batch_size=8", "eval.batch_size=8", "eval.max_new_tokens=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("assess") / "model", seed=3)


def figures(model, data, *overrides, rows=ROWS):
    return assess(
        str(model), str(data), checkpoint="last", rows=rows, overrides=(*SMALL, *overrides)
    )


@pytest.fixture(scope="module")
def on_builtin(model):
    return figures(model, "builtin:word_problems")


def test_the_generator_gives_rows_that_are_never_trained_on(model, on_builtin, tmp_path):
    path = tmp_path / "test.jsonl"
    rows = word_problems("test", 0, ROWS)
    path.write_text("".join(json.dumps({"q": r.prompt, "a": r.answer}) + "\n" for r in rows))
    fields = ("data.fields=[q, a]",)
    assert figures(model, path, *fields) == on_builtin
    assert figures(model, "builtin:word_problems", "data.eval_split=train") != on_builtin


def test_a_loss_that_overflows_is_no_result(model, tmp_path):
    shutil.copytree(model, tmp_path / "huge")
    path = tmp_path / "huge" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:] = 3e38  # a finite float32, and ten times it is none
    tensors["model.embed_tokens.weight"] *= 10
    save_file(tensors, path)
    with pytest.raises(StoppedError, match=r"eval_loss=(nan|inf): the weights are finite"):
        figures(tmp_path / "huge", "builtin:word_problems", "eval.max_new_tokens=0")


def test_figures_of_a_plain_model(on_builtin):
    assert set(on_builtin) == {
        "eval_rows",
        "eval_loss",
        "exact_match_strict",
        "exact_match_flexible",
        "exact_match_stderr",
        "exact_match_rows",
    }
    assert on_builtin["exact_match_rows"] == on_builtin["eval_rows"] == ROWS
    json.dumps(on_builtin, allow_nan=False)


def test_held_out_loss_is_that_of_transformers(model, on_builtin):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = builtin_tokenizer()
    total, count = 0.0, 0
    for row in word_problems("test", 0, ROWS):
        prompt = tokenizer(f"Question: {row.prompt}\nAnswer:").input_ids
        ids = tokenizer(f"Question: {row.prompt}\nAnswer: {row.answer}").input_ids
        ids = [*ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        answer = losses[len(prompt) - 1 :].numpy()
        total, count = total + float(np.sum(answer)), count + len(answer)
    assert on_builtin["eval_loss"] == pytest.approx(total / count, rel=TOL["parity"])


def test_documents_have_a_loss_and_no_answers(model, tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("Tom has a ball.<|endoftext|>Mia has a kite.<|endoftext|>")
    assert set(figures(model, path, rows=None)) == {"eval_rows", "eval_loss"}


def test_exact_match_can_be_left_out(model, on_builtin):
    found = figures(model, "builtin:word_problems", "eval.max_new_tokens=0")
    assert found == {name: on_builtin[name] for name in ("eval_rows", "eval_loss")}


def test_what_can_be_scored_is_scored_and_the_rest_is_said(model, tmp_path):
    rows = [
        ("one", "#### 1"),
        ("two", "it is 2"),
        ("three", "####3"),
        ("four", "#### 4%"),
        ("word " * 100, "#### 5"),
    ]
    path = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    path.write_text("\n".join(lines))
    notes = []
    overrides = ["data.max_length=64", "eval.max_new_tokens=4", "eval.batch_size=4"]
    found = assess(
        str(model), str(path), checkpoint="last", rows=None, overrides=overrides, say=notes.append
    )
    assert (found["eval_rows"], found["exact_match_rows"]) == (4, 3)
    assert notes == [
        f"{path}: 4 rows, 1 more dropped (prompt fills the row)",
        f"exact match on {path}: 2 of 5 answers have no `#### ` before their number and are not "
        f"scored",
        f"exact match on {path}: 1 of 3 answers can never be met by the strict rule, not even word "
        f"for word (the first is '4%'); write one bare number behind one `#### `",
    ]


@pytest.mark.parametrize(
    ("data", "warned"),
    [
        ({"eval_split": "test"}, True),
        ({"eval_path": "data/my-test.jsonl.gz"}, True),
        ({"eval_path": "test/dev.jsonl"}, False),
        ({"eval_path": "latest.jsonl"}, False),
        ({"eval_split": "validation"}, False),
        ({}, False),
    ],
)
def test_choosing_on_a_test_split_is_warned_of(data, warned):
    data = {"path": "openai/gsm8k", **data}
    config = parse_config({"student": {"path": "x"}, "data": data})
    found = choice_note(config)
    assert (found is not None) == warned
    if warned:
        assert next(iter(set(data.values()) - {"openai/gsm8k"})) in found
        assert "under eval.sets" in found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_config_chooses_on_a_test_split(path):
    assert choice_note(load_config(path)) is None


def test_only_fields_of_data_and_eval_can_be_set(model, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", 2)
    with pytest.raises(KavaError, match=r"override='loss.kv=mse'.*data\.\* and eval\.\*"):
        figures(model, data, "loss.kv=mse")
    with pytest.raises(KavaError, match=r"checkpoint='best'.*leave it out"):
        assess(str(model), str(data), checkpoint="best", rows=None)
