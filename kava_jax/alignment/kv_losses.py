"""The KV losses that a config can name: how far one model's keys (or values) are from another's.

To add one, write a class with its fields and add it to ``AnyKVLoss``; the config, its
documentation and ``kava explain`` follow. The formulas are those of ``losses``. The frame in which
vectors are compared is ``frame``; whatever is a constant is stopped by the caller.
"""

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from pydantic import BaseModel, ConfigDict, Field

from kava_jax.losses import comparable, mercator_values, mse_values, vector_mask

Beta = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class KVLoss(BaseModel):
    """Base of all: the fields are static, the call is pure and works under ``jit`` and ``grad``."""

    # A misspelt field of a config must be an error, not a default that nobody asked for.
    model_config = ConfigDict(frozen=True, extra="forbid")
    formula: ClassVar[str]
    """In words, with a place for every field's value."""

    @abstractmethod
    def vectors(self, student: Array, target: Array, mask_BT: Array) -> Float[Array, "P B T K"]:
        """The loss of every pair of vectors; what the mask leaves out may be anything finite."""

    @property
    def words(self) -> str:
        """The formula with its numbers, as ``kava explain`` writes it."""
        return self.formula.format(**self.model_dump())

    def __call__(
        self,
        student: Float[Array, "P B T K H"],
        target: Float[Array, "..."],
        mask_BT: Array,
    ) -> Float[Array, "B T"]:
        """The loss of every token, float32: the mean over layers P and heads K.

        Inputs may be of any float dtype. The result is 0, without a gradient, where the mask is 0,
        even if NaN is found there: ``masked_mean(result, mask)`` is the mean loss of a vector.

        Raises:
            KavaError: the shapes differ, or the mask does not fit them.
        """
        # The mask is per token, so layers and heads can be averaged before it is applied.
        values = self.vectors(student, target, mask_BT).mean(axis=(0, 3))
        return jnp.where(mask_BT != 0, values, 0.0)


class Mercator(KVLoss):
    """``1 - cosine + beta * log(length ratio)^2``: the direction, and a little of the length."""

    formula = "Mercator: 1 - cosine + {beta:g} x (difference of log lengths)^2"
    kind: Literal["mercator"] = "mercator"
    beta: Beta = Field(default=0.01, description="weight of the squared difference of log lengths")

    def vectors(self, student: Array, target: Array, mask_BT: Array) -> Float[Array, "P B T K"]:
        """Without a zeroed copy of either side: Mercator masks by itself."""
        keep = vector_mask(student, target, mask_BT)
        return mercator_values(student, target, 1.0, self.beta, keep=keep)


class MSE(KVLoss):
    """The mean squared difference."""

    formula = "MSE: the mean squared difference"
    kind: Literal["mse"] = "mse"

    def vectors(self, student: Array, target: Array, mask_BT: Array) -> Float[Array, "P B T K"]:
        """Of vectors whose uncounted entries are zeros."""
        s, t, _ = comparable(student, target, mask_BT)
        return mse_values(s, t)


class SmoothL1(KVLoss):
    """Half the squared difference up to 1, linear beyond."""

    formula = "Smooth-L1: squared up to 1, linear beyond"
    kind: Literal["smooth_l1"] = "smooth_l1"

    def vectors(self, student: Array, target: Array, mask_BT: Array) -> Float[Array, "P B T K"]:
        """Of vectors whose uncounted entries are zeros."""
        s, t, _ = comparable(student, target, mask_BT)
        # At its default delta of 1 the Huber loss is Smooth-L1. optax squares only min(|d|, 1), so
        # a distance of 1e30 stays finite.
        return jnp.mean(optax.losses.huber_loss(s, t), axis=-1)


class Hybrid(KVLoss):
    """``0.8 * Mercator + 0.2 * MSE``, the original method's weights."""

    formula = "Hybrid: 0.8 x Mercator (beta {beta:g}) + 0.2 x MSE"
    kind: Literal["hybrid"] = "hybrid"
    beta: Beta = Field(default=0.01, description="as Mercator's")

    def vectors(self, student: Array, target: Array, mask_BT: Array) -> Float[Array, "P B T K"]:
        """Of vectors whose uncounted entries are zeros."""
        s, t, _ = comparable(student, target, mask_BT)
        return 0.8 * mercator_values(s, t, 1.0, self.beta) + 0.2 * mse_values(s, t)


# The table: ``loss.kv`` of a config is one of these.
AnyKVLoss = Mercator | MSE | SmoothL1 | Hybrid
