"""The LM head's loss and gradient as they are written, and by ``jax.checkpoint`` over the chunks.

Temporaries and, on this machine's CPU, medians of alternating rounds in which half the tokens
count; the H100's temporaries where JAX's CUDA plugin is installed. Writes lm_head.json.
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


def checkpointed(head, labels, counted):
    """The same mean cross-entropy by automatic differentiation."""
    (hidden, table), (labels, counted) = head, (x.reshape(1, -1) for x in (labels, counted))
    hidden, size = hidden.reshape(1, -1, hidden.shape[-1]), _chunk_size(labels.size, *table.shape)
    order = jnp.argsort(~counted, axis=1, stable=True)
    places = jnp.pad(order, [(0, 0), (0, -labels.size % size)]).reshape(-1, 1, size)

    def chunk(start, places):
        factors = _take(hidden, places), table.astype(hidden.dtype)
        logits = jnp.einsum("snd,vd->snv", *factors, preferred_element_type=jnp.float32)
        kept = start + jnp.arange(size) < counted.sum()
        return cross_entropy(logits, _take(labels, places), kept[None]).sum

    def run(x):
        return jax.lax.cond(x[0] < counted.sum(), chunk, lambda *_: jnp.zeros(()), *x)

    chunks = size * jnp.arange(len(places)), places
    return jax.lax.map(jax.checkpoint(run), chunks).sum() / counted.sum()


def measure(B, T, D, V, dtype, device=None):
    """Of both forms in this order, temporaries in MB and, without a device, seconds."""
    shapes = ((B, T, D), dtype), ((V, D), "float32"), ((B, T), "int32"), ((B, T), "bool")
    hidden, table, *given = (jax.ShapeDtypeStruct(*x, sharding=device) for x in shapes)
    forms = [jax.jit(jax.value_and_grad(form)) for form in (written, checkpointed)]
    programs = [form.lower((hidden, table), *given).compile() for form in forms]
    temporaries = [p.memory_analysis().temp_size_in_bytes / 1e6 for p in programs]
    head = jax.random.normal(jax.random.key(0), (B, T, D), dtype), jnp.full((V, D), 0.02)
    rest, seconds = (jnp.ones((B, T), jnp.int32), jnp.arange(B * T).reshape(B, T) % 2 > 0), ([], [])
    for program, times in list(zip(programs, seconds, strict=True)) * (0 if device else 6):
        start = perf_counter()
        jax.block_until_ready(program(head, *rest))
        times.append(perf_counter() - start)
    found = {"temporaries_MB": temporaries, "seconds": [median(x[1:]) for x in seconds if x]}
    return {"B T D V": [B, T, D, V], "dtype": dtype} | found


if __name__ == "__main__":
    cpu, h100 = [(2, 16, 32, 200), (4, 255, 256, 32_768), (4, 256, 1536, 32_768)], [8, 32]
    lines = {"cpu": [measure(*s, dtype) for s in cpu for dtype in ("float32", "bfloat16")]}
    if devices := described_devices(find_chip("h100"), 1):
        on = jax.sharding.SingleDeviceSharding(devices[0])
        lines["h100"] = [measure(rows, 512, 1536, 151_936, "bfloat16", on) for rows in h100]
    Path(__file__).with_suffix(".json").write_text(json.dumps(lines, indent=1) + "\n")
