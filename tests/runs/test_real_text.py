"""The original's small-scale check on real data: 100 GSM8K rows, 100 steps, a trained teacher."""

import json
from pathlib import Path

import pytest

from kava_jax.config.file import parse_config
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.runs.train import train


@pytest.mark.long
def test_gap_rises_and_nothing_is_nan(shared: Path, tmp_path: Path) -> None:
    lines = (shared / "data" / "gsm8k" / "train.jsonl").read_bytes().split(b"\n")[:100]
    (tmp_path / "gsm8k_100.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    geometry = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "teachers": [{"path": "builtin:demo_teacher"}],
        "student": {"geometry": geometry},
        "data": {
            "path": str(tmp_path / "gsm8k_100.jsonl"),
            "eval_rows": 10,
            "max_length": 192,
            "batch_size": 8,
        },
        "optimizer": {"student_lr": 1e-3, "warmup_steps": 5},
        "train": {"steps": 100, "log_every": 1},
        "eval": {"max_new_tokens": 0},
    }
    train(parse_config(config), ["test"])
    metrics = tmp_path / "run" / METRICS_NAME
    assert "null" not in metrics.read_text()
    steps = read_metrics(metrics, "train")
    assert len(steps) == 100
    gradients = {"grad_norm_student", "grad_norm_projector"}
    assert all(gradients <= step.keys() for step in steps), json.dumps(steps[0])
    before, after = read_metrics(metrics, "eval")
    assert after["eval_alignment_gap"] - before["eval_alignment_gap"] >= 0.1
    assert after["eval_loss"] < before["eval_loss"]
