"""The table of a grid's results, ``runs.jsonl``: one line per finished run, with all its answers.

Run directories are large and stay where they are made; ``grid.json`` and this are committed.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from kava_jax.errors import KavaError
from kava_jax.experiments.grid import Grid
from kava_jax.journal.manifest import read_manifest, write_atomically
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.runs.evaluate import MAIN_SET, read_answers
from kava_jax.runs.record import six_digits

GRID_NAME, RUNS_NAME = "grid.json", "runs.jsonl"
CURVE = ("eval_loss", "exact_match_strict", "eval_cos_sim", "eval_alignment_gap")
SAMPLES = 3
# Steps at the start of a run whose gradients say more of the start than of the arm.
SETTLED = 0.25


class Outcome(NamedTuple):
    """One run, a row of the table; ``None`` values are numbers that were not finite."""

    arm: str
    seed: int
    identity: str
    """Hash of all that the grid's files say of the run."""
    data: str
    """Fingerprint of its rows."""
    values: dict[str, float | None]
    """The last evaluation."""
    layers: dict[str, list[float | None]]
    curve: list[dict[str, Any]]
    correct: dict[str, str]
    """By set of questions, whether each was answered rightly by the strict rule; see ``pack``."""
    step_seconds: float | None
    """Median over logged intervals, the first left out: it holds the compilation."""
    gradient_norm: dict[str, Any] | None
    """Standard deviation of the logarithm of the student's (``log_std``), after the start."""
    samples: list[dict[str, str]]

    def answers(self, name: str = MAIN_SET) -> Bool[np.ndarray, "Q"] | None:
        """Which of a set's questions were answered rightly; None if it was not asked."""
        return unpack(self.correct[name]) if name in self.correct else None


class Results(NamedTuple):
    """What a grid's directory holds: by arm and seed in the grid's order, what has finished."""

    grid: Grid
    base: dict[str, Any]
    versions: dict[str, str]
    arms: dict[str, dict[int, Outcome]]


def outcome_of(directory: Path, arm: str, seed: int, identity: str) -> Outcome:
    """Read the row off a finished run."""
    metrics = directory / METRICS_NAME
    evaluations, train = read_metrics(metrics, "eval"), read_metrics(metrics, "train")
    last, answers = dict(evaluations[-1]), read_answers(directory)
    layers = last.pop("layers", {})
    seconds = [r["step_seconds"] for r in train[1:] if r.get("step_seconds") is not None]
    # Neither null nor 0, which has no logarithm.
    norms = [r["grad_norm_student"] for r in train if r.get("grad_norm_student")]
    logs = np.log(norms[int(SETTLED * len(norms)) :])
    asked = answers.get(MAIN_SET, [])[:SAMPLES]
    return Outcome(
        arm=arm,
        seed=seed,
        identity=identity,
        data=str(read_manifest(directory)["fingerprints"]["data"]),
        values={key: six_digits(v) for key, v in last.items() if key not in ("step", "kind")},
        layers={key: [six_digits(v) for v in row] for key, row in layers.items()},
        curve=[
            {"step": record["step"]} | {k: six_digits(record[k]) for k in CURVE if k in record}
            for record in evaluations
        ],
        correct={name: pack([row.strict for row in rows]) for name, rows in answers.items()},
        step_seconds=six_digits(statistics.median(seconds)) if seconds else None,
        gradient_norm={"log_std": six_digits(logs.std(ddof=1))} if len(logs) > 2 else None,
        samples=[{"question": a.question, "generated": a.generated, "gold": a.gold} for a in asked],
    )


def pack(bits: Sequence[bool]) -> str:
    """Bits as text, ``"5:b8"``: their number, and hex with the first bit highest."""
    # A JSON list of a thousand booleans would take some 6000 characters of a line, and this 250.
    return f"{len(bits)}:{np.packbits(np.array(bits, bool)).tobytes().hex()}"


def unpack(text: str) -> Bool[np.ndarray, "N"]:
    """The bits that :func:`pack` wrote."""
    count, digits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[: int(count)].astype(bool)


def write_runs(directory: Path, runs: Iterable[Outcome]) -> None:
    """Write the whole table, atomically, by arm and seed."""
    # The committed file must not depend on which run ended first.
    ordered = sorted(runs, key=lambda run: (run.arm, run.seed))
    lines = [json.dumps(run._asdict()) + "\n" for run in ordered]
    write_atomically(directory / RUNS_NAME, "".join(lines))


def read_runs(directory: Path) -> dict[tuple[str, int], Outcome]:
    """The table by arm and seed; empty when there is no file.

    Raises KavaError for a line that is no run, and for results that an earlier version wrote.
    """
    if old := sorted(path.name for path in directory.glob("*.json") if path.name != GRID_NAME):
        raise KavaError(
            f"{directory / old[0]} is no part of a grid's results, or was written by an earlier "
            f"version; `python docs/results/one_table.py {directory}` makes {RUNS_NAME} of those"
        )
    path, runs = directory / RUNS_NAME, []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.is_file() else ()):
        try:
            runs.append(Outcome(**json.loads(line)))
        # A TypeError is a line whose fields are of another version.
        except (ValueError, TypeError):
            raise KavaError(
                f"{path} line {number + 1} is no run of this version; restore the file, or run "
                f"`kava ablate` again with another --out"
            ) from None
    return {(run.arm, run.seed): run for run in runs}


def read_results(directory: Path) -> Results:
    """Read what ``kava ablate`` has left so far.

    Raises KavaError: there is no grid, a file is broken, or two runs with the same seed had other
    data (the arm is named).
    """
    path = directory / GRID_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        raw, base, versions = (content[key] for key in ("grid", "base", "versions"))
        grid = Grid.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise KavaError(f"{path} is missing; name a directory made by `kava ablate`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:  # pydantic's is a ValueError
        raise KavaError(
            f"{path} is no grid of this version ({type(error).__name__}); restore it, or run "
            f"`kava ablate` again"
        ) from None
    found = read_runs(directory)
    # Arms and seeds that the grid no longer has stay in the file, and do not count.
    arms = {a: {s: found[a, s] for s in grid.seeds if (a, s) in found} for a in grid.arms}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    first: dict[int, Outcome] = {}
    for run in (run for runs in arms.values() for run in runs.values()):
        known = first.setdefault(run.seed, run)
        # Differences are paired by seed, which means nothing over different rows.
        if known.data != run.data:
            raise KavaError(
                f"arms.{run.arm}: seed {run.seed} was run on other data than arms.{known.arm}; "
                f"remove its line and its run, and run `kava ablate` again"
            )
    return Results(grid, base, versions, arms)
