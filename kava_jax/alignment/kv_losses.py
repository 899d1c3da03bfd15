"""The menu of KV losses, token by token: how far one model's keys (or values) are from another's.

They compare vector with vector, by the formulas of ``losses``. A loss per token can be routed,
weighted and averaged by the caller.

Left out on purpose: the frame the vectors are compared in (``frame``), the attention KL that
``structural`` is completed with (``attention``), and what is a constant (the caller stops it).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from kava_jax.errors import KavaError
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

KINDS = ("mercator", "mse", "smooth_l1", "hybrid", "structural")
# Kinds that grow with the vectors, and so have a unit to be measured in.
SCALED = ("mse", "smooth_l1", "structural")

# (student [P, B, T, K, H], target, mask [B, T], step) -> loss of every token [B, T]
TokenLoss = Callable[[Array, Array, Array, Array], Array]


def kv_loss(
    kind: str,
    *,
    alpha: float | int = 1.0,
    beta: float | int = 0.01,
    mercator_weight: Weight = 0.8,
    mse_weight: Weight = 0.2,
) -> TokenLoss:
    """The named loss as ``(student, target, mask, step) -> [B, T]``, float32.

    Both sides are [P, B, T, K, H] of any float dtype and the mask is [B, T]. A token's loss is the
    mean over layers P and heads K, and 0 without a gradient where the mask is 0, whatever (NaN)
    stands there: ``masked_mean(result, mask)`` is the ``losses`` function of that name.

    mercator, mse, smooth_l1, hybrid   as in ``losses``; hybrid's weights are numbers or schedules
    structural   smooth_l1; the objective adds the attention KL

    Args:
        kind: one of ``KINDS``.
        alpha, beta: Mercator's weights of direction and magnitude.
        mercator_weight, mse_weight: of hybrid, a number or ``step -> number``.

    Raises:
        KavaError: an unknown kind; when called, shapes that differ or a mask that does not fit.
    """
    if kind not in KINDS:
        raise KavaError(f"loss.kv={kind!r} is unknown; use one of {', '.join(KINDS)}")

    def of_vectors(s: Array, t: Array, step: Array) -> Array:
        return {
            "mse": lambda: mse_values(s, t),
            "smooth_l1": lambda: smooth_l1_values(s, t),
            "hybrid": lambda: hybrid_values(
                s, t, _at(mercator_weight, step), _at(mse_weight, step), alpha, beta
            ),
            "structural": lambda: smooth_l1_values(s, t),
        }[kind]()

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
        return jnp.where(counted_BT, of_vectors(s, t, step).mean(axis=(0, 3)), 0.0)

    return loss


def _at(weight: Weight, step: Array) -> Scalar:
    return weight(step) if callable(weight) else weight
