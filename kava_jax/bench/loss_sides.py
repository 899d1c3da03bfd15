"""The sides of ``kava bench loss``: ours, a bare pass over the same bytes, and PyTorch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from kava_jax.bench.peers import peer, temporary_bytes
from kava_jax.bench.torch_loss import mercator
from kava_jax.bench.turns import Ready
from kava_jax.cache import KVCache
from kava_jax.losses import MercatorKVLoss

ALPHA, BETA = 1.0, 0.01

# -> metrics and the gradient in the student's keys and values
MetricsAndGradient = Callable[[], tuple[Any, Any]]


def ready(side: str, folder: Path) -> Ready:
    """A side, whose numbers are in ``SIDE.npz`` after it; ``read_modify`` has none."""
    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    arrays, mask_BT = inputs(*sizes)
    if side == "read_modify":
        return _read_modify(arrays)
    first: dict[str, Any] = {}
    if side == "kava":
        run, first["temporary_bytes"] = _ours(arrays, mask_BT)
    else:
        run = _torch(arrays, mask_BT, compiled=side == "torch_compiled")
    metrics, gradient = run()
    np.savez(folder / f"{side}.npz", **metrics, k=gradient[0], v=gradient[1])
    return Ready(first, run)


def inputs(
    layers: int, rows: int, length: int, heads: int, width: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Student's k and v, target's k and v, and a mask [B, T]: ever shorter rows."""
    rng = np.random.default_rng(0)
    shape = (layers, rows, length, heads, width)
    ends_B = length - np.arange(rows) * length // 8 % length
    return [rng.standard_normal(shape, np.float32) for _ in range(4)], (
        np.arange(length)[None, :] < ends_B[:, None]
    )


def _ours(arrays: list[np.ndarray], mask_BT: np.ndarray) -> tuple[MetricsAndGradient, int]:
    """As a user of the package writes it, compiled; and its temporaries."""
    k, v, *target = map(jnp.asarray, arrays)
    mask = jnp.asarray(mask_BT)

    def loss(student: KVCache, target: KVCache, mask: Bool[Array, "B T"]) -> Any:
        return MercatorKVLoss(ALPHA, BETA)(student, target, mask)

    given = KVCache(k, v), KVCache(*target), mask
    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*given).compile()

    def run() -> tuple[Any, Any]:
        (_, metrics), gradient = jax.block_until_ready(program(*given))
        return metrics, gradient

    return run, temporary_bytes(program)


def _read_modify(arrays: list[np.ndarray]) -> Ready:
    """The floor of memory: both caches are read, and one is written."""
    student, target = (KVCache(*map(jnp.asarray, arrays[i : i + 2])) for i in (0, 2))
    modify = jax.jit(lambda s, t: jax.tree.map(lambda x, y: x - 0.5 * y, s, t))

    def run() -> Any:
        return jax.block_until_ready(modify(student, target))

    run()
    return Ready({}, run)


def _torch(arrays: list[np.ndarray], mask_BT: np.ndarray, compiled: bool) -> MetricsAndGradient:
    """The original's, mean of keys' and values'."""
    torch = peer("torch")
    # Copies of its own: torch.compile is several times slower on memory that numpy aligned.
    s_k, s_v, t_k, t_v, mask = (torch.from_numpy(x).clone() for x in (*arrays, mask_BT))

    def both(k: Any, v: Any) -> tuple[Any, Any]:
        where = mask[None, :, :, None]
        (of_k, seen_k), (of_v, seen_v) = (
            mercator(s, t, where, alpha=ALPHA, beta=BETA) for s, t in ((k, t_k), (v, t_v))
        )
        return 0.5 * (of_k + of_v), {name: 0.5 * (seen_k[name] + seen_v[name]) for name in seen_k}

    loss = torch.compile(both) if compiled else both

    def run() -> tuple[Any, Any]:
        k, v = (x.detach().requires_grad_() for x in (s_k, s_v))
        value, metrics = loss(k, v)
        gradient = torch.autograd.grad(value, (k, v))
        return {name: metric.detach() for name, metric in metrics.items()}, gradient

    return run
