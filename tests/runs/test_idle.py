"""Settings that do nothing are said: beside each stands a run in which the same one counts."""

from typing import Any

import numpy as np
import pytest

from kava_jax.config.file import parse_config
from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError
from kava_jax.runs.explain import explain
from kava_jax.runs.idle import compared_notes, idle_settings
from tests.tiny import CONFIG

# What is set; the words it is said with; what makes it count.
IDLE: dict[str, tuple[list[str], str, list[str]]] = {
    "kl temperature": (
        ["loss.kl_temperature=2"],
        "does nothing: loss.kl_weight=0",
        ["loss.kl_weight=1"],
    ),
    "dropout": (
        ["projector.kind=linear", "projector.dropout=0.3"],
        "projector.dropout=0.3 does nothing: projector.kind=linear",
        ["projector.kind=elastic"],
    ),
    "projector without weights": (
        ["projector.kind=identity", "projector.per_layer=true", "optimizer.projector_lr=0.1"],
        "projector.per_layer=True does nothing: projector.kind=identity | "
        "optimizer.projector_lr=0.1 does nothing: projector.kind=identity",
        ["projector.kind=elastic"],
    ),
    "projector warm-up": (
        ["projector.warmup_steps=1"],
        "projector.warmup_steps=1 does nothing: projector.training=joint",
        ["projector.training=warmup"],
    ),
    "projector rate": (
        ["projector.training=frozen", "optimizer.projector_lr=0.1"],
        "does nothing: projector.training=frozen",
        ["projector.training=joint"],
    ),
    "answers between": (
        ["eval.exact_match_every=2"],
        "eval.exact_match_every=2 does nothing: train.eval_every=null",
        ["train.eval_every=1"],
    ),
    "answers that are off": (
        ["eval.exact_match_every=2", "train.eval_every=1", "eval.max_new_tokens=0"],
        "does nothing: eval.max_new_tokens=0",
        ["eval.max_new_tokens=4"],
    ),
    "intervals that never meet": (
        ["eval.exact_match_every=2", "train.eval_every=3"],
        "no multiple in common below train.steps=4",
        ["train.eval_every=1"],
    ),
    "evaluation": (
        ["train.eval_every=9"],
        "train.eval_every=9 is more than train.steps=4: only at the end",
        ["train.eval_every=2"],
    ),
    "checkpoints": (["train.checkpoint_every=9"], "train.checkpoint_every=9 is more", []),
    "logit KL without a teacher": (
        ["loss.kl_weight=1", "teachers=[]"],
        "loss.kl_weight=1.0 does nothing: there is no teacher",
        ["teachers=[{path: teacher}]"],
    ),
}


def said(fields: list[str]) -> list[str]:
    base: dict[str, Any] = CONFIG | {"train": {"steps": 4, "checkpoint_every": 1}}
    return idle_settings(parse_config(base, fields))


@pytest.mark.parametrize("name", IDLE)
def test_what_does_nothing_is_said_and_only_then(name: str) -> None:
    fields, words, heard = IDLE[name]
    assert words in " | ".join(said(fields))
    if heard:
        assert words not in " | ".join(said([*fields, *heard]))
    explained = explain(parse_config(CONFIG | {"train": {"steps": 4}}, fields))
    assert all(part in explained for part in words.split(" | "))


@pytest.mark.parametrize("recipe", ["original", "anchored", "calibrated"])
def test_nothing_is_said_of_what_recipes_and_defaults_set(recipe: str) -> None:
    assert said([f"recipe={recipe}"]) == []


def test_a_held_out_split_of_a_single_file_is_said(tmp_path) -> None:
    (tmp_path / "rows.jsonl").touch()
    fields = [f"data.path={tmp_path}/rows.jsonl", "data.eval_split=dev"]
    assert said(fields) == ["data.eval_split=dev does nothing: data.path is a file"]
    assert said([*fields, "data.eval_path=other"]) == []


def test_rows_without_a_compared_token_are_counted() -> None:
    rows = [Encoded(np.arange(length, dtype=np.int32), 1, False) for length in (3, 4, 5, 9)]
    assert compared_notes({"training": rows}, 0) == []
    (note,) = compared_notes({"training": rows, "held-out": rows[2:]}, 4)
    assert note.startswith("training: 2 of 4 rows are no longer than loss.sink_tokens=4")
    with pytest.raises(KavaError, match="no token of the held-out rows to compare: the longest"):
        compared_notes({"training": rows, "held-out": rows[:2]}, 4)
