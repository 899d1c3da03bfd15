"""``kava bench teacher``: the teacher's pass as it is run, beside a whole forward pass."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from kava_jax.bench.pairs import (
    STUDENT,
    TEACHER,
    VOCABULARY,
    Sizes,
    geometry,
    one_device,
    random_batch,
    random_run,
    write_model,
)
from kava_jax.bench.peers import beside, check_same
from kava_jax.bench.timing import circumstances
from kava_jax.bench.tunix import tunix_forward
from kava_jax.errors import KavaError
from kava_jax.hf.load import load_decoder_params
from kava_jax.models.decoder import Decoder
from kava_jax.parallel.sharding import put_batch
from kava_jax.plan.floor import step_floor
from kava_jax.training.comparison import read

TOLERANCE = 1e-4  # of the largest entry


class TeacherSizes(NamedTuple):
    """What is measured; the defaults are the bench pair's."""

    teacher: Sizes = TEACHER
    student: Sizes = STUDENT
    vocabulary: int = VOCABULARY
    rows: int = 4
    length: int = 256


def bench_teacher(sizes: TeacherSizes, peer: str | None = None) -> dict[str, Any]:
    """Seconds of keys and values of the mapped layers, and of logits and cache of the whole model.

    The cut teacher ends in the last mapped layer, of which only keys and values are projected, and
    has no head; with the default map that is the model's last layer, ``half`` maps the first half
    only. ``floor_flops`` is the teachers' part of ``plan.floor.step_floor``. With ``peer="tunix"``
    also Tunix's whole pass, whose logits, keys and values have to be ours.

    Raises KavaError for another peer, and where it is not installed or gives other numbers.
    """
    if peer not in (None, "tunix"):
        raise KavaError(f"--peer={peer!r} is unknown; use tunix, or leave it out")
    student = geometry(sizes.student, sizes.vocabulary)
    teacher = geometry(sizes.teacher, sizes.vocabulary)
    rows, length = sizes.rows, sizes.length
    depth, mapped = sizes.teacher[0], sizes.student[0]
    half = [[layer * (depth // 2) // mapped, layer] for layer in range(mapped)]
    made = partial(random_run, teacher, student, rows=rows, mesh=one_device())
    runs = {"cut": made(), "half": made(overrides={"teachers.0.layer_map": half})}
    batch = put_batch(random_batch(rows, length, sizes.vocabulary, 0), runs["cut"].mesh)
    work: dict[str, Any] = {}
    for name, run in runs.items():
        cache = jax.jit(partial(_cache, run.teachers["teacher"].link.graph))
        work[name] = partial(cache, run.load_teachers()["teacher"], batch)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "teacher"
        spec = write_model(directory, teacher, np.random.default_rng(0))
        graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
        whole = jax.jit(partial(_logits, graph))
        work["whole"] = partial(whole, load_decoder_params(directory, spec), batch)
        if peer:
            work["tunix"] = partial(tunix_forward(directory, spec), batch.tokens)
            check_same("tunix", work["whole"](), work["tunix"](), TOLERANCE)
    found = beside(work, "cut")
    medians = {name: own["median"] for name, own in found["seconds"].items()}
    floors = {name: step_floor(run, rows, length, 0).teachers for name, run in runs.items()}
    return {
        "name": "teacher",
        "sizes": sizes._asdict(),
        **found,
        "of_whole": {name: own / medians["whole"] for name, own in medians.items()},
        "floor_flops": floors,
        "flops_per_second": {name: floor / medians[name] for name, floor in floors.items()},
        "tokens_per_second": {name: rows * length / own for name, own in medians.items()},
        **circumstances(),
    }


def _cache(graph: Any, params: Any, batch: Any) -> Any:
    return read(graph, params, batch, key_space="post_rope").cache


def _logits(graph: Any, params: Any, batch: Any) -> Any:
    reading = read(graph, params, batch, key_space="post_rope")
    return reading.model.logits(reading.hidden), reading.cache
