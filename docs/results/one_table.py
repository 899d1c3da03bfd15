"""Makes ``runs.jsonl``, one line per run, of the files per arm that earlier versions wrote.

    python docs/results/one_table.py DIRECTORY

Every figure is copied as it is; the files per arm are removed. Run once per directory.
"""

import json
import sys
from pathlib import Path

from kava_jax.experiments.results import GRID_NAME, Outcome, read_runs, write_runs


def main(directory: Path) -> None:
    """Convert one directory; lines that its table has already stay, but for the same runs."""
    old = [path for path in directory.glob("*.json") if path.name != GRID_NAME]
    converted = {}
    for path in old:
        content = json.loads(path.read_text(encoding="utf-8"))
        for run in content["runs"]:
            converted[content["arm"], run["seed"]] = Outcome(arm=content["arm"], **run)
    for path in old:
        path.rename(path.with_suffix(".old"))
    write_runs(directory, (read_runs(directory) | converted).values())
    for path in old:
        path.with_suffix(".old").unlink()
    print(f"{directory}: {len(converted)} runs of {len(old)} arms")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
