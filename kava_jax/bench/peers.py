"""What a benchmark stands beside: another package, the same work done plainly, the bare machine.

A peer does the same work and gives the same numbers, which is checked before anything is timed.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kava_jax.bench.timing import alternate, compared
from kava_jax.errors import KavaError

# Where the package that holds a module has another name.
PACKAGES = {"tunix": "google-tunix"}


def peer(module: str) -> Any:
    """A module of a package that is compared with and not depended on; KavaError without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0]
        package = PACKAGES.get(name, name)
        raise KavaError(
            f"this benchmark compares with {name}, which is not installed; pip install {package}"
        ) from None


def check_same(what: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Raise KavaError unless two trees of arrays agree.

    That is ``max|ours - theirs| <= tolerance * max|theirs|`` of each array.
    """
    for ours_, theirs_ in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (ours_, theirs_))
        furthest, largest = float(np.abs(a - b).max()), float(np.abs(b).max())
        if not furthest <= tolerance * largest:
            raise KavaError(
                f"{what} differs from ours by {furthest:.3g} where its largest is {largest:.3g}; "
                f"it does other work, so its time would say nothing"
            )


def beside(work: Mapping[str, Callable[[], Any]], ours: str) -> dict[str, Any]:
    """Everyone's seconds in alternating rounds, and their medians as multiples of ours."""

    def waited(run: Callable[[], Any]) -> Callable[[], None]:
        def run_and_wait() -> None:
            jax.block_until_ready(run())

        return run_and_wait

    return compared(alternate({name: waited(run) for name, run in work.items()}), ours)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """What a compiled program needs beside its arguments and results."""
    needed = program.memory_analysis()
    assert needed is not None  # every backend we know tells
    return needed.temp_size_in_bytes


def product_speed(width: int) -> float:
    """FLOP/s of a plain float32 matrix product, [width, width] by the same: 2 * width^3 of them."""
    square = jax.random.normal(jax.random.key(0), (width, width))
    product = jax.jit(jnp.matmul)
    found = beside({"product": lambda: product(square, square)}, "product")
    return 2.0 * width**3 / found["seconds"]["product"]["median"]
