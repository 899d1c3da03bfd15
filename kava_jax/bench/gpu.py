"""``kava bench gpu``: a config's own step on this machine's accelerators, with random weights.

Weights and tokens are random and are made on the devices, so nothing is read or downloaded. No row
is padded and every token but the first is predicted, which is the most that the step can cost. A
small step is checked against the CPU first. The result has what the devices really used and what
the compiler said of the same program. A step that does not fit is listed under ``failed``.
"""

import importlib
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax

from kava_jax.bench import original
from kava_jax.bench.harness import Facts, Side, compare
from kava_jax.bench.pairs import Pair, batch_of, qwen2, stepping
from kava_jax.config.file import dump_config, load_config, parse_config, shipped_config
from kava_jax.errors import KavaError
from kava_jax.hf.config_json import config_from_spec
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from kava_jax.plan.chips import chip_of
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.calibrate import unmeasured
from kava_jax.runs.find_models import Found
from kava_jax.runs.prepare import models_without_weights

CHECKED = Pair(*[qwen2(4, 64, 4, 2, 128, vocabulary=512)] * 2, rows=4, length=64)
# Relative: one float32 program on two devices, and the same in bfloat16.
CLOSE = {"float32": 1e-3, "bfloat16": 5e-2}


def bench_gpu(
    config: Path | None = None, overrides: list[str] | None = None, peer: str | None = None
) -> Facts:
    """Tokens per second, MFU and memory of a config's step, by default the named job's.

    MFU is ``plan.floor.step_floor`` (model FLOPs, nothing recomputed counted) over seconds, devices
    and the chip's dense bfloat16 peak (``plan.chips``), or None. Sides are measured one after the
    other, so that the devices are free for each; ``recipe=original`` makes our step the peer's.
    Raises KavaError when the check fails, and for a config that does not fit together.
    """
    sides = ("kava", *original.peer_sides(peer))
    given = config or shipped_config("qwen2.5_14b_to_1.5b_gsm8k.yaml"), overrides or []
    # In a process of its own: what JAX takes of a GPU there is free again for the sides.
    checks = compare({"check": _check})["facts"]
    cases = {}
    for side in sides:
        make = {"kava": _ours, "torch_eager": _torch}.get(side, partial(_torch, compiled=True))
        cases[side] = found = compare({side: partial(make, *given)}, optional=(side,))
        if side == "kava" and not found["facts"]:  # there was no step to be compiled
            raise KavaError(found["failed"][side])
        speeds, own = found.get("flops_per_second"), found["facts"].get(side)
        chip = own and chip_of(own["device"])
        # By the side's own devices: PyTorch runs on one, and ours on all of them.
        found["mfu"] = speeds[side] / chip.flops / own["devices"] if chip and speeds else None
    return {"config": given[0].name, "overrides": given[1], "checks": checks, "cases": cases}


def random_weights(path: Path, overrides: list[str]) -> Blueprint:
    """The config's run over all devices of this process, every weight of it drawn at random."""
    raw = dump_config(unmeasured(load_config(path, overrides)))
    for teacher in raw["teachers"]:
        teacher["control"] = "random"
    config = parse_config(raw)
    models = models_without_weights(config)
    models = models._replace(student=Found(None, models.student.spec))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    return make_blueprint(config, mesh, models, {})


def _ours(path: Path, overrides: list[str]) -> Side:
    """The config's step over all devices."""
    run = random_weights(path, overrides)
    batch, facts = batch_of(run, prompt=1)
    step, memory = stepping(run, batch)
    facts |= {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": dict(run.mesh.shape),
        "attention": run.attending,
        # How much memory JAX may take decides which batches have room.
        "environment": {k: v for k, v in os.environ.items() if k.startswith("XLA_PYTHON_CLIENT")},
        "compiled": memory._asdict() | {"peak": sum(memory)},
    }
    losses: list[float] = []

    def work() -> None:
        losses.append(step())
        if not math.isfinite(losses[-1]):
            raise KavaError(f"the loss of step {len(losses)} is not finite")

    def last() -> Facts:
        # CPU devices keep no such statistics and give None.
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        names = {"bytes_in_use", "peak_bytes_in_use", "bytes_limit"} & stats[0].keys()
        memory = {name: max(own[name] for own in stats) for name in names}  # the fullest device's
        return {"losses": losses, "device_memory": memory}

    return Side(work, facts, last)


def _torch(path: Path, overrides: list[str], compiled: bool = False) -> Side:
    """The original's loop with the config's models, on one device."""
    jax.config.update("jax_platforms", "cpu")  # the GPU is PyTorch's; JAX only counts FLOPs here
    torch: Any = importlib.import_module("torch")
    on_gpu = torch.cuda.is_available()
    run = random_weights(path, overrides)
    (teacher,) = run.teachers.values()
    # What ``auto`` is on PyTorch's device, not on JAX's.
    dtype: Any = run.config.train.dtype.replace("auto", "bfloat16" if on_gpu else "float32")
    student, other = (config_from_spec(s, dtype=dtype) for s in (run.student_spec, teacher.spec))
    modules = original.random(student, other, dtype, "cuda" if on_gpu else "cpu")
    layers = [row[0] for row in teacher.layer_map.teacher_layers]
    step = original.train_step(modules, layers, compiled, dtype)
    batch, facts = batch_of(run, prompt=1)
    device = torch.cuda.get_device_name() if on_gpu else "cpu"

    def last() -> Facts:
        return {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}

    return Side(lambda: step(batch), facts | {"device": device, "devices": 1}, last)


def _check() -> Side:
    """Loss and gradient norms of a small step on this device, against float32 on a CPU."""
    wanted, found = _figures("float32", jax.devices("cpu")[0]), {}
    for dtype, close in CLOSE.items():
        figures = zip(_figures(dtype, jax.devices()[0]), wanted, strict=True)
        found[dtype] = max(abs(a / b - 1) for a, b in figures)
        if not found[dtype] < close:
            raise KavaError(f"{dtype} is off by {found[dtype]:.2e}; {close:g} is allowed")
    # The errors are facts, and there is nothing to time.
    return Side(lambda: None, found)


def _figures(dtype: str, device: Any) -> list[float]:
    def run(kind: str) -> Blueprint:
        wanted = {"train.dtype": kind, "optimizer.warmup_steps": 0}
        return CHECKED.run(wanted, device=device)

    # By default GPUs multiply float32 in TF32 and TPUs in bfloat16. That would hide errors of
    # the program behind those of the products.
    with jax.default_matmul_precision("float32"):
        # Weights drawn in another dtype are other weights, so they are drawn in one and cast.
        teachers = jax.tree.map(lambda x: x.astype(dtype), run("float32").load_teachers())
        made = run(dtype)
        batch = put_batch(batch_of(made, prompt=16)[0], made.mesh)
        _, metrics = made.jitted_step()(made.fresh_state(), teachers, batch)
    names = ("loss", "ce", "grad_norm_student", "grad_norm_projector")
    return [float(metrics[name].value) for name in names]
