"""The LM head's loss and gradient as they are written, and by ``jax.checkpoint`` over the chunks.

    python docs/results/lm_head.py            some minutes on two cores; writes lm_head.json

Seconds are medians of alternating rounds on this machine's CPU, of which half the tokens count.
Temporaries are also those of the H100's compiler, where JAX's CUDA plugin is installed.
"""

import json
from pathlib import Path
from statistics import median
from time import perf_counter

import jax
import jax.numpy as jnp

from kava_jax.bench.losses import _chunked as written
from kava_jax.losses import cross_entropy
from kava_jax.plan.accelerators import described_devices
from kava_jax.plan.chips import find_chip
from kava_jax.training.lm_head import _chunk_size, _take

SIZES = [(2, 16, 32, 200), (4, 255, 256, 32_768), (4, 256, 1536, 32_768)]  # B, T, D, V
ON_H100 = [(8, 512, 1536, 151_936), (32, 512, 1536, 151_936)]


def checkpointed(head, labels, counted):
    """The same mean cross-entropy by automatic differentiation."""
    (hidden, table), (labels, counted) = head, (x.reshape(1, -1) for x in (labels, counted))
    hidden, size = hidden.reshape(1, -1, hidden.shape[-1]), _chunk_size(labels.size, *table.shape)
    places = jnp.argsort(~counted, axis=1, stable=True)
    places = jnp.pad(places, [(0, 0), (0, -labels.size % size)]).reshape(-1, 1, size)

    def chunk(start, places):
        factors = _take(hidden, places), table.astype(hidden.dtype)
        logits = jnp.einsum("snd,vd->snv", *factors, preferred_element_type=jnp.float32)
        kept = start + jnp.arange(size) < counted.sum()
        return cross_entropy(logits, _take(labels, places), kept[None]).sum

    def run(x):
        return jax.lax.cond(x[0] < counted.sum(), chunk, lambda *_: jnp.zeros(()), *x)

    starts = size * jnp.arange(len(places))
    return jax.lax.map(jax.checkpoint(run), (starts, places)).sum() / counted.sum()


def measure(B, T, D, V, dtype, device=None, rounds=5):
    """Per form its temporaries in MB and, without a described device, its seconds."""
    shapes = ((B, T, D), dtype), ((V, D), "float32"), ((B, T), "int32"), ((B, T), "bool")
    hidden, table, *given = (jax.ShapeDtypeStruct(*x, sharding=device) for x in shapes)
    forms = [jax.value_and_grad(form) for form in (written, checkpointed)]
    programs = [jax.jit(form).lower((hidden, table), *given).compile() for form in forms]
    found = {"temporaries_MB": [p.memory_analysis().temp_size_in_bytes / 1e6 for p in programs]}
    if device is None:
        key, seconds = jax.random.key(0), ([], [])
        head = jax.random.normal(key, (B, T, D), dtype), 0.02 * jax.random.normal(key, (V, D))
        counted = jnp.broadcast_to(jnp.arange(T) >= T // 2, (B, T))
        for _ in range(rounds + 1):
            for program, times in zip(programs, seconds, strict=True):
                start = perf_counter()
                jax.block_until_ready(program(head, jnp.ones((B, T), jnp.int32), counted))
                times.append(perf_counter() - start)
        found["seconds"] = [median(times[1:]) for times in seconds]
    return {"sizes": [B, T, D, V], "dtype": dtype, "written_checkpointed": found}


if __name__ == "__main__":
    lines = {"cpu": [measure(*s, dtype) for s in SIZES for dtype in ("float32", "bfloat16")]}
    if devices := described_devices(find_chip("h100"), 1):
        on = jax.sharding.SingleDeviceSharding(devices[0])
        lines["h100"] = [measure(*sizes, "bfloat16", on) for sizes in ON_H100]
    Path(__file__).with_suffix(".json").write_text(json.dumps(lines, indent=1) + "\n")
