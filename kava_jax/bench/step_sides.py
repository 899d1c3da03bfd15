"""The sides of ``kava bench step``: our train step, and the original's loop in PyTorch.

Each loads what ``step.write_job`` wrote, and at its end says what memory its steps took.
"""

import ctypes
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kava_jax.bench.peers import peer
from kava_jax.bench.turns import Ready

Step = Callable[[], float]


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 0


def _forget() -> None:
    """Give back what was freed since the start, and begin a new peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def ready(side: str, folder: Path) -> Ready:
    """``ours``, ``torch`` or ``torch_compile``, after one step."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    batch = dict(np.load(folder / "batch.npz"))
    make = _ours if side == "ours" else _torch
    imported, weights, step = make(folder, job, batch, side)
    first = step()
    _forget()

    def last() -> dict[str, Any]:
        return {"above_models": resident("VmHWM") - imported - weights, "weights": weights}

    return Ready({"loss": first}, step, last)


def _ours(
    directory: Path, job: dict[str, Any], batch: dict[str, np.ndarray], side: str
) -> tuple[int, int, Step]:
    """Resident bytes before loading, bytes of the models, and the step."""
    del side
    import jax

    from kava_jax.bench.pairs import one_device
    from kava_jax.config_file import parse_config
    from kava_jax.data.batches import Batch
    from kava_jax.parallel.sharding import put_batch
    from kava_jax.training.blueprint import find_models, make_blueprint

    config = parse_config(job["config"])
    mesh = one_device()
    blueprint = make_blueprint(config, mesh, find_models(config, 1), {})
    jax.block_until_ready(jax.numpy.zeros(1))
    imported = resident()
    teachers = blueprint.load_teachers()
    state = blueprint.fresh_state(_projector(directory))
    loaded = (teachers, state.params["student"], state.params["projector"])
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    compiled, rows = blueprint.jitted_step(), put_batch(Batch(**batch), mesh)  # pyright: ignore[reportArgumentType]  (host arrays)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, teachers, rows)
        jax.block_until_ready(state)
        return float(metrics["loss"].value)

    return imported, weights, step


def _projector(directory: Path) -> Any:
    from flax import nnx

    from kava_jax.alignment.projector import KVDimensionProjector

    loaded = KVDimensionProjector.load(directory / "projector.safetensors")
    return nnx.to_pure_dict(nnx.state(loaded, nnx.Param))


def _torch(
    directory: Path, job: dict[str, Any], batch: dict[str, np.ndarray], side: str
) -> tuple[int, int, Step]:
    """As ``_ours``, of the peer."""
    from kava_jax.bench.torch_loop import TorchLoop

    peer("torch")
    import transformers

    del transformers  # it is imported before memory is looked at
    imported = resident()
    loop = TorchLoop.loaded(
        directory / "student",
        directory / "teacher",
        directory / "projector.safetensors",
        layers=job["layers"],
        rates=tuple(job["rates"]),
        kv_weight=job["kv_weight"],
        compiled=side == "torch_compile",
    )
    modules = [loop.student, loop.teacher, *loop.projector.values()]
    weights = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    return imported, weights, lambda: loop.step(batch)
