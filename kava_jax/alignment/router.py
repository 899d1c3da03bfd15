"""How much each of several teachers counts, token by token.

``fixed``       the teachers' weights, the same for every token (they need not sum to 1).
``similarity``  softmax over teachers of ``cos(h, prototype) / 0.1 + log(weight)``. A teacher's
                prototype is the running mean direction of the tokens whose caches it matched best.
``learned``     softmax of a linear gate on h, plus ``log(weight)``; the gate learns from the KV
                loss and is rewarded for its entropy, or it would soon ask one teacher only.

h is the student's last hidden state, as a constant: routing never teaches the student.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from kava_jax.geometry import Mean, unit

RouterKind = Literal["fixed", "similarity", "learned"]
TEMPERATURE = 0.1
# Prototypes forget one hundredth a step: the student they are measured in keeps moving.
MEMORY = 0.99


class Gate(nnx.Module):
    """The learned router: one linear layer from the student's width to the teachers.

    It starts at zero, that is with every teacher at its prior weight.
    """

    def __init__(self, width: int, teachers: int):
        """Kernel [D, M] and bias [M] of zeros."""
        self.kernel = nnx.Param(jnp.zeros((width, teachers)), axes=(None, None))
        self.bias = nnx.Param(jnp.zeros((teachers,)), axes=(None,))

    def __call__(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T M"]:
        """Logits of the teachers; the hidden state's length is taken out first."""
        width = hidden_BTD.shape[-1]
        logits = unit(hidden_BTD) * width**0.5 @ self.kernel[...]
        return logits + self.bias[...].reshape(1, 1, -1)


@dataclass(frozen=True)
class Router:
    """Shares of the teachers, in the order of ``weights``."""

    kind: RouterKind
    weights: tuple[float | int, ...]
    gate: nnx.GraphDef[Gate] | None = None

    def shares(
        self, hidden_BTD: Float[Array, "B T D"], gate: Any, prototypes: Mean | None
    ) -> Float[Array, "B T M"]:
        """How much each teacher counts at each token; sums to 1 unless the router is fixed.

        Args:
            hidden_BTD: the student's last hidden states.
            gate: parameters of the learned gate (else unused).
            prototypes: sums [M, D] and counts [M] of unit hidden states (``similarity``).
        """
        prior = jnp.asarray(self.weights, jnp.float32).reshape(1, 1, -1)
        if self.kind == "fixed":
            return jnp.broadcast_to(prior, (*hidden_BTD.shape[:2], len(self.weights)))
        hidden = jax.lax.stop_gradient(hidden_BTD.astype(jnp.float32))
        if self.kind == "similarity":
            assert prototypes is not None
            logits = unit(hidden) @ unit(prototypes.sum).T / TEMPERATURE
        else:
            assert self.gate is not None
            logits = nnx.merge(self.gate, gate)(hidden)
        return jax.nn.softmax(logits + jnp.log(prior), axis=-1)


def entropy(shares_BTM: Float[Array, "B T M"]) -> Float[Array, "B T"]:
    """``-sum p log p`` over teachers, in nats; 0 log 0 is 0, with a finite gradient."""
    positive = shares_BTM > 0
    logs = jnp.log(jnp.where(positive, shares_BTM, 1.0))
    return -jnp.sum(jnp.where(positive, shares_BTM * logs, 0.0), axis=-1)


def empty_prototypes(teachers: int, width: int) -> Mean:
    """No token seen yet: all cosines are 0, so every teacher has its prior weight."""
    return Mean(jnp.zeros((teachers, width)), jnp.zeros((teachers,)))


def served(
    hidden_BTD: Float[Array, "B T D"],
    losses_BTM: Float[Array, "B T M"],
    mask_BT: Shaped[Array, "B T"],
) -> Mean:
    """Unit hidden states summed per teacher, each token going to the teacher with the lowest loss.

    A token that several teachers serve equally well is shared between them.
    """
    best = losses_BTM == losses_BTM.min(axis=-1, keepdims=True)
    counted = (mask_BT != 0)[..., None]
    given = jnp.where(counted, best / best.sum(axis=-1, keepdims=True), 0.0)
    directions = jax.lax.stop_gradient(jnp.where(counted, unit(hidden_BTD), 0.0))
    return Mean(jnp.einsum("btm,btd->md", given, directions), given.sum(axis=(0, 1)))


def remember(prototypes: Mean, new: Mean) -> Mean:
    """The prototypes after one more step."""
    return jax.tree.map(lambda old, seen: MEMORY * old + seen, prototypes, new)
