"""The whole train step: ``kava bench step``, ``remat`` and ``scaling``."""

import ctypes
import gc
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kava_jax.bench import original
from kava_jax.bench.harness import Facts, Side, compare
from kava_jax.bench.pairs import Pair, batch_of, qwen2, stepping, write_model
from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Params
from kava_jax.plan.compiled import compile_step

# The original's recipe in the original's frame: post-RoPE vectors, no dropout.
FRAME = {
    "recipe": "original",
    "train.dtype": "float32",
    # Each library draws dropout its own way, and then first losses could not agree.
    "projector.dropout": 0.0,
    "loss.key_space": "post_rope",
    "loss.sink_tokens": 0,
    # The PyTorch loop has no schedule: constant rates, from the first step on.
    "optimizer.min_lr_ratio": 1.0,
    "optimizer.warmup_steps": 0,
}
TOLERANCE = 1e-4  # relative, of the first loss
# Deep enough that activations, and not the vocabulary, take the memory.
DEEP = Pair(
    teacher=qwen2(8, 512, 8, 4, 1408, vocabulary=8192),
    student=qwen2(16, 256, 8, 2, 704, vocabulary=8192),
    rows=8,
)
# The sizes that are tried, one axis at a time around the middle.
MIDDLE = {"rows": 4, "length": 256, "depth": 4, "width": 128, "vocabulary": 4096}
AXES = {
    "length": (128, 256, 512, 1024, 2048),
    "depth": (2, 4, 8, 16, 32),
    "rows": (1, 4, 16, 64),
}


def bench_step(peer: str | None = None, pair: Pair = Pair()) -> Facts:  # noqa: B008 (immutable)
    """Seconds, tokens and FLOPs per second, and memory of the step, and the original's loop.

    All sides load the same weights and read the same batch, so their first losses have to agree.
    ``above_models`` is what a process holds at most during its steps, beyond the libraries and the
    models' weights: gradients, moments, activations. ``torch_compiled`` may fail, as torch.compile
    needs a C++ compiler. Raises KavaError without PyTorch, and when the first losses differ.
    """
    peers = original.peer_sides(peer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "teacher", pair.teacher, seed=0)
        write_model(folder / "student", pair.student, seed=1)
        run = pair.run(FRAME, folder)
        batch, facts = batch_of(run, pair.length // 2)
        assert run.projector is not None
        projector = jax.tree.map(np.asarray, run.projector.fresh(1))
        layers = [row[0] for row in run.teachers["teacher"].layer_map.teacher_layers]
        sides = {"kava": partial(_ours, folder, pair, batch, projector, facts)}
        for side in peers:
            compiled = side == "torch_compiled"
            sides[side] = partial(_torch, folder, batch, projector, facts, layers, compiled)
        found = compare(sides, TOLERANCE, optional=("torch_compiled",))
    return {"pair": pair._asdict(), **found}


def bench_remat(pair: Pair = DEEP) -> Facts:
    """Seconds, temporaries (bytes that the program needs) and FLOPs of the step by policy."""
    sides = {policy: partial(_recomputing, policy, pair) for policy in ("none", "dots", "full")}
    return {"pair": pair._asdict(), **compare(sides, TOLERANCE)}


def bench_scaling(
    axes: Mapping[str, tuple[int, ...]] = AXES, middle: Mapping[str, int] = MIDDLE
) -> Facts:
    """Seconds per token of the train step over each axis, and the floor's FLOPs per token.

    ``exponent`` is the slope of log(seconds per token) over log(size), by least squares: 0 is a
    cost that does not depend on the size, 1 one in proportion to it. Both models are alike.
    """
    curves = {}
    for axis, sizes in axes.items():
        found = compare({str(n): partial(_sized, **{**middle, axis: n}) for n in sizes})
        seconds = [1 / speed for speed in found["tokens_per_second"].values()]
        flops = [own["flops"] / own["tokens"] for own in found["facts"].values()]
        curves[axis] = {
            "sizes": sizes,
            "seconds_per_token": seconds,
            "flops_per_token": flops,
            "exponent": exponent(sizes, seconds),
            "floor_exponent": exponent(sizes, flops),
        }
    return {"middle": dict(middle), "curves": curves}


def _ours(folder: Path, pair: Pair, batch: Batch, projector: Params, facts: Facts) -> Side:
    run = pair.run(FRAME, folder)
    # The backend starts with its first array; what it takes belongs to the libraries.
    jax.block_until_ready(jnp.zeros(1))
    imported = resident()
    leaves = jax.tree.leaves((run.abstract_teachers(), run.abstract_state().params))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return _watched(stepping(run, batch, projector)[0], facts, imported, weights)


def _torch(
    folder: Path, batch: Batch, projector: Params, facts: Facts, layers: list[int], compiled: bool
) -> Side:
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401 (before memory is looked at)

    imported = resident()
    modules = original.loaded(folder, projector["pairs"]["teacher"])
    step = original.train_step(modules, layers, compiled)
    parameters = [p for m in (*modules[:2], *modules[2].values()) for p in m.parameters()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return _watched(lambda: step(batch), facts, imported, weights)


def _watched(step: Callable[[], float], facts: Facts, imported: int, weights: int) -> Side:
    """The step, and the memory that it takes after the first time."""
    losses: list[float] = []

    def run() -> Any:
        losses.append(step())
        if len(losses) == 1:
            # Give back what was freed since the start, and begin a new peak.
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            # 5 resets the peak that VmHWM gives (man 5 proc).
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return losses[0]

    def last() -> Facts:
        above = resident("VmHWM") - imported - weights
        return {"first_loss": losses[0], "above_models": above, "weights": weights}

    return Side(run, facts, last)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    return 1024 * int(found[1]) if found else 0


def _recomputing(policy: str, pair: Pair) -> Side:
    run = pair.run({"student.remat": policy})
    work, memory = compile_step(run, pair.rows, pair.length)
    batch, facts = batch_of(run, pair.length // 2)
    # The FLOPs that are really done, with what is recomputed.
    facts |= {"temporaries": memory.temporaries, "flops": work.flops}
    return Side(stepping(run, batch)[0], facts)


def exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
    """Slope of log(cost) over log(size) by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def _sized(rows: int, length: int, depth: int, width: int, vocabulary: int) -> Side:
    model = qwen2(depth, width, 4, 2, 3 * width, vocabulary)
    run = Pair(model, model, rows, length).run()
    batch, facts = batch_of(run, length // 2)
    # Models of other sizes have other losses.
    return Side(stepping(run, batch)[0], facts, compared=False)
