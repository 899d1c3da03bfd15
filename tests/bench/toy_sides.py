"""Sides of a benchmark that only count: run by ``turns`` in processes of their own."""

import time
from pathlib import Path

from kava_jax.bench.turns import TURN, Ready
from kava_jax.errors import KavaError


def ready(side: str, folder: Path) -> Ready:
    """``short``, ``long`` (half a turn more than a turn), ``refuses`` or ``breaks``."""
    print("what a library prints is no answer")
    if side == "refuses":
        raise KavaError("field=1 is not 2; use 2")
    runs = 0

    def run() -> None:
        nonlocal runs
        with (folder / "order").open("a", encoding="utf-8") as order:
            order.write(side[0])
        if side == "breaks":
            raise RuntimeError("in the middle")
        time.sleep(1.5 * TURN if side == "long" else TURN / 4)
        runs += 1

    return Ready({"side": side}, run, lambda: {"runs": runs})
