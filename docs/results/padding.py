"""How much of what a step computes is padding, when any rows meet and when rows are bucketed?

    python docs/results/padding.py TRAIN_FILE TOKENIZER_DIR > docs/results/padding.json

Makes all batches of ``configs/qwen2.5_14b_to_1.5b_gsm8k.yaml`` from GSM8K's training rows, less
those that it holds out, and Qwen2's tokenizer, and counts in the batches themselves. A few seconds;
no model is needed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kava_jax.config.file import load_config
from kava_jax.data.batches import BatchStream
from kava_jax.data.dataset import split_examples
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoded, Encoder
from kava_jax.data.tokenizer import load_tokenizer

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "qwen2.5_14b_to_1.5b_gsm8k.yaml"


def main(text: str, tokenizer: str) -> None:
    """Count, and print one JSON document."""
    config = load_config(CONFIG)
    encoder = Encoder(load_tokenizer(tokenizer), max_length=config.data.max_length)
    training, _ = split_examples(
        load_examples,
        path=text,
        split=config.data.split,
        rows=None,
        eval_path=None,
        eval_split=None,
        eval_rows=config.data.eval_rows,
    )
    rows = encoder.encode_all(training)
    lengths = [len(row.ids) for row in rows]
    result = {
        "rows": len(rows),
        "shortest": min(lengths),
        "median": float(np.median(lengths)),
        "longest": max(lengths),
        "steps": config.train.steps,
        "batch_size": config.data.batch_size,
        "batching": {name: counted(rows, name) for name in ("shuffled", "bucketed")},
    }
    print(json.dumps(result, indent=2))


def counted(rows: Sequence[Encoded], batching: str) -> dict[str, Any]:
    """Padding and shapes of a whole run."""
    config = load_config(CONFIG, [f"data.batching={batching}"])
    stream = BatchStream(
        rows,
        batch_size=config.data.batch_size,
        max_length=config.data.max_length,
        seed=config.run.seed,
        bucketed=batching == "bucketed",
        bucket=config.data.train_bucket,
    )
    real, positions, first_steps = 0, 0, {}
    for step in range(config.train.steps):
        valid_BT = stream.batch(step).valid
        real += int(valid_BT.sum())
        positions += valid_BT.size
        first_steps.setdefault(valid_BT.shape[1], step + 1)
    return {
        "padding": round(1 - real / positions, 4),
        "positions": positions,
        "lengths": sorted(first_steps),
        "last_new_length_at_step": max(first_steps.values()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
