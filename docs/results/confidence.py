"""Is a key's or a value's length the model's confidence? On two models that were trained.

    python docs/results/confidence.py MODEL_DIR TEXT_FILE > docs/results/confidence.json

The model in MODEL_DIR (stories260k) reads the last 128 stories of TEXT_FILE, the built-in demo
teacher 128 generated problems of the test split. What is correlated, and what a rho is freed of:
``kava_jax/experiments/confidence.py``. Lists are [layer][head], a triple is rho and the ends of its
95 % interval. A few minutes on 2 CPU cores.

Said before looking: "length is confidence" predicts a rho below zero. It is reproduced if at least
nine heads in ten have an interval below zero for one and the same token at equal position, and not
if fewer than half do.
"""

import json
import sys
from typing import Any

import numpy as np

from kava_jax.config_file import parse_config
from kava_jax.data.batches import eval_batches
from kava_jax.data.text import Encoded
from kava_jax.data.tokenizer import pad_id
from kava_jax.experiments.confidence import (
    Found,
    Rho,
    length_and_confidence,
    take_sample,
)
from kava_jax.runs.prepare import data_loader, prepare

ROWS, BATCH, SINKS = 128, 16, 4
DEMO, PROBLEMS = "builtin:demo_teacher", "builtin:word_problems"


def main(model: str, text: str) -> None:
    """Look at both models, and print one JSON document."""
    stories = examine(model, text, max_length=512, ended=False)
    problems = examine(DEMO, PROBLEMS, max_length=128, ended=True)
    print(
        json.dumps({"sinks": SINKS, "models": {"stories260k": stories, "demo_teacher": problems}})
    )


def examine(model: str, data: str, *, max_length: int, ended: bool) -> dict[str, Any]:
    """Everything about one model; ``ended`` says whether it was trained to end a text by eos."""
    settings = {"path": data, "max_length": max_length, "batch_size": BATCH}
    run = prepare(parse_config({"student": {"path": model}, "data": settings}))
    split = "test" if data == PROBLEMS else "train"
    examples = data_loader(run)(data, split=split, rows=None)[-ROWS:]
    rows = [run.encoder.encode(example) for example in examples]  # a text is one row, cut if long
    if not ended:
        rows = [row if row.truncated else Encoded(row.ids[:-1], 0, False) for row in rows]
    batches = eval_batches(rows, BATCH, max_length=max_length, pad_id=pad_id(run.tokenizer))
    student = run.blueprint.student
    sample = take_sample(student.graph, run.blueprint.load_student(), batches)
    found: dict[str, Any] = {}
    for outcome in ("entropy", "surprisal"):
        found[outcome] = {
            name: record(length_and_confidence(sample, outcome, skip=skip))
            for name, skip in (("without_sinks", SINKS), ("with_sinks", 0))
        }
        nats = np.nanquantile(getattr(sample, outcome), [0.1, 0.5, 0.9])
        found[outcome]["nats_q10_q50_q90"] = [float(f"{value:.2g}") for value in nats]
    return found


def record(found: Found) -> dict[str, Any]:
    """One result by part, as lists over layers of lists over heads."""
    parts: dict[str, Any] = {}
    for own in found.heads:
        figures = parts.setdefault(own.part, {})
        for name, value in own._asdict().items():
            if name not in ("part", "layer", "head"):
                layers = figures.setdefault(name, [])
                layers += [[]] * (own.layer >= len(layers))
                layers[own.layer] = [*layers[own.layer], short(value)]
    return {"tokens": found.tokens, "texts": found.rows, "parts": parts}


def short(value: Rho | float | None) -> Any:
    """Three digits are more than the interval supports."""
    if isinstance(value, Rho):
        return [short(number) for number in value]
    return None if value is None else round(value, 3)


if __name__ == "__main__":
    main(*sys.argv[1:])
