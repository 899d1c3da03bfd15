"""Pairs of other families through a whole run: import, train, evaluate, export, transformers."""

from pathlib import Path

import numpy as np
import pytest

from kava_jax.hf.load import read_spec
from tests.runs.test_ropes import our_logits
from tests.tiny import CONFIG, kava, write_config, write_model, write_rows
from tests.tolerances import TOL

torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")

SCALED = {"query_pre_attn_scalar": 3, "sliding_window": 5}
FAMILIES = {
    "gemma2": SCALED | {"model_type": "gemma2", "head_dim": 6, "attn_logit_softcapping": 1.5},
    "gemma3": SCALED | {"model_type": "gemma3_text", "head_dim": 6, "sliding_window_pattern": 2},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.5, "sliding_window": 7},
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "granite": {"model_type": "granite", "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}
# Teacher, student, and what a loss needs of both: masks, rotations, caps, and outputs of layers.
RUNS = {
    "attention": ("gemma2", "gemma3", {"match": "attention", "key_space": "post_rope"}),
    "logits": ("qwen2", "gemma2", {"kl_weight": 1.0}),
    "rotations": ("smollm3", "phi3", {"key_space": "post_rope"}),
    "outputs": ("granite", "olmo2", {"match": "block_outputs"}),
    "handed over": ("gemma3", "smollm3", {"kv_weight": 0, "handoff": {"alone_share": 0.5}}),
    "experts": ("qwen3_moe", "gemma2", {"kl_weight": 1.0}),
    "answered": ("phi3", "granite", {"handoff": {"reader": "student"}}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_import_train_export_transformers(name, tmp_path, monkeypatch, capsys) -> None:
    from transformers import AutoModelForCausalLM

    teacher, student, loss = RUNS[name]
    monkeypatch.chdir(tmp_path)
    depth = {"num_hidden_layers": 3, "max_position_embeddings": 256}
    write_model(tmp_path / "teacher", seed=1, **FAMILIES[teacher] | depth)
    write_model(tmp_path / "student", seed=2, **FAMILIES[student])
    write_rows(tmp_path / "data.jsonl", 40)
    write_config(
        tmp_path / "tiny.yaml",
        loss=loss,
        data=CONFIG["data"] | {"max_length": 48},
        train={"steps": 3, "log_every": 1, "eval_every": 3, "checkpoint_every": 3},
        optimizer={"student_lr": 0.05, "warmup_steps": 0},
    )
    assert kava(capsys, "train", "tiny.yaml").code == 0
    ended = kava(capsys, "export", "run", "--out", "out", "--dtype", "float32")
    assert ended.code == 0, ended.err
    assert read_spec(tmp_path / "out") == read_spec(tmp_path / "student")
    tokens = np.random.default_rng(0).integers(0, 512, 30)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained("out").eval()
        want = theirs(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(our_logits("out", tokens), want, atol=TOL["parity"])
    assert np.abs(our_logits("student", tokens) - want).max() > 100 * TOL["parity"]
    assert Path("run/answers.jsonl").is_file()
