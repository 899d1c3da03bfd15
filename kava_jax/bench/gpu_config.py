"""``kava bench gpu --config CONFIG``: that config's own step on this machine's accelerators.

Weights and tokens are random and are made on the devices, so nothing is read or downloaded. No row
is padded and every token but the first is predicted, which is the most that the step can cost. What
the devices really used stands beside what the compiler said of the same program, and beside what
``kava plan`` says without the devices.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kava_jax.bench.pairs import random_batch
from kava_jax.bench.timing import circumstances, summary
from kava_jax.config_file import dump_config, load_config, parse_config
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from kava_jax.plan.chips import chip_of
from kava_jax.plan.compiled import memory_of
from kava_jax.plan.floor import step_floor
from kava_jax.runs.calibrate import unmeasured
from kava_jax.runs.geometry import models_without_weights
from kava_jax.training.blueprint import Blueprint, Found, make_blueprint

STEPS = 8


def bench_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Memory and speed of the config's step over all devices of this process.

    MFU is ``plan.floor.step_floor`` over seconds, devices and the chip's dense bfloat16 peak; None
    for a device that ``plan.chips`` does not know. A step that finds no memory stands in the result
    as ``failed``, beside what the compiler had said. Raises KavaError for what does not fit
    together.
    """
    run = random_weights(path, overrides)
    rows, length = run.config.data.batch_size, run.config.data.max_length
    device, count = jax.devices()[0].device_kind, jax.device_count()
    chip = chip_of(device)
    found = {
        "name": "gpu",
        "config": path.name,
        "overrides": overrides,
        "mesh": dict(run.mesh.shape),
        "rows": rows,
        "length": length,
        "attention": run.attending,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("XLA_PYTHON_CLIENT")},
        "target": target_config(),
    }
    batch = put_batch(random_batch(rows, length, _vocabulary(run), 1), run.mesh)
    with ThreadPoolExecutor() as beside:  # both compile for a minute, on cores of their own
        plan = chip and beside.submit(_planned, path, overrides, chip.name, count)
        shapes = (run.abstract_state(), run.abstract_teachers(), batch)
        compiled = run.jitted_step().lower(*shapes).compile()
        found["plan"] = plan and plan.result()
    memory = memory_of(compiled)
    found["compiled"] = memory._asdict() | {"peak": memory.peak}
    try:
        found |= _stepped(run, compiled, batch)
    except jax.errors.JaxRuntimeError as error:
        found["failed"] = str(error).splitlines()[0][:500]
    else:
        floor = step_floor(run, rows, length, rows * (length - 1)).total
        median = found["step_seconds"]["median"]
        found |= {
            "tokens_per_second": rows * length / median,
            "floor_flops": floor,
            "mfu": floor / median / chip.flops / count if chip else None,
        }
    return found | {"device_memory": _device_memory()} | circumstances()


def random_weights(path: Path, overrides: list[str]) -> Blueprint:
    """The config's run over all devices of this process, every weight of it drawn at random."""
    raw = dump_config(unmeasured(load_config(path, overrides)))
    for teacher in raw["teachers"]:
        teacher["control"] = "random"
    config = parse_config(raw)
    models = models_without_weights(config)
    models = models._replace(student=Found(None, models.student.spec))
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    return make_blueprint(config, mesh, models, {})


def target_config() -> str | None:
    """What the compiler knows of this machine's GPU, as text; None where it writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        one = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((4,), "float32"))
        one.compile({"xla_dump_to": folder})
        texts = sorted(Path(folder).glob("*gpu_target_config.pbtxt"))
        return texts[0].read_text(encoding="utf-8") if texts else None


def _vocabulary(run: Blueprint) -> int:
    specs = [run.student_spec, *(teacher.spec for teacher in run.teachers.values())]
    return min(spec.vocab_size for spec in specs)


def _stepped(run: Blueprint, compiled: Callable[..., Any], batch: Any) -> dict[str, Any]:
    """Seconds of steps after one that is not counted, and what was held before the first."""
    teachers = run.load_teachers()
    state = jax.block_until_ready(run.fresh_state())
    before = _device_memory()
    seconds, losses = [], []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        state, metrics = compiled(state, teachers, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
        losses.append(float(metrics["loss"].value))
    return {
        "before_steps": before,
        "step_seconds": summary(seconds[1:]),
        "first_step_seconds": seconds[0],
        "losses": [loss if np.isfinite(loss) else None for loss in losses],
    }


def _device_memory() -> dict[str, int]:
    """The fullest device's bytes: in use, the most there ever were, and what it may use."""
    wanted = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return {name: max(own[name] for own in stats) for name in wanted if name in stats[0]}


def _planned(path: Path, overrides: list[str], chip: str, devices: int) -> dict[str, Any]:
    """``kava plan`` of the same step, in a process that sees no accelerator."""
    main = "from kava_jax.cli import main; main()"
    asked = ["plan", str(path), *overrides, "--chip", chip, "--devices", str(devices), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", main, *asked],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["nothing was said"]
        return {"failed": words[-1][:300]}
    return json.loads(done.stdout)
