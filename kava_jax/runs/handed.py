"""What comes of a run's handoff: its record and weights, and answers from handed-over caches."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import KVCache
from kava_jax.data.dataset import HeldOut
from kava_jax.errors import KavaError
from kava_jax.hf.handoff_files import (
    CarriedFrom,
    HandoffRecord,
    check_teachers,
    read_handoff_record,
)
from kava_jax.journal.checkpoint import Checkpoints, abstract_state
from kava_jax.journal.manifest import Fingerprints
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import layer_rotations
from kava_jax.parallel.sharding import replicated
from kava_jax.runs.blueprint import Blueprint
from kava_jax.runs.evaluate import continuation, evaluate, scored, scores
from kava_jax.runs.prepare import Run, prepare_alone


def record_of(run: Run, fingerprints: Fingerprints) -> HandoffRecord:
    """The record of a run's handoff."""
    term, part = run.blueprint.objective.handoff, run.blueprint.handoff
    assert term is not None
    assert part is not None
    projector: KVDimensionProjector = nnx.merge(part.graph, part.abstract)
    return HandoffRecord(
        teachers={
            teacher.name: CarriedFrom(
                path=teacher.path,
                fingerprint=fingerprints.teachers[teacher.name],
                share=term.shares[teacher.name],
                layer_map=term.maps[teacher.name],
            )
            for teacher in run.config.teachers
        },
        projector=projector.arguments(),
    )


def restore_handoff(run: Run, step: int) -> tuple[HandoffRecord, KVDimensionProjector] | None:
    """The handoff of a run at a step, whole on every process; None of a run without one.

    The teachers need not be there.
    """
    if run.config.loss.handoff is None:
        return None
    record = read_handoff_record(run.directory)
    projector = nnx.eval_shape(lambda: KVDimensionProjector(**record.projector))
    graph, abstract = nnx.split(projector)
    shapes = nnx.to_pure_dict(abstract)
    if jax.tree.leaves(shapes):
        everywhere = jax.tree.map(lambda _: replicated(run.mesh), shapes)
        with Checkpoints(run.directory, run.config.train.max_to_keep, read_only=True) as kept:
            shapes = kept.restore_params(step, "handoff", abstract_state(shapes, everywhere))
    return record, nnx.merge(graph, shapes)


def assess_handed(
    run: Run, held: HeldOut, params: Mapping[str, Params], teachers: Mapping[str, Params]
) -> dict[str, float]:
    """Held-out figures of every teacher alone, and answers of each answerer with their seconds.

    Who answers from a handed-over cache is ``handed``; with the student as the reader, and several
    teachers, each by its name.

    Raises KavaError for a run without a handoff, and for teachers that are other models by now.
    """
    settings = run.config.loss.handoff
    if settings is None:
        raise KavaError(
            f"handoff: {run.directory.name} was trained without loss.handoff, so nothing can be "
            f"handed over"
        )
    models = run.blueprint.teachers
    check_teachers(run.directory, {name: teacher.directory for name, teacher in models.items()})
    found: dict[str, float] = {}
    answering = bool(run.config.eval.max_new_tokens and held.answered)
    if answering:
        found |= timed_answers(run, held, params["student"])
    if answering and settings.reader == "teacher":
        graphs = {name: link.graph for name, link in run.blueprint.objective.teachers.items()}
        past = reading(run.blueprint, graphs, params["handoff"], teachers, answerer=run.blueprint)
        found |= _named("handed/", timed_answers(run, held, params["student"], past))
    for teacher in run.config.teachers:
        alone, named = prepare_alone(run.config, teacher.path), f"{teacher.name}/"
        own = {"student": alone.blueprint.load_student(), "projector": {}}
        found |= _named(named, evaluate(alone, held, own, {}, answers=False))
        if answering:
            found |= _named(named, timed_answers(alone, held, own["student"]))
        if answering and settings.reader == "student":
            reader = {teacher.name: run.blueprint.student.graph}
            weights = {teacher.name: params["student"]}
            past = reading(
                run.blueprint, reader, params["handoff"], weights, answerer=alone.blueprint
            )
            prefix = "handed/" if len(run.config.teachers) == 1 else f"handed/{named}"
            found |= _named(prefix, timed_answers(alone, held, own["student"], past))
    return found


def _named(prefix: str, found: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in found.items()}


def timed_answers(
    run: Run, held: HeldOut, student: Params, past: Callable[..., KVCache] | None = None
) -> dict[str, float]:
    """Exact match of a run's student and the seconds of an answer, compiling left out.

    ``past`` hands it the cache of each prompt (``evaluate.continuation``).
    """
    generate = continuation(run, student, past=past)
    known: set[tuple[int, ...]] = set()
    seconds = 0.0

    def timed(prompt_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
        nonlocal seconds
        # Every length is compiled at its first call.
        if prompt_BT.shape not in known:
            generate(prompt_BT, valid_BT)
            known.add(prompt_BT.shape)
        begun = time.perf_counter()
        answers = generate(prompt_BT, valid_BT)
        seconds += time.perf_counter() - begun
        return answers

    found = scored(run, held, timed)
    return scores(found) | {"seconds_per_answer": seconds / found.rows}


def reading(
    blueprint: Blueprint,
    readers: Mapping[str, nnx.GraphDef[Decoder]],
    handoff: Params,
    weights: Mapping[str, Params],
    answerer: Blueprint,
) -> Callable[..., KVCache]:
    """``(prompt, valid, lengths) -> past`` of left-padded prompts, read by some models.

    ``handoff`` and ``weights`` are the parameters of its projector and of the readers; ``answerer``
    is the run whose student goes on from there.
    """
    term, spec = blueprint.objective.handoff, answerer.student_spec
    assert term is not None

    @jax.jit
    def past(
        params: Params, weights: Mapping[str, Params], prompt_BT: Any, valid_BT: Any, lengths_B: Any
    ) -> KVCache:
        # The answerer reads the last token itself.
        tokens_BT, valid_BT = prompt_BT[:, :-1], valid_BT[:, :-1]
        positions_BT = token_positions(valid_BT)
        caches, layers = {}, {}
        for name, graph in readers.items():
            model = nnx.merge(graph, weights[name])
            # Kernels take no padding on the left.
            model.attention = "xla"
            mask = attention_mask(positions_BT, positions_BT, valid_BT, model.spec.windows)
            layers[name] = term.maps[name].read_layers
            _, caches[name] = model(
                tokens_BT, positions_BT, mask, key_space="pre_rope", layers=layers[name]
            )
        # Cached keys are never rotated again: the row's full length counts, as in ``generate``.
        rotation = layer_rotations(spec, positions_BT, lengths_B)
        return term.handoff(params, layers)(caches, rotation)

    return partial(past, handoff, dict(weights))
