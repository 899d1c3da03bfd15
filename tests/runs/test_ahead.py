"""Bucketed batches: the step is compiled for their lengths before the first, and then never."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from kava_jax.runs import train
from tests.tiny import CONFIG, kava, write_config, write_model, write_workspace

STEPS = 9


@pytest.fixture
def _place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(write_workspace(tmp_path))
    for name, seed in (("teacher", 1), ("student", 2)):  # a layer each: there is much to compile
        write_model(tmp_path / name, seed=seed, num_hidden_layers=1)
    write_config(
        tmp_path / "bucketed.yaml",
        data=CONFIG["data"] | {"batching": "bucketed", "bucket": 16, "max_length": 96},
        # The weight is measured by a step of its own.
        loss={"kv_weight": "auto(0.2)"},
        eval={"max_new_tokens": 0, "batch_size": 8},
        train={"steps": STEPS, "log_every": 1, "checkpoint_every": 4, "max_to_keep": 3},
    )


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Grows with every program that is compiled."""
    seen: list[str] = []

    def hear(event: str, duration: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield seen
    jax.monitoring.unregister_event_duration_listener(hear)


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.long
@pytest.mark.usefixtures("_place")
def test_every_length_is_compiled_before_the_first_step_and_none_after(
    tmp_path, capsys, monkeypatch, compiled
) -> None:
    before: list[int] = []  # how often the step was compiled when the loop began
    real = train.run_steps

    def begin(*arguments, **options):
        before.append(compiled.count("jit(train_step)"))
        return real(*arguments, **options)

    monkeypatch.setattr(train, "run_steps", begin)
    ended = kava(capsys, "train", "bucketed.yaml")
    assert ended.code == 0, ended.err
    told = re.search(
        r"compiling the step for (\d) padded lengths: ([\d, ]+)", ended.out + ended.err
    )
    assert told
    lengths = [int(length) for length in told[2].split(", ")]
    assert len(lengths) == int(told[1]) > 1
    assert lengths == sorted(lengths, reverse=True)
    # One more measures the KV weight, at the greatest length.
    assert before == [len(lengths) + 1]
    assert compiled.count("jit(train_step)") == before[0]

    first = losses(tmp_path / "run")
    for step in (8, STEPS):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    resumed = kava(capsys, "train", "bucketed.yaml")
    assert resumed.code == 0, resumed.err
    assert "continuing from the checkpoint at step 4" in resumed.err, resumed.err
    assert losses(tmp_path / "run") == first
    # Few steps are left, so only the lengths of their batches.
    again = before[1] - before[0]
    assert 1 < again <= len(lengths) + 1
    assert compiled.count("jit(train_step)") == before[1]

    # The same run by a step that is compiled when it is called.
    monkeypatch.setattr(train, "compiled_ahead", lambda step, *_: step)
    assert kava(capsys, "train", "bucketed.yaml", "run.dir=plain").code == 0
    assert losses(tmp_path / "plain") == first
