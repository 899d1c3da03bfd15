"""Every RoPE scaling from a teacher and a student through training to transformers' own reading."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kava_jax.config.file import load_config
from kava_jax.hf.load import read_spec
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.runs.smoke import smoke_config
from tests.tiny import CONFIG, kava, write_config, write_model, write_rows
from tests.tiny_models import load_decoder
from tests.tolerances import TOL

torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")

HEAD_DIM, ORIGINAL, LONGEST = 8, 16, 64
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def geometry(scaling: str) -> dict:
    """A dynamic model's longest row is its original length."""
    longest = ORIGINAL if scaling == "dynamic" else LONGEST
    return {
        "model_type": "llama",
        "head_dim": HEAD_DIM,
        "rope_scaling": SCALINGS[scaling],
        "max_position_embeddings": longest,
    }


def write_attentive(directory: Path, geometry: dict) -> None:
    """A model whose attention is far from even, so that a wrong angle shows."""
    write_model(directory, seed=2, **geometry)
    tensors = load_file(directory / "model.safetensors")
    scale = {name: 8 if "q_proj" in name or "k_proj" in name else 2 for name in tensors}
    larger = {name: tensor * scale[name] for name, tensor in tensors.items()}
    save_file(larger, directory / "model.safetensors", metadata={"format": "pt"})


def our_logits(directory: str, tokens: np.ndarray) -> np.ndarray:
    model, valid = load_decoder(Path(directory)), jnp.ones((1, len(tokens)), bool)
    positions = token_positions(valid)
    mask = attention_mask(positions, positions, valid, model.spec.windows)
    return np.asarray(model.logits(model(jnp.asarray(tokens)[None], positions, mask)[0][0]))


@pytest.mark.long
@pytest.mark.parametrize("scaling", SCALINGS)
def test_import_train_export_transformers(scaling, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    kinds = list(SCALINGS)
    of_teacher = kinds[(kinds.index(scaling) + 1) % len(kinds)]
    write_model(tmp_path / "teacher", seed=1, num_hidden_layers=3, **geometry(of_teacher))
    write_attentive(tmp_path / "student", geometry(scaling))
    write_rows(tmp_path / "data.jsonl", 40)
    train = {"steps": 3, "log_every": 1, "eval_every": None, "checkpoint_every": 3}
    train |= {"diagnose_every": None}
    write_config(
        tmp_path / "tiny.yaml",
        train=train,
        data=CONFIG["data"] | {"max_length": 48},
        eval=CONFIG["eval"] | {"max_new_tokens": 0},
        optimizer={"student_lr": 0.1, "warmup_steps": 0},
    )
    assert kava(capsys, "train", "tiny.yaml").code == 0
    assert kava(capsys, "export", "run", "--out", "out", "--dtype", "float32").code == 0
    assert read_spec(tmp_path / "out") == read_spec(tmp_path / "student")
    for length in (9, ORIGINAL, 41):
        tokens = np.random.default_rng(length).integers(0, 512, length)
        theirs = AutoModelForCausalLM.from_pretrained("out").eval()
        rope = theirs.config.rope_parameters
        assert {key: rope[key] for key in SCALINGS[scaling]} == SCALINGS[scaling]
        with torch.no_grad():
            want = theirs(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
        np.testing.assert_allclose(our_logits("out", tokens), want, atol=TOL["parity"])
    # Both would show in the last and longest row: no training, no scaling.
    config = json.loads(Path("out/config.json").read_text())
    plain = {"rope_scaling": None, "rope_parameters": None}
    Path("out/config.json").write_text(json.dumps(config | plain))
    for other in ("student", "out"):
        assert np.abs(our_logits(other, tokens) - want).max() > 100 * TOL["parity"]


def test_a_smoke_run_keeps_as_many_longrope_factors_as_it_keeps_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    factors = {"short_factor": [1.0] * 32, "long_factor": [float(i + 1) for i in range(32)]}
    rope = {"rope_scaling": SCALINGS["longrope"] | factors, "head_dim": 64}
    write_model(tmp_path / "teacher", **geometry("longrope") | rope)
    write_model(tmp_path / "student", **geometry("longrope") | rope)
    write_rows(tmp_path / "data.jsonl", 40)
    write_config(tmp_path / "tiny.yaml")
    smoke = smoke_config(load_config(tmp_path / "tiny.yaml"))
    config = json.loads((Path(str(smoke.student.path)) / "config.json").read_text())
    assert config["head_dim"] == 8
    assert config["rope_scaling"]["long_factor"] == [1.0, 9.0, 17.0, 25.0]
