"""What a handoff's projector starts from: a fit in closed form, made before the first step.

For each layer of the answerer, ridge regression of its own keys (before RoPE, with their bias) and
values on those of the layer that the reader hands over to it. Both models read the same training
rows, and the tokens that are handed over count. Nothing is written: a run that goes on has the
projector in its checkpoint.
"""

from collections.abc import Sequence

import jax
import numpy as np

from kava_jax.alignment.closed_form import Fitted, fit
from kava_jax.alignment.projector import Direction
from kava_jax.data.batches import Batch
from kava_jax.data.dataset import Dataset
from kava_jax.models.decoder import Params
from kava_jax.runs.calibrate import RIDGE, measured_rows
from kava_jax.runs.evaluate import batches_of
from kava_jax.runs.moments import Candidates, moments
from kava_jax.runs.prepare import Run
from kava_jax.training.comparison import CacheComparison
from kava_jax.training.handoff_term import HandoffTerm, handed_tokens


def fitted_handoff(run: Run, dataset: Dataset) -> Params | None:
    """The weights of the handoff's projector, where the run keeps them; None where there are none.

    Every teacher is fitted by itself. Raises KavaError for too few training rows.
    """
    part, term = run.blueprint.handoff, run.blueprint.objective.handoff
    # Between equal heads the projector is the identity, which has no weights.
    if part is None or term is None or not jax.tree.leaves(part.abstract):
        return None
    rows = measured_rows(run.config, dataset, "fit loss.handoff's projector")
    batches = [
        batch._replace(kv_mask=np.asarray(handed_tokens(batch))) for batch in batches_of(run, rows)
    ]
    student = run.blueprint.student_start()
    pairs = {name: _fitted(run, term, name, student, batches) for name in term.maps}
    return jax.device_put({"pairs": pairs}, part.shardings)


def _fitted(
    run: Run, term: HandoffTerm, name: str, student: Params, batches: Sequence[Batch]
) -> Fitted:
    """The maps between the student and one teacher, which is loaded for as long."""
    layer_map = term.maps[name]
    direction: Direction = "teacher_to_student"
    candidates = Candidates(layer_map.student_layers, layer_map.teacher_layers)
    # In this map the answerer has the student's place, whoever it is.
    if term.reader == "student":
        direction = "student_to_teacher"
        candidates = Candidates(
            tuple(layer for (layer,) in layer_map.teacher_layers),
            tuple((layer,) for layer in layer_map.student_layers),
        )
    comparison = CacheComparison(name, layer_map)
    grams = moments(run, comparison, student, candidates, {"fit": batches})["fit"]
    return fit((grams["k"], grams["v"]), candidates.windows, direction, RIDGE)
