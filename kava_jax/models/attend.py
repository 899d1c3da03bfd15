"""Attention by XLA, by cuDNN or by the splash kernel for TPUs, and the choice between them.

XLA takes any causal mask and stores the scores, so its memory grows with the square of the length.
The kernels do not store scores, and their memory grows with the length. They support one case only:
rows padded on the right, with no cached tokens before them. All padding then comes after the real
tokens, so a causal kernel needs no mask to hide it from them. At padded positions the
implementations give different (finite) outputs, which nothing reads.

Left out on purpose: rows packed with several texts, and kernels for decoding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from kava_jax.errors import KavaError
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.sharding import RULES

# ``splash_interpreted`` runs the TPU kernel in interpret mode on any device. Slow; for tests.
Implementation = Literal["xla", "cudnn", "splash", "splash_interpreted"]
Asked = Literal["auto", "xla", "cudnn", "splash"]
Attend = Callable[..., Float[Array, "B T N H"]]

# Splash computes the scores in square blocks, of the largest of these sizes that divides the padded
# length of the row. Each is a multiple of 128, the number of lanes of a TPU register.
SPLASH_BLOCKS = (512, 256, 128)
# XLA's attention computes BLOCK queries at a time. Each block is traced separately and makes the
# program longer, so a long row uses a multiple of BLOCK to have at most MOST_BLOCKS of them.
BLOCK = 128
MOST_BLOCKS = 16


class Choice(NamedTuple):
    """A model's attention implementation, and the reason: what follows "because"."""

    implementation: Implementation
    reason: str


def choose(
    asked: Asked,
    device: Any,
    who: str,
    dtype: Any,
    spec: DecoderSpec,
) -> Choice:
    """The implementation for one model: the requested one, or for ``auto`` the device's kernel.

    ``auto`` falls back to ``xla`` where that kernel cannot run.

    Args:
        asked: the config's ``train.attention``.
        device: a device of the mesh (``jax.Device``).
        who: the model's name in messages.
        dtype: compute dtype.
        spec: the model's geometry.

    Raises KavaError when the requested implementation cannot run.
    """
    own: dict[str, Implementation] = {"gpu": "cudnn", "tpu": "splash"}
    wanted = own.get(device.platform, "xla") if asked == "auto" else asked
    obstacle = _obstacle(wanted, device, jnp.dtype(dtype), spec)
    if obstacle is None:
        found = f"the device is a {device.platform.upper()}"
        return Choice(wanted, found if asked == "auto" else f"train.attention={asked}")
    if asked != "auto":
        raise KavaError(
            f"train.attention={asked} does not work for {who}: {obstacle}; use auto or xla"
        )
    return Choice("xla", obstacle)


def _obstacle(
    implementation: Implementation, device: Any, dtype: jnp.dtype, spec: DecoderSpec
) -> str | None:
    """Why a model cannot use the implementation, or None."""
    if implementation == "xla":
        return None
    if device.platform != ("gpu" if implementation == "cudnn" else "tpu"):
        return f"the device is a {device.platform.upper()}"
    if implementation == "splash":
        return None
    major = str(device.compute_capability).partition(".")[0]
    if not (major.isdecimal() and int(major) >= 8):  # AMD's is a name such as gfx942
        return f"cuDNN attends on NVIDIA GPUs from Ampere on, not on {device.device_kind}"
    if dtype != jnp.bfloat16:
        return f"it computes in {dtype} and cuDNN attends in bfloat16"
    if spec.head_dim > 128 or spec.head_dim % 8:
        return f"head_dim={spec.head_dim} and cuDNN takes multiples of 8 up to 128"
    return "it caps its scores and cuDNN does not" if spec.attention_cap else None


