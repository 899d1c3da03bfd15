"""The menu of KV losses, token by token: how far one model's keys (or values) are from another's.

Most compare vector with vector, by the formulas of ``losses``; two compare tokens with the other
tokens of their row. A loss per token can be routed, weighted and averaged by the caller.

Left out on purpose: the frame the vectors are compared in (``frame``), the attention KL that
``structural`` is completed with (``attention``), and what is a constant (the caller stops it).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kava_jax.errors import KavaError
from kava_jax.geometry import masked_mean, unit
from kava_jax.losses import (
    Scalar,
    Weight,
    comparable,
    hybrid_values,
    mercator_values,
    mse_values,
    smooth_l1_values,
    vector_mask,
)

KINDS = ("mercator", "mse", "smooth_l1", "hybrid", "structural", "infonce", "gram")
# Kinds that grow with the vectors, and so have a unit to be measured in.
SCALED = ("mse", "smooth_l1", "structural")

# (student [P, B, T, K, H], target, mask [B, T], step) -> loss of every token [B, T]
TokenLoss = Callable[[Array, Array, Array, Array], Array]
# The same of one layer: (student [B, T, K, H], target, counted [B, T]) -> [B, T]
_LayerLoss = Callable[[Array, Array, Array], Array]


def kv_loss(
    kind: str,
    *,
    alpha: float | int = 1.0,
    beta: float | int = 0.01,
    mercator_weight: Weight = 0.8,
    mse_weight: Weight = 0.2,
    temperature: float | int = 0.1,
    divide_by_std: bool = False,
) -> TokenLoss:
    """The named loss as ``(student, target, mask, step) -> [B, T]``, float32.

    Both sides are [P, B, T, K, H] of any float dtype and the mask is [B, T]. A token's loss is the
    mean over layers P and heads K, and 0 without a gradient where the mask is 0, whatever (NaN)
    stands there: ``masked_mean(result, mask)`` of the first four is the ``losses`` function of that
    name.

    mercator, mse, smooth_l1, hybrid   as in ``losses``; hybrid's weights are numbers or schedules
    structural   smooth_l1; the objective adds the attention KL
    infonce      ``-log softmax_j(cos(s_i, t_j) / temperature)[i]``, j over the counted tokens of
                 token i's row (van den Oord et al. 2018, arXiv 1807.03748)
    gram         mean over the same j of ``(cos(s_i, s_j) - cos(t_i, t_j))^2``: blind to the scale
                 and rotation of either side (Tung and Mori 2019, arXiv 1907.09682)

    Args:
        kind: one of ``KINDS``.
        alpha, beta: Mercator's weights of direction and magnitude.
        mercator_weight, mse_weight: of hybrid, a number or ``step -> number``.
        temperature: of infonce, above 0.
        divide_by_std: for mse, smooth_l1 and structural: both sides divided by the target's
            standard deviation, one constant per layer over counted tokens, heads and dimensions.

    Raises:
        KavaError: an unknown kind, a temperature not above 0, ``divide_by_std`` for another kind;
            when called, shapes that differ or a mask that does not fit.
    """
    _check(kind, temperature, divide_by_std)

    def of_tokens(s: Array, t: Array, counted_BT: Array, step: Array) -> Array:
        if kind == "infonce":
            infonce = functools.partial(_infonce, temperature=temperature)
            return _by_layer(infonce, s, t, counted_BT)
        if kind == "gram":
            return _by_layer(_gram, s, t, counted_BT)
        values = {
            "mse": lambda: mse_values(s, t),
            "smooth_l1": lambda: smooth_l1_values(s, t),
            "hybrid": lambda: hybrid_values(
                s, t, _at(mercator_weight, step), _at(mse_weight, step), alpha, beta
            ),
            "structural": lambda: smooth_l1_values(s, t),
        }[kind]()
        return values.mean(axis=(0, 3))

    def loss(
        student: Float[Array, "P B T K H"],
        target: Float[Array, "..."],
        mask_BT: Array,
        step: Array,
    ) -> Float[Array, "B T"]:
        counted_BT = mask_BT != 0
        if kind == "mercator":
            # It leaves out what does not count by itself, without a zeroed copy of either side.
            keep = vector_mask(student, target, mask_BT)
            values = mercator_values(student, target, alpha, beta, keep=keep)
            return jnp.where(counted_BT, values.mean(axis=(0, 3)), 0.0)
        s, t, _ = comparable(student, target, mask_BT)
        if divide_by_std:
            std = _std(t, counted_BT)
            s, t = s / std, t / std
        return jnp.where(counted_BT, of_tokens(s, t, counted_BT, step), 0.0)

    return loss


def _check(kind: str, temperature: float | int, divide_by_std: bool) -> None:
    if kind not in KINDS:
        raise KavaError(f"loss.kv={kind!r} is unknown; use one of {', '.join(KINDS)}")
    if temperature <= 0:
        raise KavaError(f"loss.temperature={temperature} is not above 0; 0.1 is usual")
    if divide_by_std and kind not in SCALED:
        raise KavaError(
            f"loss.divide_by_std=True does nothing for kv={kind}; set it to false, or kv to one of "
            f"{', '.join(SCALED)}"
        )


def _at(weight: Weight, step: Array) -> Scalar:
    return weight(step) if callable(weight) else weight


def _std(t: Float[Array, "P B T K H"], counted_BT: Bool[Array, "B T"]) -> Float[Array, "P 1 1 1 1"]:
    """Standard deviation of each layer's counted entries, a constant; 1 where it is 0."""
    t = jax.lax.stop_gradient(t)

    def mean(values: Array) -> Array:
        # Heads and dimensions first: there is one count per token to add up, not one per entry.
        per_token_PBT = values.mean(axis=(3, 4))
        return masked_mean(per_token_PBT, counted_BT[None], (1, 2)).value[:, None, None, None, None]

    variance = mean((t - mean(t)) ** 2)
    return jnp.sqrt(jnp.where(variance > 0, variance, 1.0))


