"""``kava bench loss``: the KV loss with its gradient, beside PyTorch and beside bare memory."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kava_jax.bench import timing
from kava_jax.bench.peers import check_same, peer
from kava_jax.bench.turns import Facts, Taken, take_turns

TOLERANCE = 1e-4  # of the largest entry: float32 sums in other orders
SIDES = ("kava", "read_modify", "torch_eager", "torch_compiled")


class Sizes(NamedTuple):
    """Of the cache, [layers, rows, length, heads, width] of float32 for keys and for values."""

    layers: int = 28
    rows: int = 4
    length: int = 256
    heads: int = 2
    width: int = 128


def bench_loss(sizes: Sizes, sides: tuple[str, ...] = SIDES) -> dict[str, Any]:
    """``MercatorKVLoss(1, 0.01)`` of keys and values, all its metrics, and the student's gradient.

    Rows are padded. PyTorch does the original's own loss (``torch_loss``). ``read_modify`` is the
    floor: a pass that reads both caches and writes one array of the gradient's size, ``3 * bytes of
    a cache`` in all, and ``share_of_floor`` its time over ours. ``torch_compiled`` may fail, as
    torch.compile needs a C++ compiler: its words are then in ``failed``. Temporaries are what our
    compiled program needs beside its arguments and results.

    Raises KavaError without PyTorch, and when its numbers are not ours.
    """
    version = peer("torch").__version__
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")

        def check(first: Mapping[str, Facts]) -> None:
            ours = dict(np.load(folder / "kava.npz"))
            for side in first:
                if side not in ("kava", "read_modify"):
                    check_same(side, ours, dict(np.load(folder / f"{side}.npz")), TOLERANCE)

        taken = take_turns(
            "kava_jax.bench.loss_sides", sides, folder, check, optional=("torch_compiled",)
        )
    seconds = {side: own.seconds for side, own in taken.items() if isinstance(own, Taken)}
    ours = taken["kava"]
    assert isinstance(ours, Taken)
    found = timing.compared(seconds, "kava")
    cache = 2 * 4 * int(np.prod(sizes))
    return {
        "name": "loss",
        "sizes": sizes._asdict(),
        **found,
        "failed": {side: own for side, own in taken.items() if not isinstance(own, Taken)},
        "floor_bytes": 3 * cache,
        "share_of_floor": found["times_ours"]["read_modify"],
        "input_bytes": 2 * cache,
        "temporary_bytes": ours.first["temporary_bytes"],
        "temporaries_of_inputs": ours.first["temporary_bytes"] / (2 * cache),
        **timing.circumstances(),
        "torch": version,
    }