def in_words(choices: list[tuple[str, Choice]]) -> str:
    """The attention implementations of a run's models, in one line."""
    models: dict[Choice, list[str]] = {}
    for who, choice in choices:
        models.setdefault(choice, []).append(who)
    told = []
    for choice, who in models.items():
        these = f" for {', '.join(who)}" if len(models) > 1 else ""
        told.append(f"{choice.implementation}{these}, because {choice.reason}")
    return f"attention: {'; '.join(told)}"


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B 1 T S"],
    *,
    implementation: Implementation = "xla",
    valid_BT: Bool[Array, "B T"] | None = None,
    window: int | None = None,
    rows: NamedSharding | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T scale) v, softmax in float32; N / K query heads share a key/value head.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask_BTS: which keys a query sees; only ``xla`` reads it. With S = T it must be causal. The
            kernels ignore it. They assume rows padded on the right and S = T, where each query
            sees its own token and the real ones before it, within ``window``.
        implementation: see ``choose``.
        valid_BT: the real tokens; only splash reads it.
        window: how many tokens a query sees, including its own, or None for all; only the kernels
            read it.
        rows: sharding of [B, ...] on a mesh of several devices; only splash reads it, because the
            partitioner cannot split that kernel.
        scale: None is ``1 / sqrt(H)``.
        cap: scores become ``cap * tanh(score / cap)``; None leaves them. cuDNN cannot do it.
    """
    factor: float = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "xla":
        return _by_blocks(q_BTNH, k_BSKH, v_BSKH, mask_BTS, factor, cap)
    if implementation == "cudnn":
        # Causality already hides the padding, so cuDNN gets neither lengths nor a mask. Then no row
        # is empty. With a mask, some of its backward passes gave NaN.
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            scale=factor,
            is_causal=True,
            # JAX counts the keys on the left without the query's own.
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    assert valid_BT is not None
    kernel = partial(
        _splash_kernel, window=window, cap=cap, interpret=implementation == "splash_interpreted"
    )
    return _splash(q_BTNH, k_BSKH, v_BSKH, valid_BT, kernel, rows, factor)


def _by_blocks(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B 1 T S"],
    scale: float,
    cap: float | None,
) -> Float[Array, "B T N H"]:
    """Attend block by block, each over the keys up to its end: about half of all scores."""
    length = q_BTNH.shape[1]
    one: Attend = partial(jax.nn.dot_product_attention, scale=scale)
    if cap is not None:
        one = partial(_with_cap, scale=scale, cap=cap)
    if k_BSKH.shape[1] != length:  # with a cache: keys of earlier tokens come first
        return one(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS)
    size = BLOCK * math.ceil(length / BLOCK / MOST_BLOCKS)
    # A Python loop and no lax.scan, because each block reads another number of keys, and the steps
    # of a scan must have equal shapes.
    blocks = [(start, min(start + size, length)) for start in range(0, length, size)]
    parts = [
        one(
            q_BTNH[:, start:end],
            k_BSKH[:, :end],
            v_BSKH[:, :end],
            mask=mask_BTS[:, :, start:end, :end],
        )
        for start, end in blocks
    ]
    return jnp.concatenate(parts, axis=1)


def _with_cap(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "B 1 T S"],
    scale: float,
    cap: float,
) -> Float[Array, "B T N H"]:
    """JAX's own attention has no cap. Scores and softmax in float32, as there."""
    batch, length, heads, width = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BSKH.shape[2], -1, width)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = capped(scale * product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH), cap)
    # A row that sees nothing gets a mean of values and no NaN, as from JAX's attention.
    scores = jnp.where(mask[:, :, None], scores, -0.7 * jnp.finfo(jnp.float32).max)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    y_BTKGH = product("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return y_BTKGH.reshape(batch, length, heads, width).astype(q_BTNH.dtype)


def capped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """``cap * tanh(x / cap)``; ``x`` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    valid_BT: Bool[Array, "B T"],
    kernel: Callable[[int, int], Any],
    rows: NamedSharding | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Run the splash kernel on every device, for its own rows and heads."""

    def local(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, valid_BT: Array) -> Array:
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        length, heads = q_BTNH.shape[1:3]
        # Splash takes whole blocks, so the last one is padded; the padding is dropped at the end.
        filled = length + -length % SPLASH_BLOCKS[-1]
        q_BTNH, k_BTKH, v_BTKH, valid_BT = (
            jnp.pad(x, [(0, 0), (0, filled - length), *[(0, 0)] * (x.ndim - 2)])
            for x in (q_BTNH, k_BTKH, v_BTKH, valid_BT)
        )
        # Padding gets a segment of its own and sees itself, so that no query sees zero keys.
        segments_BT = valid_BT.astype(jnp.int32)
        # Splash does not scale the scores. Scale in float32, so that queries are rounded only once.
        q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
        y_BNTH = jax.vmap(kernel(filled, heads))(
            *(x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH)),
            splash.SegmentIds(segments_BT, segments_BT),
        )
        return y_BNTH.swapaxes(1, 2)[:, :length]

    if rows is None:
        return local(q_BTNH, k_BTKH, v_BTKH, valid_BT)
    # A device needs a query's key/value head with it, so heads are split only where both counts
    # divide. Otherwise every device of the tensor axis computes all heads of its rows.
    axis = RULES["heads"]
    divided = all(x.shape[2] % rows.mesh.shape[axis] == 0 for x in (q_BTNH, k_BTKH))
    by_heads = PartitionSpec(rows.spec[0], None, axis if divided else None, None)
    split = jax.shard_map(
        local,
        mesh=rows.mesh,
        in_specs=(by_heads, by_heads, by_heads, rows.spec),
        out_specs=by_heads,
        check_vma=False,  # a Pallas kernel does not declare which outputs vary over the mesh
    )
    return split(q_BTNH, k_BTKH, v_BTKH, valid_BT)


def _splash_kernel(
    length: int, heads: int, *, window: int | None, cap: float | None, interpret: bool
) -> Any:
    """(q [N, T, H], k [K, T, H], v [K, T, H], segments) -> [N, T, H] for one row, whole blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    square = (length, length)
    mask = splash.CausalMask(square)
    if window is not None:
        mask = splash.LocalMask(square, (window - 1, 0), offset=0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        # Without block sizes for dkv and dq the kernel has no backward pass.
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        # shard_map has already given this device its own rows and heads.
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
