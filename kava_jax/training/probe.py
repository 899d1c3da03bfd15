"""What is too dear to measure at every step: gradient shares, and what a cosine alone hides.

A probe looks at one training batch before its step is taken, without dropout. It changes nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float

from kava_jax.alignment.attention import attention_output_cosine
from kava_jax.data.batches import Batch
from kava_jax.diagnostics import (
    TokenSample,
    alignment,
    diagnose,
    gradient_share,
    join,
    sample_tokens,
)
from kava_jax.geometry import Mean
from kava_jax.models.decoder import Params
from kava_jax.training.objective import Objective
from kava_jax.training.share import split_gradients
from kava_jax.training.step import TrainState, split_rows

# Of one probe: enough for stable figures, few enough to cost little compared with the steps.
ROWS, TOKENS = 8, 512

Layers = dict[str, Float[Array, "P"]]


class Examination(NamedTuple):
    """Samples and cosines of both sides by ``teacher/part``, and attention outputs by teacher."""

    samples: dict[str, TokenSample]
    aligned: dict[str, dict[str, Mean]]
    attention: dict[str, Mean]


def examine(
    objective: Objective,
    params: Mapping[str, Params],
    teachers: Mapping[str, Params],
    batch: Batch,
    *,
    tokens: int,
) -> Examination:
    """Sample ``tokens`` compared vectors of a batch, and read both caches with the space's queries.

    A teacher whose target joins or mixes several of its layers has no queries of its own there, and
    no entry in ``attention``; nor has one whose layers' outputs are compared.
    """
    samples, aligned, attention = {}, {}, {}
    for name, (compared, student, teacher) in objective.compared(params, teachers, batch).items():
        for part in compared[0]:
            ours, theirs, own = (side[part] for side in compared)
            samples[f"{name}/{part}"] = sample_tokens(ours, theirs, batch.kv_mask, tokens, own)
            aligned[f"{name}/{part}"] = alignment(ours, theirs, batch.kv_mask, own)
        comparison, direction = objective.teachers[name].comparison, objective.direction
        if comparison.can_attend(direction):
            read = comparison.attended(compared, direction, student, teacher)
            attention[name] = attention_output_cosine(read, batch.kv_mask)
    return Examination(samples, aligned, attention)


def figures(examinations: Sequence[Examination]) -> Layers:
    """Per-layer figures of all examinations together, as ``teacher/figure_part``."""
    first = examinations[0]
    result: Layers = {}
    for key in first.samples:
        name, part = key.split("/")
        measured = diagnose(join([one.samples[key] for one in examinations]))
        result |= {f"{name}/{field}_{part}": x for field, x in measured.items()}
        cosines = _added([one.aligned[key] for one in examinations])
        result[f"{name}/cos_sim_{part}"] = cosines["cos"].value
        result[f"{name}/cos_shuffled_{part}"] = cosines["cos_shuffled"].value
    for name in first.attention:
        result[f"{name}/attention_cos"] = _added(
            [one.attention[name] for one in examinations]
        ).value
    return result


def _added(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: sum(parts), *trees)


class Probed(NamedTuple):
    """What one probe found."""

    gradients: dict[str, Float[Array, ""]]
    """``kv_gradient_share``: ``||weight * g_kv|| / ||g_language||`` with the weights that were in
    force; ``kv_gradient_cosine``: of the two gradients."""
    layers: Layers


def make_probe(
    objective: Objective,
    *,
    kv_weight: optax.Schedule,
    microbatches: int,
) -> Callable[[TrainState, Mapping[str, Params], Batch], Probed]:
    """``(state, teachers, batch) -> Probed``, to be jitted by the caller.

    Everything is measured on a few rows of the first microbatch, gradients on the student's
    parameters.
    """

    def probe(state: TrainState, teachers: Mapping[str, Params], batch: Batch) -> Probed:
        few = _few_rows(batch, microbatches, objective.batch_shards)

        def losses(student: Params) -> Any:
            params = state.params | {"student": student}
            known = (state.step, (1.0, 1.0), state.statistics)
            return objective(params, teachers, few, *known)

        _, _, of_language, of_kv = split_gradients(losses, state.params["student"])
        unweighted, cosine = gradient_share(of_kv, of_language)
        layers = figures([examine(objective, state.params, teachers, few, tokens=TOKENS)])
        in_force = unweighted * kv_weight(state.step) * state.kv_scale.value
        return Probed({"kv_gradient_share": in_force, "kv_gradient_cosine": cosine}, layers)

    return probe


def _few_rows(batch: Batch, microbatches: int, shards: int) -> Batch:
    """ROWS of the first microbatch's rows or a few more, equally many on each device."""
    of_device = batch.tokens.shape[0] // microbatches // shards
    wanted = min(of_device, math.ceil(ROWS / shards))
    # ``split_rows`` cuts into equal parts only, so the rows must divide those of a device.
    kept = next(n for n in range(wanted, of_device + 1) if of_device % n == 0)
    return jax.tree.map(lambda x: x[0], split_rows(batch, microbatches * (of_device // kept)))
