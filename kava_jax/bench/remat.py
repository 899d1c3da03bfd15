"""``kava bench remat``: what recomputing activations saves, and what it costs."""

from typing import Any, NamedTuple

from kava_jax.bench.pairs import TEACHER, Sizes, Stepping, geometry, random_batch, random_run
from kava_jax.bench.timing import alternate, circumstances, summary
from kava_jax.plan.compiled import compile_step

POLICIES = ("none", "dots", "full")


class RematSizes(NamedTuple):
    """Deep enough that activations, and not the vocabulary, take the memory."""

    teacher: Sizes = TEACHER
    student: Sizes = (16, 256, 8, 2, 704)
    vocabulary: int = 8192
    rows: int = 8
    length: int = 256


def bench_remat(sizes: RematSizes) -> dict[str, Any]:
    """Seconds, temporaries and FLOPs of the train step under every ``student.remat``.

    Temporaries are bytes of the compiled program; ``times_none`` sets both beside no recomputation.
    """
    shapes = [geometry(size, sizes.vocabulary) for size in (sizes.teacher, sizes.student)]
    rows, length = sizes.rows, sizes.length
    work, temporaries, flops = {}, {}, {}
    for policy in POLICIES:
        overrides = {"student.remat": policy}
        run = random_run(*shapes, rows=rows, overrides=overrides)
        work[policy] = Stepping(run, random_batch(rows, length, sizes.vocabulary, length // 2))
        program = compile_step(run, rows, length)
        temporaries[policy] = program.memory.temporaries
        flops[policy] = program.work.flops
    seconds = {policy: summary(own) for policy, own in alternate(work).items()}
    return {
        "name": "remat",
        "sizes": sizes._asdict(),
        "seconds": seconds,
        "temporaries": temporaries,
        "flops": flops,
        "times_none": {
            "seconds": {p: own["median"] / seconds["none"]["median"] for p, own in seconds.items()},
            "temporaries": {p: own / temporaries["none"] for p, own in temporaries.items()},
            "flops": {p: own / flops["none"] for p, own in flops.items()},
        },
        **circumstances(),
    }
