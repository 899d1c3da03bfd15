"""What a run says of its data before it starts, and that it reads them from standard input."""

import io
import json
import sys
from pathlib import Path

from kava_jax.data import files
from tests.tiny import kava, write_rows, write_workspace


def test_a_run_from_standard_input_says_what_its_figures_are_worth(tmp_path, monkeypatch, capsys):
    write_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = write_rows(Path("rows.jsonl"), 24).read_text().splitlines()
    held = [json.loads(line) for line in lines[:4]]
    held[1]["answer"] = "no mark"
    held[2]["answer"] = "#### 1/2"
    held[3]["question"] *= 20
    Path("my_test.json").write_text(json.dumps(held, indent=1))
    text = "\n".join([*lines, lines[0]]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    files._piped.cache_clear()
    fields = ["data.path=-", "data.eval_path=my_test.json", "train.eval_every=1", "teachers=[]"]
    ended = kava(capsys, "train", "tiny.yaml", *fields, "eval.sets.more.path=rows.jsonl")
    files._piped.cache_clear()
    assert ended.code == 0, ended.err
    for words in (
        "data: 25 rows",
        "held out: 3 rows, 1 of them truncated, 1 more dropped (prompt fills the row)",
        "set more: 24 rows",
        "data: 1 training rows are the same as an earlier one",
        "held-out: 3 of 4 rows ask what a training row asks",
        "more: 24 of 24 rows ask what a training row asks",
        "exact match on held_out: 1 of 4 answers have no `#### `",
        "exact match on held_out: 1 of 3 answers can never be met",
        "lowest loss on data.eval_path=my_test.json",
    ):
        assert words in ended.err, words
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in metrics if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    # A further set is read once, at the end.
    assert ["more/eval_loss" in line for line in evaluations] == [False, False, True]
    assert evaluations[-1]["exact_match_rows"] == 3
