"""Held-out loss and alignment: the objective on rows that are never trained on, without dropout.

Loss and cosine are means over all batches. What needs a whole sample (retrieval, CKA, ranks,
centred cosine) is taken on one sample of tokens, drawn evenly from up to ``EXAMINED`` batches.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import replicated
from kava_jax.training.objective import Metrics, Objective, Statistics
from kava_jax.training.probe import Examination, examine, figures
from kava_jax.training.summary import Figures, summarize, summarize_layers

Measure = Callable[[Mapping[str, Params], Mapping[str, Params], Statistics, Batch], Metrics]

# Some figures compare all pairs of tokens, so their cost grows with the square of TOKENS.
EXAMINED, TOKENS = 8, 1024
# Their values on held-out data would depend on weights and schedules, not on the model.
_LEFT_OUT = ("kv", "dir_loss", "mag_loss")


def make_measure(objective: Objective, mesh: Mesh) -> Measure:
    """A jitted ``(params, teachers, statistics, batch) -> (sum, count) metrics``."""

    def measure(
        params: Mapping[str, Params],
        teachers: Mapping[str, Params],
        statistics: Statistics,
        batch: Batch,
    ) -> Metrics:
        # Step and shares weigh the total, which is not returned; the metrics do not depend on them.
        known = (params, teachers, batch, jnp.zeros((), jnp.int32), (1.0, 1.0), statistics)
        metrics = objective(*known)[1][0]
        if objective.handoff is not None:
            everyone = jnp.ones(batch.tokens.shape[0], bool)
            handed = objective(*known, handed_B=everyone)[1][0]
            metrics |= {name: own for name, own in handed.items() if name.endswith("ce_handed")}
        return metrics

    # Every process reads the figures, and it can read only what its own devices hold.
    return jax.jit(measure, out_shardings=replicated(mesh))


def make_held_out(objective: Objective, mesh: Mesh) -> Callable[..., Figures]:
    """``(params, teachers, statistics, batches, *, whole=True) -> Figures``, compiled once.

    Token-weighted means over all batches: ``eval_loss`` (cross-entropy) and the alignment.
    Alignment figures, when there is a teacher, are named as in training with ``eval_`` before.
    ``statistics`` are the train state's, for the running frame. ``batches`` are called for one
    after the other, so that one is on the devices at a time. Without ``whole`` nothing is figured
    on a whole sample.
    """
    measure = make_measure(objective, mesh)
    look = jax.jit(
        partial(examine, objective), static_argnames="tokens", out_shardings=replicated(mesh)
    )

    def held_out(
        params: Mapping[str, Params],
        teachers: Mapping[str, Params],
        statistics: Statistics,
        batches: Sequence[Callable[[], Batch]],
        *,
        whole: bool = True,
    ) -> Figures:
        total: Metrics | None = None
        # Spread over the whole set, because neighbouring rows may be alike.
        chosen = range(0, len(batches), -(-len(batches) // EXAMINED))
        examined = []
        for number, make in enumerate(batches):
            batch = make()
            metrics = measure(params, teachers, statistics, batch)
            # Sums and counts are added: the mean of batches' means is not the mean over tokens.
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
            if whole and teachers and number in chosen:
                examined.append(look(params, teachers, batch, tokens=TOKENS // len(chosen)))
        return _figures(total or {}, examined)

    return held_out


def _figures(total: Metrics, examined: Sequence[Examination]) -> Figures:
    """What is logged of the sums over all batches and of the samples of some."""
    names = {"ce": "loss", "ce_handed": "loss_handed"}
    values = {names.get(name, name): value for name, value in summarize(total).items()}
    layers: dict[str, list[float]] = {}
    if examined:
        found = summarize_layers(jax.jit(figures)(examined))
        # Of a figure that both have, the mean over all batches counts and not that of the sample.
        values, layers = found.values | values, found.layers
        counted = next(iter(zip(*(one.samples.values() for one in examined), strict=True)))
        values["sampled_tokens"] = float(sum(int(sample.counted.sum()) for sample in counted))
    kept = {
        f"eval_{name}": value
        for name, value in values.items()
        if name.rpartition("/")[2] not in _LEFT_OUT
    }
    return Figures(kept, layers)
