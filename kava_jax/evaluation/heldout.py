"""Held-out loss and alignment: the objective on rows that are never trained on, without dropout."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Params
from kava_jax.training.objective import Metrics, Objective, Share
from kava_jax.training.summary import summarize

Measure = Callable[[Mapping[str, Params], Mapping[str, Params], Batch], Metrics]

# Their values on held-out data would depend on weights and schedules, not on the model.
_LEFT_OUT = ("kv", "dir_loss", "mag_loss")


def make_measure(objective: Objective) -> Measure:
    """A jitted ``(params, teachers, batch) -> (sum, count) metrics``."""

    @jax.jit
    def measure(
        params: Mapping[str, Params], teachers: Mapping[str, Params], batch: Batch
    ) -> Metrics:
        whole = Share(jnp.ones(()), jnp.ones(()))
        return objective(params, teachers, batch, jnp.zeros((), jnp.int32), whole)[1]

    return measure


def held_out(
    measure: Measure,
    params: Mapping[str, Params],
    teachers: Mapping[str, Params],
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Token-weighted means over all batches: ``eval_loss`` (cross-entropy) and the alignment.

    Alignment figures, when there is a teacher, are named as in training with ``eval_`` before.
    """
    total: Metrics | None = None
    for batch in batches:
        metrics = measure(params, teachers, batch)
        total = metrics if total is None else _add(total, metrics)
    values = summarize(total or {})
    values["loss"] = values.pop("ce")
    return {f"eval_{name}": value for name, value in values.items() if name not in _LEFT_OUT}


def _add(left: Metrics, right: Metrics) -> Metrics:
    return jax.tree.map(jnp.add, left, right)
