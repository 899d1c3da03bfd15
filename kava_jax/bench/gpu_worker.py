"""One measurement of ``kava bench gpu``: ``python -m kava_jax.bench.gpu_worker SIDE JOB``.

SIDE is ``check``, ``ours``, ``torch`` or ``torch_compile``; JOB is JSON. Prints one line of JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kava_jax.bench.pairs import random_batch, random_run
from kava_jax.bench.peers import peer
from kava_jax.plan.chips import chip_of

CHECKED = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
# Relative: one float32 program on two devices, the same in bfloat16, and against float64.
CLOSE = {"float32": 1e-3, "bfloat16": 5e-2, "mercator": 1e-5}


def main() -> None:
    """Measure, print."""
    side, job = sys.argv[1], json.loads(sys.argv[2])
    found = check() if side == "check" else measured(side, job)
    print(json.dumps(found))


def check() -> dict[str, Any]:
    """Relative differences to references; exits with words when one is too large."""
    found = {
        "mercator": _mercator_difference(),
        "float32": _step_difference("float32"),
        "bfloat16": _step_difference("bfloat16"),
    }
    for name, difference in found.items():
        if not difference < CLOSE[name]:
            raise SystemExit(f"{name} is off by {difference:.2e}; {CLOSE[name]:g} is allowed")
    return found


def measured(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, tokens per second, MFU and peak memory of one side."""
    make = _ours if side == "ours" else _torch
    step, floor, peak, device = make(job, side)
    step()
    seconds = []
    for _ in range(job["steps"]):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    chip = chip_of(device)
    return {
        "device": device,
        "step_seconds": median,
        "tokens_per_second": job["rows"] * job["length"] / median,
        "floor_flops": floor,
        "mfu": floor / median / chip.flops if chip else None,
        "peak_bytes": peak(),
    }


Made = tuple[Callable[[], None], float, Callable[[], int | None], str]


def _run_of(job: dict[str, Any]) -> Any:
    """The run of a job: everything but attention is saved by remat, as the named config has it."""
    overrides = {"student.dtype": job["dtype"], "teachers.0.dtype": job["dtype"]}
    overrides |= {"student.remat": "dots", "loss.beta": 0.01, "optimizer.warmup_steps": 0}
    return random_run(job["teacher"], job["student"], rows=job["rows"], overrides=overrides)


def _ours(job: dict[str, Any], side: str) -> Made:
    del side
    import jax

    from kava_jax.parallel.sharding import put_batch
    from kava_jax.plan.floor import step_floor

    run = _run_of(job)
    state, teachers = run.fresh_state(), run.load_teachers()
    vocabulary = min(job["student"]["vocab_size"], job["teacher"]["vocab_size"])
    half = job["length"] // 2
    batch = put_batch(random_batch(job["rows"], job["length"], vocabulary, half), run.mesh)
    compiled = run.jitted_step()

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, teachers, batch)
        if not np.isfinite(float(metrics["loss"].value)):
            raise SystemExit("the loss is not finite")
        jax.block_until_ready(state)

    def peak() -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    floor = step_floor(run, job["rows"], job["length"], job["rows"] * half).total
    return step, floor, peak, jax.devices()[0].device_kind


def _torch(job: dict[str, Any], side: str) -> Made:
    from kava_jax.bench.torch_loop import TorchLoop
    from kava_jax.plan.floor import step_floor

    torch = peer("torch")
    on_gpu = torch.cuda.is_available()
    run = _run_of(job)
    link = run.teachers["teacher"]
    loop = TorchLoop.random(
        job["student"],
        job["teacher"],
        layers=[row[0] for row in link.layer_map.teacher_layers],
        compiled=side == "torch_compile",
        device="cuda" if on_gpu else "cpu",
        dtype=job["dtype"],
    )
    vocabulary = min(job["student"]["vocab_size"], job["teacher"]["vocab_size"])
    half = job["length"] // 2
    rows = random_batch(job["rows"], job["length"], vocabulary, half)
    batch = {name: np.asarray(x) for name, x in rows._asdict().items()}

    def step() -> None:
        loop.step(batch)

    def peak() -> int | None:
        return torch.cuda.max_memory_allocated() if on_gpu else None

    floor = step_floor(run, job["rows"], job["length"], job["rows"] * half).total
    return step, floor, peak, torch.cuda.get_device_name() if on_gpu else "cpu"


def _step_difference(dtype: str) -> float:
    """Loss and gradient norms of one small step on this device, against float32 on the CPU."""
    import jax

    found = _figures(dtype, jax.devices()[0])
    wanted = _figures("float32", jax.devices("cpu")[0])
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))


def _figures(dtype: str, device: Any) -> list[float]:
    import jax

    from kava_jax.parallel.mesh import make_mesh
    from kava_jax.parallel.sharding import put_batch

    def run(kind: str) -> Any:
        wanted = {"student.dtype": kind, "teachers.0.dtype": kind, "optimizer.warmup_steps": 0}
        return random_run(CHECKED, CHECKED, rows=4, overrides=wanted, mesh=mesh)

    with jax.default_matmul_precision("float32"):
        mesh = make_mesh(1, 1, 1, [device])
        # Weights drawn in another dtype are other weights, so they are drawn in one and cast.
        teachers = jax.tree.map(lambda x: x.astype(dtype), run("float32").load_teachers())
        batch = put_batch(random_batch(4, 64, CHECKED["vocab_size"], 16), mesh)
        made = run(dtype)
        _, metrics = made.jitted_step()(made.fresh_state(), teachers, batch)
    names = ("loss", "ce", "grad_norm_student", "grad_norm_projector")
    return [float(metrics[name].value) for name in names]


def _mercator_difference() -> float:
    """The loss's value on this device against numpy in float64."""
    from kava_jax.losses import mercator

    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 6, 8, 32, 2, 64)).astype(np.float32)
    wide_s, wide_t = s.astype(np.float64), t.astype(np.float64)
    lengths = [np.linalg.norm(x, axis=-1) for x in (wide_s, wide_t)]
    cos = (wide_s * wide_t).sum(axis=-1) / (lengths[0] * lengths[1])
    wanted = (1 - cos + 0.01 * (np.log(lengths[0]) - np.log(lengths[1])) ** 2).mean()
    return abs(float(mercator(s, t, beta=0.01).value) / wanted - 1)  # pyright: ignore[reportArgumentType]  (host arrays)


if __name__ == "__main__":
    main()
