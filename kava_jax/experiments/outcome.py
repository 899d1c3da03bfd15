"""What is kept of a finished run of a grid: one small record, enough for tables, tests and curves.

Run directories are large and stay where they are made; records are what is committed.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kava_jax.runs.evaluate import MAIN_SET, read_answers
from kava_jax.runs.record import six_digits
from kava_jax.training.manifest import read_manifest
from kava_jax.training.metrics_file import METRICS_NAME, read_metrics

CURVE = ("eval_loss", "exact_match_strict", "eval_cos_sim", "eval_alignment_gap")
SAMPLES = 3
# Steps at the start of a run whose gradients say more of the start than of the arm.
SETTLED = 0.25


class Outcome(NamedTuple):
    """One run's record; ``None`` values are numbers that were not finite."""

    seed: int
    identity: str
    """Hash of all that the grid's files say of the run."""
    data: str
    """Fingerprint of its rows."""
    values: dict[str, float | None]
    """The last evaluation."""
    layers: dict[str, list[float | None]]
    curve: list[dict[str, float | None]]
    correct: dict[str, str]
    """By set of questions: their number and bits as hex, ``"1024:f3.."``, strict rule."""
    step_seconds: float | None
    gradient_norm: dict[str, float] | None
    samples: list[dict[str, str]]


def outcome_of(directory: Path, seed: int, identity: str) -> Outcome:
    """Read the record off a finished run."""
    metrics = directory / METRICS_NAME
    evaluations = read_metrics(metrics, "eval")
    last = dict(evaluations[-1])
    layers = last.pop("layers", {})
    answers = read_answers(directory)
    train = read_metrics(metrics, "train")
    return Outcome(
        seed=seed,
        identity=identity,
        data=str(read_manifest(directory)["fingerprints"]["data"]),
        values={key: six_digits(v) for key, v in last.items() if key not in ("step", "kind")},
        layers={key: [six_digits(v) for v in row] for key, row in layers.items()},
        curve=[
            {"step": record["step"]}
            | {key: six_digits(record[key]) for key in CURVE if key in record}
            for record in evaluations
        ],
        correct={name: pack([row.strict for row in rows]) for name, rows in answers.items()},
        step_seconds=_step_seconds(train),
        gradient_norm=_gradient_norm(train),
        samples=[
            {"question": row.question, "generated": row.generated, "gold": row.gold}
            for row in answers.get(MAIN_SET, [])[:SAMPLES]
        ],
    )


def pack(bits: Sequence[bool]) -> str:
    """Bits as text, ``"5:b8"``: their number, and hex with the first bit highest."""
    return f"{len(bits)}:{np.packbits(np.array(bits, bool)).tobytes().hex()}"


def unpack(text: str) -> np.ndarray:
    """The bits that :func:`pack` wrote, bool [N]."""
    count, digits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[: int(count)].astype(bool)


def _step_seconds(train: Sequence[Mapping[str, Any]]) -> float | None:
    """Median over logged intervals, the first left out: it holds the compilation."""
    seconds = [r["step_seconds"] for r in train[1:] if r.get("step_seconds") is not None]
    return six_digits(statistics.median(seconds)) if seconds else None


def _gradient_norm(train: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Median of the student's gradient norm, and the std of its logarithm, after the start."""
    norms = [r["grad_norm_student"] for r in train if r.get("grad_norm_student")]
    logs = np.log(norms[int(SETTLED * len(norms)) :])
    if len(logs) < 3:
        return None
    return {
        "median": float(f"{np.exp(np.median(logs)):.6g}"),
        "log_std": float(f"{logs.std(ddof=1):.6g}"),
        "intervals": len(logs),
    }
