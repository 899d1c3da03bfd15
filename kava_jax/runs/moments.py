"""Second moments of a student's and a teacher's caches over some batches, on the mesh.

A calibration, and the fit of a handoff's projector, are solved from them. The models run where the
run's sharding puts them; every batch's sums come back to each host, which adds them in float64.
Memory does not depend on the number of batches.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kava_jax.alignment.grams import Grams, Windows, batch_grams, token_mean
from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import batch_sharding, put_batch, replicated
from kava_jax.runs.prepare import Run
from kava_jax.training.comparison import LayerComparison, forward


class Candidates(NamedTuple):
    """Mapped student layers, each as often as it is mapped, and the teacher layers for each."""

    student_layers: tuple[int, ...]
    windows: Windows


def moments(
    run: Run,
    comparison: LayerComparison,
    student: Params,
    candidates: Candidates,
    splits: Mapping[str, Sequence[Batch]],
) -> dict[str, dict[str, Grams]]:
    """Moments of keys and of values over the batches of each split.

    The tokens that count are those of the batches' ``kv_mask``.

    Args:
        run: one in which nothing is left to measure.
        comparison: names the teacher and says which vectors are measured; its map is not read.
        student: the student's parameters.
        candidates: mapped student layers and their windows.
        splits: batches by the name of their split.
    """
    teacher = run.blueprint.teachers[comparison.name]
    models = student, teacher.load()
    vectors = partial(_vectors, run, comparison, candidates.student_layers)
    shardings = (
        run.blueprint.student.shardings,
        teacher.part.shardings,
        batch_sharding(run.mesh),
    )
    # Every process solves for the maps by itself, so each needs all of the sums.
    everywhere = replicated(run.mesh)
    # A program of its own: the shift must be known before any product is summed.
    means = jax.jit(
        lambda student, teacher, batch: {
            part: tuple(token_mean(x, batch.kv_mask) for x in sides)
            for part, sides in vectors(student, teacher, batch).items()
        },
        in_shardings=shardings,
        out_shardings=everywhere,
    )
    products = jax.jit(
        lambda student, teacher, batch, shifts: {
            part: batch_grams(s, t, batch.kv_mask, *shifts[part], windows=candidates.windows)
            for part, (s, t) in vectors(student, teacher, batch).items()
        },
        in_shardings=(*shardings, everywhere),
        out_shardings=everywhere,
    )
    shifts: Any = None
    sums: dict[str, dict[str, Grams]] = {split: {} for split in splits}
    for split, batches in splits.items():
        for batch in batches:
            placed = put_batch(batch, run.mesh)
            # The first batch gives the shift of all splits. It need not be exact, only near.
            if shifts is None:
                shifts = means(*models, placed)
            for part, of_batch in products(*models, placed, shifts).items():
                if part not in sums[split]:
                    shift_s, shift_t = jax.device_get(shifts[part])
                    sums[split][part] = Grams(shift_s, shift_t, candidates.windows)
                sums[split][part].add(of_batch)
    return sums


def _vectors(
    run: Run,
    comparison: LayerComparison,
    student_layers: tuple[int, ...],
    student: Params,
    teacher: Params,
    batch: Batch,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Keys and values of both models, all heads of a token side by side: [L, B, T, E]."""
    objective = run.blueprint.objective
    theirs = objective.teachers[comparison.name].graph
    sides = []
    for graph, params in ((objective.student, student), (theirs, teacher)):
        sides.append(comparison.vectors(forward(graph, params, batch)))
    ours, theirs = (jax.tree.map(lambda x: x.reshape(*x.shape[:3], -1), side) for side in sides)
    mapped = jnp.array(student_layers)
    return {part: (x[mapped], theirs[part]) for part, x in ours.items()}
