"""``kava bench loss``: the KV loss with its gradient, beside PyTorch and beside bare memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kava_jax.alignment.kv_losses import kv_loss
from kava_jax.bench.peers import beside, check_same, peer, temporary_bytes
from kava_jax.bench.timing import circumstances
from kava_jax.cache import KVCache
from kava_jax.geometry import masked_mean

TOLERANCE = 1e-4  # of the largest entry: float32 sums in other orders

# -> the loss and its gradient in the student's keys and values
ValueAndGradient = Callable[[], tuple[Any, Any]]


class Sizes(NamedTuple):
    """Of the cache, [layers, rows, length, heads, width] of float32 for keys and for values."""

    layers: int = 28
    rows: int = 4
    length: int = 256
    heads: int = 2
    width: int = 128


def bench_loss(sizes: Sizes) -> dict[str, Any]:
    """Mercator of keys and values, forward and backward in the student's cache, rows padded.

    ``read_modify`` is the floor: a pass that reads both caches and writes one array of the
    gradient's size, ``3 * bytes of a cache`` in all, and ``share_of_floor`` its time over ours.
    ``torch_compiled`` is null, with the reason, where torch.compile does not work. Temporaries are
    what the compiled program needs beside its arguments and results.

    Raises KavaError without PyTorch, and when its numbers are not ours.
    """
    student, target, mask_BT = _inputs(sizes)
    compiled = jax.jit(jax.value_and_grad(_loss)).lower(student, target, mask_BT).compile()
    modify = jax.jit(_read_modify)
    eager = _torch_eager(student, target, mask_BT)
    fast, reason = _torch_compiled(student, target, mask_BT)
    ours = compiled(student, target, mask_BT)
    peers = {"torch_eager": eager} | ({"torch_compiled": fast} if fast else {})
    for name, run in peers.items():
        check_same(name, ours, run(), TOLERANCE)
    work = {
        "kava": lambda: compiled(student, target, mask_BT),
        "read_modify": lambda: modify(student, target),
    }
    found = beside(work | peers, "kava")
    inputs = sum(x.nbytes for x in (*student, *target))
    temporaries = temporary_bytes(compiled)
    return {
        "name": "loss",
        "sizes": sizes._asdict(),
        **found,
        "torch_compiled_failed": reason,
        "floor_bytes": 3 * sum(x.nbytes for x in student),
        "share_of_floor": found["times_ours"]["read_modify"],
        "input_bytes": inputs,
        "temporary_bytes": temporaries,
        "temporaries_of_inputs": temporaries / inputs,
        **circumstances(),
        "torch": peer("torch").__version__,
    }


def _inputs(sizes: Sizes) -> tuple[KVCache, KVCache, Array]:
    """Two random caches and a mask [B, T]: each row is an eighth of the length shorter."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, sizes) for key in keys]
    ends_B = sizes.length - jnp.arange(sizes.rows) * sizes.length // 8 % sizes.length
    mask_BT = jnp.arange(sizes.length)[None, :] < ends_B[:, None]
    return KVCache(*arrays[:2]), KVCache(*arrays[2:]), mask_BT


def _loss(student: KVCache, target: KVCache, mask_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """As the objective takes it: the mean of keys' and values'."""
    of_tokens = kv_loss("mercator", beta=0.0)
    k, v = (
        masked_mean(of_tokens(s, t, mask_BT, jnp.zeros((), jnp.int32)), mask_BT).value
        for s, t in zip(student, target, strict=True)
    )
    return 0.5 * (k + v)


def _read_modify(student: KVCache, target: KVCache) -> KVCache:
    return jax.tree.map(lambda s, t: s - 0.5 * t, student, target)


def _torch_eager(student: KVCache, target: KVCache, mask_BT: Array) -> ValueAndGradient:
    """The same in PyTorch, op by op."""
    return _torch(student, target, mask_BT, lambda loss: loss)


def _torch_compiled(
    student: KVCache, target: KVCache, mask_BT: Array
) -> tuple[ValueAndGradient | None, str | None]:
    """The same through ``torch.compile``; where that does not work None, and the reason."""
    run = _torch(student, target, mask_BT, peer("torch").compile)
    try:
        run()
    except Exception as error:  # it needs a C++ compiler, and fails in many ways without
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return run, None


def _torch(
    student: KVCache, target: KVCache, mask_BT: Array, made: Callable[[Any], Any]
) -> ValueAndGradient:
    """As a user writes it: normalise both sides, 1 - cosine, masked mean; ``made`` of the loss."""
    torch, normalize = peer("torch"), peer("torch.nn.functional").normalize
    # Copies of its own: torch.compile is several times slower on memory that numpy aligned.
    s_k, s_v, t_k, t_v, mask = (
        torch.from_numpy(np.array(x)).clone() for x in (*student, *target, mask_BT)
    )

    def one(s: Any, t: Any) -> Any:
        distance = 1 - (normalize(s, dim=-1) * normalize(t, dim=-1)).sum(-1)
        keep = mask[None, :, :, None].expand_as(distance)
        return (distance * keep).sum() / keep.sum()

    loss = made(lambda k, v: 0.5 * (one(k, t_k) + one(v, t_v)))

    def run() -> tuple[Any, Any]:
        k, v = (x.detach().requires_grad_() for x in (s_k, s_v))
        value = loss(k, v)
        return value.detach(), torch.autograd.grad(value, (k, v))

    return run
