"""A chat template that writes the date: a run has one, on whatever day it is called again."""

from datetime import date
from pathlib import Path

import pytest

from kava_jax.config.file import load_config
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.errors import KavaError
from kava_jax.journal.manifest import read_manifest
from kava_jax.runs import prepare
from kava_jax.runs.assess import assess
from kava_jax.runs.train import train
from tests.tiny import CONFIG, write_config, write_model, write_rows

DATED = (
    "{{ strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}{{ m.role + ':' + m.content }}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
FIRST, LATER = 1_000_000_000, 1_100_000_000  # 9 September 2001, 9 November 2004


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch) -> Path:
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = DATED
    write_model(tmp_path / "student", seed=2, tokenizer=tokenizer)
    write_rows(tmp_path / "data.jsonl", 24)
    data = CONFIG["data"] | {"format": "chat", "max_length": 128}
    write_config(tmp_path / "tiny.yaml", teachers=[], data=data)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    prepare._day_of_start.cache_clear()


def on(day: int | str, monkeypatch) -> None:
    """As if in a process that is started at this time."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(day))
    prepare._day_of_start.cache_clear()


def manifest(run: str) -> dict:
    return read_manifest(Path(run))


@pytest.mark.long
def test_a_run_keeps_its_day(workspace, monkeypatch):
    on(FIRST, monkeypatch)
    first = train(load_config(Path("tiny.yaml"), ["train.eval_every=1"]), ["test"])
    assert manifest("run")["date"] == "2001-09-09"
    assert first.run.encoder.today == date(2001, 9, 9)

    on(LATER, monkeypatch)
    # The same run again: refused if its rows had changed. Its figures are those of its own day.
    again = train(load_config(Path("tiny.yaml"), ["train.eval_every=1"]), ["test"])
    assert again.evaluation == first.evaluation
    write_rows(Path("held.jsonl"), 24)
    lines = Path("held.jsonl").read_text().splitlines()[-len(first.dataset.held_out.examples) :]
    Path("held.jsonl").write_text("\n".join(lines))
    found = assess("run", "held.jsonl", checkpoint="last", rows=None)
    assert found["eval_loss"] == first.evaluation["eval_loss"]
    assert manifest("run")["date"] == "2001-09-09"

    other = train(load_config(Path("tiny.yaml"), ["run.dir=other"]), ["test"])
    assert other.dataset.tokens != first.dataset.tokens
    assert other.evaluation["eval_loss"] != first.evaluation["eval_loss"]


def test_a_day_that_is_none_is_refused(workspace, monkeypatch):
    on("yesterday", monkeypatch)
    with pytest.raises(KavaError, match="SOURCE_DATE_EPOCH='yesterday' is no number of seconds"):
        train(load_config(Path("tiny.yaml"), []), ["test"])
    assert not Path("run").exists()
