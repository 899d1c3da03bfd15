"""The LM head as written and by ``jax.checkpoint``, in alternating CPU rounds, and H100 memory."""

import json
from pathlib import Path
from statistics import median
from timeit import timeit

import jax
import jax.numpy as jnp

from kava_jax.bench.loss import _chunked as written
from kava_jax.losses import cross_entropy
from kava_jax.plan.accelerators import described_devices
from kava_jax.plan.chips import find_chip
from kava_jax.plan.compiled import memory_of
from kava_jax.training.lm_head import _chunk_size, _take


def checkpointed(head, labels, counted):
    """The same mean cross-entropy by automatic differentiation."""
    (hidden, table), (labels, counted) = head, (x.reshape(1, -1) for x in (labels, counted))
    hidden, size = hidden.reshape(1, -1, hidden.shape[-1]), _chunk_size(labels.size, *table.shape)
    places = jnp.argsort(~counted, axis=1, stable=True)
    places = jnp.pad(places, [(0, 0), (0, -labels.size % size)]).reshape(-1, 1, size)

    def chunk(start, places):
        sides = _take(hidden, places), table.astype(hidden.dtype)
        logits = jnp.einsum("snd,vd->snv", *sides, preferred_element_type=jnp.float32)
        kept = start + jnp.arange(size) < counted.sum()
        return cross_entropy(logits, _take(labels, places), kept[None]).sum

    run = jax.checkpoint(lambda x: jax.lax.cond(x[2], chunk, lambda *_: jnp.zeros(()), *x[:2]))
    starts = size * jnp.arange(len(places))
    return jax.lax.map(run, (starts, places, starts < counted.sum())).sum() / counted.sum()


def measure(B, T, D, V, dtype, device=None):
    """Of both forms in this order, temporaries in MB and, without a device, seconds."""
    shapes = ((B, T, D), dtype), ((V, D), "float32"), ((B, T), "int32"), ((B, T), "bool")
    on = device and jax.sharding.SingleDeviceSharding(device)
    hidden, table, *given = (jax.ShapeDtypeStruct(*x, sharding=on) for x in shapes)
    forms = [jax.jit(jax.value_and_grad(form)) for form in (written, checkpointed)]
    programs = [form.lower((hidden, table), *given).compile() for form in forms]
    found = {"temporaries_MB": [memory_of(p).temporaries / 1e6 for p in programs]}
    if device is None:
        head = jax.random.normal(jax.random.key(0), (B, T, D), dtype), jnp.full((V, D), 0.02)
        rest = jnp.ones((B, T), jnp.int32), jnp.arange(B * T).reshape(B, T) % 2 > 0
        runs = [lambda p=p: jax.block_until_ready(p(head, *rest)) for p in programs * 6]
        times = [timeit(run, number=1) for run in runs]
        found["seconds"] = [median(times[2::2]), median(times[3::2])]
    return {"BTDV": [B, T, D, V], dtype: found}


if __name__ == "__main__":
    sizes = (2, 16, 32, 200), (4, 255, 256, 32_768), (4, 256, 1536, 32_768)
    lines = {"cpu": [measure(*size, d) for size in sizes for d in ("float32", "bfloat16")]}
    for device in described_devices(find_chip("h100"), 1) or ():
        lines["h100"] = [measure(B, 512, 1536, 151_936, "bfloat16", device) for B in (8, 32)]
    Path(__file__).with_suffix(".json").write_text(json.dumps(lines, indent=1) + "\n")
