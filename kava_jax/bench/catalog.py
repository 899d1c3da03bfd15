"""Every benchmark by its name: what it measures, and what of it fits on a screen."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kava_jax.bench import (
    ce,
    decode,
    gpu,
    loss,
    reading,
    remat,
    scaling,
    startup,
    step,
    teacher,
)
from kava_jax.bench.gpu_config import bench_config
from kava_jax.bench.steps import bench_arms, bench_diagnostics
from kava_jax.config_file import load_config, shipped_config
from kava_jax.errors import KavaError
from kava_jax.experiments.grid import load_grid


class Asked(NamedTuple):
    """What a benchmark may be given: a YAML file, overrides, a peer."""

    config: Path | None
    overrides: list[str]
    peer: str | None


class Benchmark(NamedTuple):
    """How to run one, and the values that are shown of its result."""

    run: Callable[[Asked], dict[str, Any]]
    shown: Callable[[Mapping[str, Any]], dict[str, Any]]


def run_benchmark(name: str, asked: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    """The named benchmark's result, and what to show of it.

    Raises KavaError for an unknown name, and for what the benchmark does not take.
    """
    if name not in BENCHMARKS:
        raise KavaError(f"name={name!r} is not a benchmark; use {', '.join(BENCHMARKS)}")
    if asked.peer is not None and name not in ("step", "teacher"):
        raise KavaError(f"--peer={asked.peer}: {name} has its own; only step and teacher are told")
    benchmark = BENCHMARKS[name]
    found = benchmark.run(asked)
    return found, benchmark.shown(found)


def _diagnostics(asked: Asked) -> dict[str, Any]:
    path = asked.config or shipped_config("demo.yaml")
    return bench_diagnostics(load_config(path, asked.overrides))


def _arms(asked: Asked) -> dict[str, Any]:
    path = asked.config or shipped_config("grids/scratch.yaml")
    return bench_arms(*load_grid(path, asked.overrides))


def _step(asked: Asked) -> dict[str, Any]:
    return _fixed("step", lambda: step.bench_step(step.Pair(), asked.peer))(asked)


def _teacher(asked: Asked) -> dict[str, Any]:
    sizes = teacher.TeacherSizes()
    return _fixed("teacher", lambda: teacher.bench_teacher(sizes, asked.peer))(asked)


def _gpu(asked: Asked) -> dict[str, Any]:
    """The named pairs beside their peers, or one config's own step."""
    if asked.config is not None:
        return bench_config(asked.config, asked.overrides)
    return _fixed("gpu", gpu.bench_gpu)(asked)


def _fixed(name: str, measure: Callable[[], dict[str, Any]]) -> Callable[[Asked], dict[str, Any]]:
    """A benchmark whose sizes are its own."""

    def run(asked: Asked) -> dict[str, Any]:
        if asked.config is not None or asked.overrides:
            raise KavaError(f"name={name}: its sizes are fixed; leave --config and overrides out")
        return measure()

    return run


def _probe(found: Mapping[str, Any]) -> dict[str, Any]:
    seconds = {key: found[key]["median"] for key in ("step_seconds", "probe_seconds")}
    return seconds | {"share_of_step": found["share_of_step"]}


def _table(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of everyone that was timed: the median, and as a multiple of ours."""
    return {
        name: f"{own['median']:.4f} s  {found['times_ours'][name]:7.2f}"
        for name, own in found["seconds"].items()
    }


def _cases(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{case}/{name}": text
        for case, own in found["cases"].items()
        for name, text in _table(own).items()
    }


def _sides(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{side}: {figure}": value
        for figure in ("tokens_per_second", "times_faster_than", "memory_over")
        for side, value in found[figure].items()
    }


def _exponents(found: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: curve["exponent"] for axis, curve in found["curves"].items()}


def _waiting(found: Mapping[str, Any]) -> dict[str, Any]:
    medians = {name: own["median"] for name, own in found["seconds"].items()}
    return medians | {f"first step, {k}": s for k, s in found["first_step_seconds"].items()}


def _measured(found: Mapping[str, Any]) -> dict[str, Any]:
    if "jobs" not in found:
        shown = ("rows", "failed", "tokens_per_second", "mfu", "compiled", "device_memory")
        return {name: found[name] for name in shown if name in found}
    return {
        f"{job}: {side}": own.get("tokens_per_second", own.get("failed"))
        for job, sides in found["jobs"].items()
        for side, own in sides.items()
    }


def _own(figure: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda found: found[figure]


BENCHMARKS = {
    "step": Benchmark(_step, _sides),
    "loss": Benchmark(_fixed("loss", lambda: loss.bench_loss(loss.Sizes())), _table),
    "ce": Benchmark(_fixed("ce", lambda: ce.bench_ce(ce.Sizes())), _cases),
    "teacher": Benchmark(_teacher, _own("of_whole")),
    "decode": Benchmark(_fixed("decode", lambda: decode.bench_decode(decode.Sizes())), _table),
    "remat": Benchmark(
        _fixed("remat", lambda: remat.bench_remat(remat.RematSizes())),
        lambda found: found["times_none"]["seconds"],
    ),
    "scaling": Benchmark(
        _fixed("scaling", lambda: scaling.bench_scaling(scaling.Range())), _exponents
    ),
    "input": Benchmark(_fixed("input", reading.bench_input), _own("tokens_per_second")),
    "import": Benchmark(
        _fixed("import", lambda: reading.bench_import(reading.ModelSizes())),
        _own("bytes_per_second"),
    ),
    "startup": Benchmark(_fixed("startup", startup.bench_startup), _waiting),
    "gpu": Benchmark(_gpu, _measured),
    "diagnostics": Benchmark(_diagnostics, _probe),
    "arms": Benchmark(_arms, _own("relative")),
}
