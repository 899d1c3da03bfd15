"""Sides of a benchmark that only count: run by the harness in processes of their own."""

import os
import time
from pathlib import Path

import numpy as np

from kava_jax.bench.harness import Side
from kava_jax.errors import KavaError


def toy(folder: Path, name: str, number: float | None = None) -> Side:
    """``long`` and ``short`` work, or another that ends early; gives ``number`` if there is one."""
    print("what a library prints is no answer")
    if name == "refuses":
        raise KavaError("field=1 is not 2; use 2")
    runs = 0

    def run() -> np.ndarray | None:
        nonlocal runs
        with (folder / "order").open("a", encoding="utf-8") as order:
            order.write(name[0])
        if name == "breaks":
            raise RuntimeError("in the middle\nof its work")
        if name == "dies":
            os._exit(3)
        time.sleep(0.3 if name == "long" else 0.05)
        runs += 1
        return None if number is None else np.full(2, number)

    return Side(run, {"side": name, "tokens": 6}, lambda: {"runs": runs})
