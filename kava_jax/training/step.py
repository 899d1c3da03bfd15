"""The state of a run and the one function that advances it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from kava_jax.data.batches import Batch
from kava_jax.geometry import Mean
from kava_jax.models.decoder import Params
from kava_jax.training.objective import Metrics, Objective, Share

RUNNING_DECAY = 0.95


class TrainState(NamedTuple):
    """All that a run needs to go on exactly; the teachers are not part of it.

    Randomness is ``fold_in(seed, step)`` and batches are addressed by step, so the step number is
    the whole state of both.
    """

    step: Int[Array, ""]
    params: dict[str, Params]
    opt_state: Any
    running: Metrics


def initial_state(params: dict[str, Params], optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of a run over ``{"student": ..., "projector": ...}``."""
    zero = Mean(jnp.zeros(()), jnp.zeros(()))
    running = {"cos": zero, "cos_shuffled": zero} if params["projector"] else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), running)


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, seed: int, microbatches: int
) -> Callable[[TrainState, Mapping[str, Params], Batch], tuple[TrainState, Metrics]]:
    """``(state, teachers, batch) -> (state, metrics)``, to be jitted by the caller.

    Gradients are accumulated over ``microbatches``, weighted by loss-bearing tokens, so that the
    result is that of one whole batch.
    """

    def train_step(
        state: TrainState, teachers: Mapping[str, Params], batch: Batch
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        micro = jax.tree.map(lambda x: _split(x, microbatches), batch)
        totals = _loss_tokens(batch)

        def accumulate(grads: Any, xs: tuple[Batch, Array]) -> tuple[Any, tuple[Array, Metrics]]:
            rows, index = xs
            share = jax.tree.map(_part, _loss_tokens(rows), totals)
            dropout_key = jax.random.fold_in(key, index)
            (loss, metrics), new = jax.value_and_grad(objective, has_aux=True)(
                state.params, teachers, rows, state.step, share, dropout_key
            )
            light = {name: mean for name, mean in metrics.items() if _is_light(name)}
            return jax.tree.map(jnp.add, grads, new), (loss, light)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, (losses, metrics) = jax.lax.scan(
            accumulate, zeros, (micro, jnp.arange(microbatches))
        )
        metrics = jax.tree.map(lambda parts: parts.sum(axis=0), metrics)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        running = {name: _decayed_sum(old, metrics, name) for name, old in state.running.items()}
        metrics |= {"loss": _scalar(losses.sum()), "tokens": _scalar(batch.valid.sum())}
        metrics |= {f"grad_norm_{group}": _scalar(optax.tree.norm(g)) for group, g in grads.items()}
        metrics |= {f"{name}_running": mean for name, mean in running.items()}
        return TrainState(state.step + 1, params, opt_state, running), metrics

    return train_step


def _is_light(name: str) -> bool:
    """Baselines that cost passes of their own are left to the held-out evaluation."""
    return "cos_constant" not in name and "cos_centered" not in name


def _part(part: Array, total: Array) -> Array:
    return part / jnp.maximum(total, 1)


def _split(x: Array, microbatches: int) -> Array:
    """[B, T] -> [A, B / A, T] by taking every A-th row, so that no row changes its device."""
    return jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1)


def _loss_tokens(batch: Batch) -> Share:
    """Tokens that carry cross-entropy (the first of a row is never predicted) and KV loss."""
    return Share(batch.loss_mask[:, 1:].sum(), batch.kv_mask.sum())


def _decayed_sum(old: Mean, metrics: Metrics, name: str) -> Mean:
    """A running mean of keys and values of all teachers that forgets 5 % a step."""
    new = [mean for key, mean in metrics.items() if key.endswith((f"/{name}_k", f"/{name}_v"))]
    return jax.tree.map(lambda past, *parts: RUNNING_DECAY * past + sum(parts), old, *new)


def _scalar(value: Array) -> Mean:
    return Mean(value.astype(jnp.float32), jnp.ones(()))
