"""Second moments of a student's and a teacher's caches over some batches, on the mesh.

A calibration, and the fit of a handoff's projector, are solved from them. The models run where the
run's sharding puts them; every batch's sums come back to each host, which adds them in float64.
Memory does not depend on the number of batches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kava_jax.alignment.grams import BatchGrams, Grams, Windows, batch_grams, token_mean
from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import batch_sharding, put_batch, replicated
from kava_jax.runs.prepare import Run
from kava_jax.training.comparison import LayerComparison, forward


class Candidates(NamedTuple):
    """Mapped student layers, each as often as it is mapped, and the teacher layers for each."""

    student_layers: tuple[int, ...]
    windows: Windows


class Moments:
    """Streams batches through student and one teacher and sums their second moments.

    The tokens that count are those of the batches' ``kv_mask``.
    """

    def __init__(
        self, run: Run, comparison: LayerComparison, student: Params, candidates: Candidates
    ):
        """Load the teacher and compile nothing yet.

        Args:
            run: one in which nothing is left to measure.
            comparison: names the teacher and says which vectors are measured; its map is not read.
            student: the student's parameters.
            candidates: mapped student layers and their windows.
        """
        self._run, self._student, self._windows = run, student, candidates.windows
        part = run.blueprint.teachers[comparison.name]
        self._teacher = part.load()
        vectors = partial(_vectors, run, comparison, candidates.student_layers)
        shardings = (
            run.blueprint.student.shardings,
            part.part.shardings,
            batch_sharding(run.mesh),
        )
        # Every process solves for the maps by itself, so each needs all of the sums.
        everywhere = replicated(run.mesh)
        # A program of its own: the shift must be known before any product is summed.
        self._means = jax.jit(
            lambda student, teacher, batch: {
                part: tuple(token_mean(x, batch.kv_mask) for x in sides)
                for part, sides in vectors(student, teacher, batch).items()
            },
            in_shardings=shardings,
            out_shardings=everywhere,
        )
        self._grams = jax.jit(
            lambda student, teacher, batch, shifts: {
                part: batch_grams(s, t, batch.kv_mask, *shifts[part], windows=candidates.windows)
                for part, (s, t) in vectors(student, teacher, batch).items()
            },
            in_shardings=(*shardings, everywhere),
            out_shardings=everywhere,
        )
        self._shifts: Any = None

    def of(self, batches: Sequence[Batch]) -> dict[str, Grams]:
        """Moments of keys and of values over the batches."""
        sums: dict[str, Grams] = {}
        for batch in batches:
            placed = put_batch(batch, self._run.mesh)
            # The first batch gives the shift of all splits. It need not be exact, only near.
            if self._shifts is None:
                self._shifts = self._means(self._student, self._teacher, placed)
            found: dict[str, BatchGrams] = self._grams(
                self._student, self._teacher, placed, self._shifts
            )
            for part, of_batch in found.items():
                if part not in sums:
                    shift_s, shift_t = jax.device_get(self._shifts[part])
                    sums[part] = Grams(shift_s, shift_t, self._windows)
                sums[part].add(of_batch)
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
