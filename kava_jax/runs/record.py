"""What a run's manifest says for people: models, rows and results."""

import math
from collections.abc import Mapping
from typing import Any

from kava_jax.data.dataset import Dataset
from kava_jax.journal.verdict import verdict
from kava_jax.models.spec import DecoderSpec
from kava_jax.runs.prepare import Run

# Final figures by their names in metrics.jsonl.
FIGURES = {
    "held_out_loss": "eval_loss",
    "exact_match": "exact_match_strict",
    "cosine": "eval_cos_sim",
    "cosine_of_unrelated_examples": "eval_cos_shuffled",
    "alignment_gap": "eval_alignment_gap",
}


def facts(run: Run, dataset: Dataset) -> dict[str, Any]:
    """The run's models, with each teacher's layers by student layer, and its numbers of rows."""
    blueprint = run.blueprint
    teachers = {
        name: _geometry(teacher.spec) | {"layer_map": dict(teacher.layer_map.rows())}
        for name, teacher in blueprint.teachers.items()
    }
    return {
        "models": {"student": _geometry(blueprint.student_spec), "teachers": teachers},
        "rows": {
            "training": len(dataset.stream.rows),
            "held_out": len(dataset.held_out.measured),
        },
    }


def _geometry(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "family": spec.family,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocabulary": spec.vocab_size,
    }


def results(evaluation: Mapping[str, float]) -> dict[str, Any]:
    """Final figures to six digits, and the cosine's verdict."""
    values = {name: six_digits(evaluation.get(key)) for name, key in FIGURES.items()}
    sets = {
        key: six_digits(value)
        for key, value in evaluation.items()
        if key.endswith(("/eval_loss", "/exact_match_strict"))
    }
    cosine = values["cosine"]
    word = None if cosine is None else verdict(cosine, values["cosine_of_unrelated_examples"])
    return values | sets | {"verdict": word}


def six_digits(value: float | int | None) -> float | None:
    """As it is kept in a record: more digits would be noise. None where it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
