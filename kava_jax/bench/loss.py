"""Losses with their gradients: ``kava bench loss`` (of keys and values) and ``kava bench ce``."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kava_jax.bench.harness import Facts, Side, compare, compiled, peer_version
from kava_jax.bench.original import mercator
from kava_jax.cache import KVCache
from kava_jax.losses import MercatorKVLoss, cross_entropy
from kava_jax.training.lm_head import Head, weighted_losses

TOLERANCE = 1e-4  # of the largest entry: float32 sums in other orders
# Of the cache: layers, rows, length, heads, width. Float32 for keys and for values.
SHAPE = (28, 4, 256, 2, 128)
# Hidden states [rows, length, width] and a head [vocabulary, width], float32.
SIZES = (4, 255, 256, 151_936)

Labels = Int[Array, "B U"]
Counted = Bool[Array, "B U"]
CLOSE = 1e-5  # of the largest entry


def bench_loss(
    shape: tuple[int, ...] = SHAPE, optional: tuple[str, ...] = ("torch_compiled",)
) -> Facts:
    """``MercatorKVLoss(1, 0.01)`` of keys and values, all its metrics, and the student's gradient.

    Rows are padded. PyTorch does the original's own loss. ``read_modify`` is the floor: a pass that
    reads both caches and writes one. ``torch_compiled`` may fail, as torch.compile needs a C++
    compiler. Raises KavaError without PyTorch, and when its numbers are not ours.
    """
    torch = peer_version("torch")
    sides = {"kava": _ours, "read_modify": _read_modify, "torch_eager": _torch}
    made = {side: partial(make, shape) for side, make in sides.items()}
    made |= {side: partial(_torch, shape, fused=True) for side in optional}
    found = compare(made, TOLERANCE, optional)
    return {"shape": shape, **found, "torch": torch}


def bench_ce(sizes: tuple[int, int, int, int] = SIZES) -> Facts:
    """Mean cross-entropy, forward and backward in hidden states and head.

    Twice: with all positions counted, and without the first half of each row, the prompt.
    ``naive`` is the plain form, all logits in one array. FLOPs count the three matrix
    products at counted positions, ``6 * positions * width * vocabulary``.
    """
    cases = {}
    for case, prompt in {"all": 0, "answers": sizes[1] // 2}.items():
        sides = {form: partial(_head, form, sizes, prompt) for form in ("kava", "naive")}
        cases[case] = compare(sides, CLOSE)
    return {"sizes": sizes, "cases": cases}


def inputs(shape: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """Student's k and v, target's k and v, and a mask [B, T]: ever shorter rows."""
    rng, (_, rows, length, *_) = np.random.default_rng(0), shape
    ends_B = length - np.arange(rows) * length // 8 % length
    return [rng.standard_normal(shape, np.float32) for _ in range(4)], (
        np.arange(length)[None, :] < ends_B[:, None]
    )


def _ours(shape: tuple[int, ...]) -> Side:
    """As a user of the package writes it, compiled."""
    arrays, mask_BT = inputs(shape)
    s_k, s_v, t_k, t_v, mask = map(jnp.asarray, (*arrays, mask_BT))

    def loss(student: KVCache, target: KVCache, mask: Bool[Array, "B T"]) -> Any:
        return MercatorKVLoss(1.0, 0.01)(student, target, mask)

    def program(*given: Any) -> Any:
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(*given)
        return metrics, tuple(gradient)

    return compiled(program, KVCache(s_k, s_v), KVCache(t_k, t_v), mask, inputs=4 * s_k.nbytes)


def _read_modify(shape: tuple[int, ...]) -> Side:
    """The floor of memory: both caches are read, and one is written."""
    arrays = [jnp.asarray(x) for x in inputs(shape)[0]]
    modify = partial(jax.tree.map, lambda x, y: x - 0.5 * y)
    # Keys and values of two caches are read and of one are written: six arrays.
    return compiled(modify, arrays[:2], arrays[2:], compared=False, bytes=6 * arrays[0].nbytes)


def _torch(shape: tuple[int, ...], fused: bool = False) -> Side:
    """The original's, mean of keys' and values'."""
    torch: Any = importlib.import_module("torch")
    arrays, mask_BT = inputs(shape)
    # Copies of its own: torch.compile is several times slower on memory that numpy aligned.
    s_k, s_v, t_k, t_v, mask = (torch.from_numpy(x).clone() for x in (*arrays, mask_BT))

    def both(k: Any, v: Any) -> tuple[Any, Any]:
        where = mask[None, :, :, None]
        (of_k, seen_k), (of_v, seen_v) = (mercator(s, t, where) for s, t in ((k, t_k), (v, t_v)))
        return 0.5 * (of_k + of_v), {name: 0.5 * (seen_k[name] + seen_v[name]) for name in seen_k}

    loss = torch.compile(both) if fused else both

    def run() -> Any:
        k, v = (x.detach().requires_grad_() for x in (s_k, s_v))
        value, metrics = loss(k, v)
        gradient = torch.autograd.grad(value, (k, v))
        return {name: metric.detach() for name, metric in metrics.items()}, gradient

    return Side(run)


def _head(form: str, sizes: tuple[int, int, int, int], prompt: int) -> Side:
    rows, length, width, vocabulary = sizes
    of_hidden, of_head, of_labels = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(of_hidden, (rows, length, width))
    table = 0.02 * jax.random.normal(of_head, (vocabulary, width))
    labels_BU = jax.random.randint(of_labels, (rows, length), 0, vocabulary)
    counted_BU = jnp.broadcast_to(jnp.arange(length) >= prompt, (rows, length))
    loss = jax.value_and_grad(_chunked if form == "kava" else _naive)
    flops = 6.0 * rows * (length - prompt) * width * vocabulary
    return compiled(loss, (hidden, table), labels_BU, counted_BU, flops=flops)


def _chunked(head: Head, labels_BU: Labels, counted_BU: Counted) -> Array:
    """As the objective takes it."""
    weights_BUK = (counted_BU / counted_BU.sum())[..., None]

    def losses(logits: dict[str, Array], labels: Array) -> Array:
        of_tokens = jax.vmap(jax.vmap(lambda row, label: cross_entropy(row, label).value))
        return of_tokens(logits["student"], labels)[..., None]

    total, _ = weighted_losses(head, {}, labels_BU, counted_BU, weights_BUK, losses)
    return total


def _naive(head: Head, labels_BU: Labels, counted_BU: Counted) -> Array:
    hidden, table = head
    return cross_entropy(hidden @ table.T, labels_BU, counted_BU).value
