"""The KV weight as a share of the language gradient, measured inside the step that uses it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kava_jax.diagnostics import gradient_share
from kava_jax.geometry import Mean

# What is left of a measured ratio at the next measurement: about the last two count.
MEMORY = 0.5


class LossScale(NamedTuple):
    """A weight that is measured: its value, and the decayed mean that it is taken from.

    ``log_ratio`` is of ``log(||g_language|| / ||g_kv||)``, with KV at its scheduled weight, over
    the last few measurements: one batch's ratio is often double or half the usual.
    """

    value: Float[Array, ""]
    log_ratio: Mean


def share_is_due(number: int, every: int | None) -> bool:
    """Whether step ``number`` measures the KV weight's share (None: never).

    Every ``every`` steps, and at 1, 2, 4, 8, ... too: gradients change fastest at the start.
    """
    if every is None:
        return False
    return number % every == 0 or (number < every and number.bit_count() == 1)


def split_gradients(losses: Callable[[Any], Any], params: Any) -> tuple[Any, Any, Any, Any]:
    """Of ``losses(params) -> ((language, kv), seen)``: the values, ``seen``, and both gradients.

    One forward pass serves two backward passes.
    """
    values, pull, seen = jax.vjp(losses, params, has_aux=True)
    one, nothing = (jax.tree.map(fill, values[0]) for fill in (jnp.ones_like, jnp.zeros_like))
    return values, seen, pull((one, nothing))[0], pull((nothing, one))[0]


def rescaled(
    scale: LossScale, of_kv: Any, of_language: Any, factor: Any, share: float
) -> LossScale:
    """The scale at which ``factor * of_kv`` has that share of ``of_language``, on average.

    The average is the geometric mean of this measurement and those before it. A gradient of zero or
    NaN measures nothing.
    """
    unscaled = factor * gradient_share(of_kv, of_language)[0]
    known = (unscaled > 0) & jnp.isfinite(unscaled)
    old = scale.log_ratio
    # Logarithms, because one batch's ratio is often half or double the usual: a plain mean would
    # follow the large ones.
    log_ratio = Mean(
        MEMORY * old.sum - jnp.log(jnp.where(known, unscaled, 1.0)), MEMORY * old.count + 1.0
    )
    new = LossScale(share * jnp.exp(log_ratio.value), log_ratio)
    return jax.tree.map(lambda after, before: jnp.where(known, after, before), new, scale)