def _by_layer(
    loss: _LayerLoss,
    s: Float[Array, "P B T K H"],
    t: Float[Array, "P B T K H"],
    counted_BT: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Mean over layers, one after the other: only one layer's [B, K, T, T] exists at a time."""

    def layer(pair: tuple[Array, Array]) -> Array:
        return loss(*pair, counted_BT)

    return jax.lax.map(jax.checkpoint(layer, prevent_cse=False), (s, t)).mean(axis=0)


def _cosines(
    a_BTKH: Float[Array, "B T K H"], b_BTKH: Float[Array, "B T K H"]
) -> Float[Array, "B K T T"]:
    """Cosine of every token's vector in a with every token's in b, of one row and head."""
    return jnp.einsum(
        "BTKH,BSKH->BKTS", unit(a_BTKH), unit(b_BTKH), precision=jax.lax.Precision.HIGHEST
    )


def _infonce(
    s_BTKH: Float[Array, "B T K H"],
    t_BTKH: Float[Array, "B T K H"],
    counted_BT: Bool[Array, "B T"],
    temperature: float | int,
) -> Float[Array, "B T"]:
    # -1e30, not -inf: rows in which nothing counts have to stay finite.
    scores = jnp.where(counted_BT[:, None, None, :], _cosines(s_BTKH, t_BTKH) / temperature, -1e30)
    own_BKT = jnp.diagonal(jax.nn.log_softmax(scores, axis=-1), axis1=-2, axis2=-1)
    return -own_BKT.mean(axis=1)


def _gram(
    s_BTKH: Float[Array, "B T K H"],
    t_BTKH: Float[Array, "B T K H"],
    counted_BT: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    apart = _cosines(s_BTKH, s_BTKH) - _cosines(t_BTKH, t_BTKH)
    return masked_mean(apart**2, counted_BT[:, None, None, :], axis=-1).value.mean(axis=1)
