"""What the magnitude term does behind a norm: an arm of the confirming grid with the term left on.

    python docs/results/magnitude.py > docs/results/magnitude.json

A run switches ``loss.beta`` off where the projector begins with a norm
(``training/assembly.magnitude_note``). Here the arm ``fading`` of scratch_confirm.yaml runs with
the term on, on the same seeds, rows and questions; docs/results/scratch_confirm has it off. About
ten minutes on two CPU cores.
"""

import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from kava_jax.experiments.ablation import KEEP_COMPILED, KEEP_MEMORY
from kava_jax.experiments.grid import load_grid, run_config, run_directory
from kava_jax.experiments.outcome import outcome_of, unpack
from kava_jax.experiments.results import read_results
from kava_jax.experiments.statistics import paired_difference, paired_values
from kava_jax.training import assembly

HERE = Path(__file__).resolve().parent
GRID, ARM = "scratch_confirm", "fading"


def main() -> None:
    """Run all seeds, two at a time, and print one JSON document."""
    grid, _ = load_grid(HERE.parents[1] / "configs" / "grids" / f"{GRID}.yaml")
    os.environ.update(KEEP_MEMORY | KEEP_COMPILED)
    with tempfile.TemporaryDirectory() as folder:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
            runs = list(pool.map(with_the_term, grid.seeds, [folder] * len(grid.seeds)))
    off = read_results(HERE / GRID).arms[ARM].runs
    rows = [
        {
            "seed": seed,
            "on": values["exact_match_strict"],
            "off": off[seed].values["exact_match_strict"],
            "loss_on": values["eval_loss"],
            "loss_off": off[seed].values["eval_loss"],
            "ratio_on": values["eval_mag_ratio"],
            "ratio_off": off[seed].values["eval_mag_ratio"],
            "correct_on": correct,
        }
        for seed, (values, correct) in zip(grid.seeds, runs, strict=True)
    ]
    on_SQ = np.stack([unpack(row["correct_on"]) for row in rows])
    off_SQ = np.stack([unpack(off[seed].correct["held_out"]) for seed in grid.seeds])
    answers = paired_difference(on_SQ, off_SQ)
    seeds = paired_values(on_SQ.mean(axis=1), off_SQ.mean(axis=1))
    found = {
        "grid": GRID,
        "arm": ARM,
        "runs": rows,
        "on_minus_off": answers.difference._asdict(),
        "by_seeds": seeds.difference._asdict(),
        "p": answers.p_value,
    }
    print(json.dumps(found, indent=2))


def with_the_term(seed: int, folder: str) -> tuple[dict[str, float | None], str]:
    """One run: the figures of its last evaluation, and which questions it answered rightly."""
    from kava_jax.runs.train import train

    assembly.magnitude_note = lambda config: None
    grid, base = load_grid(HERE.parents[1] / "configs" / "grids" / f"{GRID}.yaml")
    config = run_config(grid, base, ARM, seed, Path(folder))
    train(config, ["docs/results/magnitude.py"])
    outcome = outcome_of(run_directory(Path(folder), ARM, seed), seed, "")
    return outcome.values, outcome.correct["held_out"]


if __name__ == "__main__":
    main()
