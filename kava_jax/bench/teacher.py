"""``kava bench teacher``: the teacher's pass as it is run, beside a whole forward pass."""

from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from kava_jax.bench.pairs import Sizes, geometry, random_batch, random_run
from kava_jax.bench.timing import alternate, circumstances, summary
from kava_jax.models.decoder import Decoder
from kava_jax.parallel.sharding import put_batch
from kava_jax.plan.floor import step_floor
from kava_jax.training.comparison import read


class TeacherSizes(NamedTuple):
    """What is measured; the defaults are the bench pair's."""

    teacher: Sizes = (8, 512, 8, 4, 1408)
    student: Sizes = (4, 256, 8, 2, 704)
    vocabulary: int = 151_936
    rows: int = 4
    length: int = 256


def bench_teacher(sizes: TeacherSizes) -> dict[str, Any]:
    """Seconds of keys and values of the mapped layers, and of logits and cache of the whole model.

    The cut teacher ends in the last mapped layer, of which only keys and values are projected, and
    has no head; with the default map that is the model's last layer, ``half`` maps the first half
    only. ``floor_flops`` is the teachers' part of ``plan.floor.step_floor``.
    """
    student = geometry(sizes.student, sizes.vocabulary)
    teacher = geometry(sizes.teacher, sizes.vocabulary)
    rows, length = sizes.rows, sizes.length
    depth, mapped = sizes.teacher[0], sizes.student[0]
    half = [[layer * (depth // 2) // mapped, layer] for layer in range(mapped)]
    runs = {
        "cut": random_run(teacher, student, rows=rows),
        "half": random_run(teacher, student, rows=rows, overrides={"teachers.0.layer_map": half}),
    }
    batch = put_batch(random_batch(rows, length, sizes.vocabulary, 0), runs["cut"].mesh)
    work: dict[str, Any] = {}
    for name, run in runs.items():
        graph = run.teachers["teacher"].link.graph
        weights = run.load_teachers()["teacher"]
        work[name] = partial(_wait, jax.jit(partial(_cache, graph)), weights, batch)
    whole, weights = _whole(runs["cut"])
    work["whole"] = partial(_wait, jax.jit(partial(_logits, whole)), weights, batch)
    seconds = {name: summary(own) for name, own in alternate(work).items()}
    medians = {name: own["median"] for name, own in seconds.items()}
    return {
        "name": "teacher",
        "sizes": sizes._asdict(),
        "seconds": seconds,
        "of_whole": {name: own / medians["whole"] for name, own in medians.items()},
        "floor_flops": {
            name: step_floor(run, rows, length, 0).teachers for name, run in runs.items()
        },
        "flops_per_second": {
            name: step_floor(run, rows, length, 0).teachers / medians[name]
            for name, run in runs.items()
        },
        "tokens_per_second": {name: rows * length / own for name, own in medians.items()},
        **circumstances(),
    }


def _whole(run: Any) -> tuple[Any, Any]:
    """The same teacher with all its layers and its head, and random weights."""
    spec = run.teachers["teacher"].spec
    graph, state = nnx.split(Decoder(spec, rngs=nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(state)


def _cache(graph: Any, params: Any, batch: Any) -> Any:
    return read(graph, params, batch, key_space="pre_rope").cache


def _logits(graph: Any, params: Any, batch: Any) -> Any:
    reading = read(graph, params, batch, key_space="pre_rope")
    return reading.model.logits(reading.hidden), reading.cache


def _wait(run: Any, params: Any, batch: Any) -> None:
    jax.block_until_ready(run(params, batch))
