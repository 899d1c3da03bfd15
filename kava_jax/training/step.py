"""The state of a run and the one function that advances it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt32

from kava_jax.alignment.frame import TokenMean, decay, merge, merge_stacked
from kava_jax.data.batches import Batch
from kava_jax.geometry import Mean
from kava_jax.models.decoder import Params
from kava_jax.training.objective import Metrics, Objective, Statistics
from kava_jax.training.share import LossScale, rescaled, split_gradients

# A batch, or one with what goes along with its rows.
Rows = TypeVar("Rows")
# ``(params, rows, handed_B, index) -> ((language, kv), (metrics, statistics))`` of a microbatch.
Losses = Callable[..., Any]
# Of the means for the display: about the last twenty steps count.
RUNNING_DECAY = 0.95
# Running means of the frame forget one hundredth a step: about a hundred batches count.
MEMORY = 0.99


class Skips(NamedTuple):
    """Steps whose loss or gradient was not finite: all of them, and those since the last good one.

    Such a step changes nothing but the step number and these counts.
    """

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]


class TrainState(NamedTuple):
    """All that a run needs to go on exactly; the teachers are not part of it.

    Randomness is ``fold_in(seed, step)`` and batches are addressed by step, so the step number is
    the whole state of both. The seed is here and not in the step's code, so that runs which differ
    in nothing else share one compiled step.
    """

    step: Int[Array, ""]
    seed: UInt32[Array, ""]
    params: dict[str, Params]
    """``student``, ``projector`` (which may be empty), and ``handoff`` where there is one."""
    opt_state: Any
    running: Metrics
    """Decayed means for the display."""
    statistics: Statistics
    """Running means of the frame."""
    kv_scale: LossScale
    """Times the scheduled KV weight: 1, or as measured for a share of the language gradient."""
    skips: Skips


def initial_state(
    params: dict[str, Params],
    optimizer: optax.GradientTransformation,
    statistics: Statistics,
    seed: int | Array = 0,
    *,
    taught: bool = True,
) -> TrainState:
    """Step 0 of a run over ``{"student": ..., "projector": ...}``; ``taught``: with a teacher."""
    zero = Mean(jnp.zeros(()), jnp.zeros(()))
    # Without a teacher there is nothing to show a running mean of. A projector without parameters
    # says nothing of that.
    running = {"cos": zero, "cos_shuffled": zero} if taught else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        params=params,
        opt_state=optimizer.init(params),
        running=running,
        statistics=statistics,
        kv_scale=LossScale(jnp.ones(()), zero),
        skips=Skips(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    kv_weight: optax.Schedule,
    microbatches: int,
    share: float | None = None,
) -> Callable[[TrainState, Mapping[str, Params], Batch], tuple[TrainState, Metrics]]:
    """``(state, teachers, batch) -> (state, metrics)``, to be jitted by the caller.

    Gradients are accumulated over ``microbatches``, weighted by loss-bearing tokens, so that the
    result is that of one whole batch. A step whose loss or gradient is not finite is skipped.

    With ``share`` the step first measures its KV weight: on the first microbatch and the student's
    parameters, ``||weight * g_kv|| / ||g_language||`` is then that share (see :func:`rescaled`).
    That costs one backward pass of a microbatch, and no forward pass.
    """

    def train_step(
        state: TrainState, teachers: Mapping[str, Params], batch: Batch
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        batch, handed_B = objective.dealt(key, batch)
        # Counted before the batch is split: microbatches hold different numbers of tokens, and the
        # mean of their means is not the mean over tokens.
        totals = loss_tokens(batch)

        def losses(params: Any, rows: Batch, handed_B: Array | None, index: Array) -> Any:
            # The two terms come bare, so that a share can be measured before KV gets its weight.
            # A batch may have no token with a loss; a share of it is then 0 and not NaN.
            shares = jax.tree.map(lambda n, of: n / jnp.maximum(of, 1), loss_tokens(rows), totals)
            dropout_key = jax.random.fold_in(key, index)
            known = (state.step, shares, state.statistics, dropout_key, handed_B)
            return objective(params, teachers, rows, *known)

        micro = (*split_rows((batch, handed_B), microbatches), jnp.arange(microbatches))
        factor, scale = jnp.asarray(kv_weight(state.step)), state.kv_scale
        if share is None:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, found = _accumulated(zeros, losses, state.params, micro, factor * scale.value)
        else:
            grads, found, scale = _measured(losses, state.params, micro, factor, scale, share)
        value, (metrics, seen) = found
        metrics = jax.tree.map(lambda parts: parts.sum(axis=0), metrics)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        of = [(teacher, part) for teacher in sorted(objective.teachers) for part in objective.parts]
        running = {
            name: _decayed_sum(old, [metrics[f"{teacher}/{name}_{part}"] for teacher, part in of])
            for name, old in state.running.items()
        }
        metrics |= {"loss": _scalar(value.sum()), "tokens": _scalar(batch.valid.sum())}
        metrics |= {f"grad_norm_{group}": _scalar(optax.tree.norm(g)) for group, g in grads.items()}
        metrics |= {f"{name}_running": mean for name, mean in running.items()}
        metrics |= {"kv_weight": _scalar(factor * scale.value)} if objective.teachers else {}
        new = state._replace(
            params=params,
            opt_state=opt_state,
            running=running,
            statistics=remembered(state.statistics, seen),
            kv_scale=scale,
        )
        # A loss can be finite where its gradient is not. One NaN or infinity anywhere spoils the
        # norm of its group, so the norms say it all.
        norms = [metrics[f"grad_norm_{group}"].sum for group in grads]
        finite = jnp.isfinite(jnp.stack([metrics["loss"].sum, *norms])).all()
        # Decided on the device, because asking the host would make it wait for every step.
        new = jax.tree.map(partial(jnp.where, finite), new, state)
        old = state.skips
        skips = Skips(old.total + ~finite, jnp.where(finite, 0, old.in_a_row + 1))
        metrics |= {"skipped": _scalar(skips.total)}
        # The step number moves on even so: batches are addressed by it, and the same one would only
        # fail again.
        return new._replace(step=state.step + 1, skips=skips), metrics

    return train_step


def _accumulated(grads: Any, losses: Losses, params: Any, micro: Any, weight: Array) -> Any:
    """``grads`` and those of ``language + weight * kv``; values and what was seen, stacked."""

    def accumulate(grads: Any, xs: tuple[Any, ...]) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[Array, Any]:
            (language, kv), seen = losses(params, *xs)
            return language + weight * kv, seen

        found, new = jax.value_and_grad(loss, has_aux=True)(params)
        # Gradients are added as they come. Means of the frame are stacked, because
        # ``merge_stacked`` needs each with its own count.
        return jax.tree.map(jnp.add, grads, new), found

    # A loop of XLA's: activations of one microbatch exist at a time, and its code is compiled once.
    return jax.lax.scan(accumulate, grads, micro)


def _measured(
    losses: Losses, params: Any, micro: Any, factor: Any, scale: LossScale, share: float
) -> tuple[Any, Any, LossScale]:
    """The same with the scale that the first microbatch asks for, and that scale."""
    first, rest = (jax.tree.map(lambda x, cut=cut: x[cut], micro) for cut in (0, slice(1, None)))
    (language, kv), seen, of_language, of_kv = split_gradients(
        lambda params: losses(params, *first), params
    )
    scale = rescaled(scale, of_kv["student"], of_language["student"], factor, share)
    weight = factor * scale.value
    grads = jax.tree.map(lambda x, y: x + weight * y, of_language, of_kv)
    own = jax.tree.map(lambda x: x[None], (language + weight * kv, seen))
    if not len(rest[-1]):
        return grads, own, scale
    grads, found = _accumulated(grads, losses, params, rest, weight)
    return grads, jax.tree.map(lambda *parts: jnp.concatenate(parts), own, found), scale


def remembered(old: Statistics, seen: Statistics) -> Statistics:
    """The statistics after one more step; ``seen`` has a leading axis of microbatches."""

    def mean(before: TokenMean, parts: TokenMean) -> TokenMean:
        return merge(decay(before, MEMORY), merge_stacked(parts))

    # ``TokenMean`` is a tree itself, and counts and means cannot be merged one without the other.
    return jax.tree.map(mean, old, seen, is_leaf=lambda x: isinstance(x, TokenMean))


def compiler_options(platform: str) -> dict[str, str]:
    """What the step's compiler is told beyond its defaults.

    ``student.remat`` says what is computed twice. Where a step needs more than 80 % of a GPU's
    memory, XLA adds a choice of its own: it repeats matrix products of the layers and of the LM
    head, and frees nothing by it (docs/performance.md has the figures).
    """
    return {"xla_disable_hlo_passes": "rematerialization"} if platform == "gpu" else {}


def split_rows(batch: Rows, parts: int) -> Rows:
    """[B, ...] -> [A, B / A, ...] by taking every A-th row, so that no row changes its device."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def loss_tokens(batch: Batch) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Tokens that carry cross-entropy (the first of a row is never predicted) and KV loss."""
    return batch.loss_mask[:, 1:].sum(), batch.kv_mask.sum()


def _decayed_sum(old: Mean, new: Sequence[Mean]) -> Mean:
    """A running mean of all parts of all teachers that forgets 5 % a step."""
    # Sum and count fade alike, so their quotient stays a mean, weighted by tokens.
    return jax.tree.map(lambda past, *parts: RUNNING_DECAY * past + sum(parts), old, *new)


def _scalar(value: Array) -> Mean:
    return Mean(value.astype(jnp.float32), jnp.ones(()))
