"""Will it fit, and what will it cost: one mesh planned, or every mesh that fits ranked."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import AXES, batch_shards, check_slices, make_mesh
from kava_jax.plan.accelerators import described_devices, own_memory
from kava_jax.plan.chips import Chip, roofline
from kava_jax.plan.compiled import QUICK, compile_step, held, lowered, memory_of, uncached
from kava_jax.plan.floor import step_floor
from kava_jax.plan.gpus import GPUS
from kava_jax.plan.most_rows import Boundary, Tried, find_boundary
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.calibrate import unmeasured
from kava_jax.runs.prepare import models_without_weights

# The compiler for CPUs widens bfloat16 and keeps wide copies of whole models. So temporaries are
# taken from a program that is float32 throughout. An accelerator needs at most that, and about this
# part of it where everything can be bfloat16. docs/pods.md compares them with the TPUs' compiler.
NARROWEST = 0.45
# Of a GPU's bytes JAX takes the first share by itself, the second where the variable says so.
SHARES = (0.75, 0.92)
SHARE_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclass(frozen=True)
class Range:
    """At least and at most; equal when exact."""

    least: float
    most: float


@dataclass(frozen=True)
class Plan:
    """One mesh. Bytes, FLOPs and messages are per device; times are seconds."""

    name: str
    mesh: Mapping[str, int]
    devices: int
    chip: str
    hbm: float
    rows: int
    length: int
    held: Mapping[str, int]
    estimated: Range
    """Bytes of temporaries by the compiler for CPUs."""
    temporaries: Range
    """As estimated, or exactly where ``exact``."""
    peak: Range
    exact: bool
    """Whether the device's own compiler laid the memory out."""
    verdict: str
    """``fits``, ``may fit`` or ``does not fit``."""
    largest_batch: tuple[int, int]
    """Rows of the whole batch that fit, surely and at best, by the estimate."""
    boundaries: tuple[Boundary, ...]
    """The largest batches of a GPU, by its own compiler, under both shares of its memory."""
    flops: float
    floor: float
    """The fewest FLOPs that such a step can do, all devices together."""
    flops_over_floor: float
    messages: Mapping[str, float]
    time: Mapping[str, float]
    tokens_per_second: Range
    """All devices together, padding included."""


def virtual_devices(count: int) -> None:
    """Make this process see ``count`` CPU devices. Call it before JAX is used for anything.

    Raises KavaError when it came too late.
    """
    try:
        # The CUDA plugin, where it is installed, would otherwise look for a driver.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # devices are counted once
        if jax.device_count() != count:
            raise KavaError(
                f"--devices={count}: this process already sees {jax.device_count()} devices; plan "
                f"in a new one"
            ) from None


def make_plan(config: Config, chip: Chip, hbm: float, say: Callable[[str], None]) -> Plan:
    """The plan for the config's mesh over all (virtual) devices of this process.

    ``hbm`` is the memory of one device in bytes; ``say`` is told what takes long. Raises KavaError
    for whatever does not fit together.
    """
    config = _as_on(chip, config)
    blueprint = _blueprint(config, chip)
    return _plan(blueprint, chip, hbm, _by_own_compiler(config, chip, say))


def compile_for(config: Config, chip: Chip) -> Any:
    """The step for as many chips as this process has (virtual) devices, by the chips' own compiler.

    Raises KavaError where that is not installed or there is no such slice.
    """
    devices = described_devices(chip, jax.device_count())
    if devices is None:
        raise KavaError(
            f"--chip={chip.name} --devices={jax.device_count()}: no compiler for it is installed, "
            f"or there is no such slice; pip install 'kava_jax[cuda]' or 'kava_jax[tpu]'"
        )
    blueprint = _blueprint(_as_on(chip, config), chip, devices)
    with uncached():
        return lowered(blueprint, config.data.batch_size, config.data.max_length).compile()


def search(config: Config, chip: Chip, hbm: float, say: Callable[[str], None]) -> list[Plan]:
    """Plans of every mesh over this process's devices that fits or may fit, the fastest first.

    Raises KavaError when there is none.
    """
    models_without_weights(config)  # a missing model is refused here, and not once for every mesh
    found = []
    for mesh in _meshes(jax.device_count()):
        config_there = _as_on(chip, config).model_copy(
            update={"mesh": config.mesh.model_copy(update=mesh)}
        )
        written = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
        try:
            blueprint = _blueprint(config_there, chip)
        except KavaError:  # something is not divisible
            continue
        rows, length = config.data.batch_size, config.data.max_length
        # Exact without a compilation, so a hopeless mesh costs no time.
        if sum(held(blueprint, rows, length).values()) > hbm:
            say(f"{written}: weights and moments alone are too many")
            continue
        # By the estimate alone: the chip's own compiler takes up to a minute for every mesh.
        plan = _plan(blueprint, chip, hbm)
        say(f"{written}: {plan.verdict}")
        if plan.verdict != "does not fit":
            found.append(plan)
    if not found:
        raise KavaError(
            f"--devices={jax.device_count()}: no mesh of so many devices with {hbm / 1e9:g} GB fits"
            f" data.batch_size={config.data.batch_size}; use more devices, a smaller batch, "
            f"train.grad_accumulation or student.remat=full"
        )
    return sorted(found, key=lambda plan: plan.time["most"])


def _plan(blueprint: Blueprint, chip: Chip, hbm: float, own: "_Own | None" = None) -> Plan:
    config = blueprint.config
    rows, length = config.data.batch_size, config.data.max_length
    work, memory = compile_step(blueprint, rows, length)
    fixed = memory.arguments + memory.results
    estimated, largest_batch = _estimate(config, chip, hbm - fixed)
    temporaries = Range(own[0], own[0]) if own else estimated
    peak = Range(fixed + temporaries.least, fixed + temporaries.most)
    may_fit = "may fit" if peak.least <= hbm else "does not fit"
    time = roofline(work, memory.arguments + temporaries.most, chip)
    # Prompts and padding are not known here: all tokens but each row's first are predicted.
    floor = sum(step_floor(blueprint, rows, length, rows * (length - 1)).values())
    return Plan(
        name=config.run.name,
        mesh=dict(blueprint.mesh.shape),
        devices=blueprint.mesh.size,
        chip=chip.name,
        hbm=hbm,
        rows=rows,
        length=length,
        held=held(blueprint, rows, length),
        estimated=estimated,
        temporaries=temporaries,
        peak=peak,
        exact=own is not None,
        verdict="fits" if peak.most <= hbm else may_fit,
        largest_batch=largest_batch,
        boundaries=own[1] if own else (),
        flops=work.flops,
        floor=floor,
        flops_over_floor=work.flops * blueprint.mesh.size / floor,
        messages=work.bytes_by_kind(),
        time=time,
        tokens_per_second=Range(rows * length / time["most"], rows * length / time["least"]),
    )


def _estimate(config: Config, chip: Chip, room: float) -> tuple[Range, tuple[int, int]]:
    """Temporaries by the compiler for CPUs, and rows that have room for them.

    Both are for the same run in float32 throughout. Temporaries are a line over the rows, drawn
    through two sizes of batch. ``room`` is in bytes; rows that fit into it are given surely and at
    best.
    """
    raw = dump_config(config)
    raw["train"]["dtype"] = "float32"
    blueprint, rows = _blueprint(parse_config(raw), chip), config.data.batch_size
    unit, length = _unit(blueprint), config.data.max_length
    other = 2 * rows  # larger, because small batches hold what does not grow
    here, there = (
        memory_of(lowered(blueprint, size, length, dearest=True).compile(QUICK)).temporaries
        for size in (rows, other)
    )
    # Where nothing grows with the rows there is no line, and no batch is too large.
    of_row = max((here - there) / (rows - other), 1.0)
    surely, at_best = (
        # Where an accelerator needs ``share`` of these temporaries, room / share of them fit.
        max(0, int(rows + (room / share - here) / of_row) // unit * unit)
        for share in (1.0, NARROWEST)
    )
    return Range(NARROWEST * here, float(here)), (surely, at_best)


# What the chip's own compiler says: bytes of temporaries, and for a GPU the largest batches.
_Own = tuple[float, tuple[Boundary, ...]]


def _by_own_compiler(config: Config, chip: Chip, say: Callable[[str], None]) -> _Own | None:
    """None where the compiler is not installed."""
    devices = described_devices(chip, jax.device_count())
    if devices is None:
        return None
    blueprint, length = _blueprint(config, chip, devices), config.data.max_length

    def attempt(rows: int) -> Tried:
        memory = own_memory(blueprint, rows, length)
        found = Tried(rows, memory.arguments, memory.temporaries)
        say(f"{rows} rows, compiled for {chip.name}: {found.needed / 1e9:.2f} GB of a device")
        return found

    tried, boundaries = [attempt(config.data.batch_size)], []
    temporaries = float(tried[0].temporaries)
    if chip.name in GPUS:
        unit, memory = _unit(blueprint), GPUS[chip.name].memory
        boundaries = [find_boundary(attempt, unit, tried, share, memory) for share in SHARES]
    return temporaries, tuple(boundaries)


def _unit(blueprint: Blueprint) -> int:
    """Batches are multiples of this number of rows."""
    return batch_shards(blueprint.mesh) * blueprint.config.train.grad_accumulation


def _blueprint(config: Config, chip: Chip, devices: list[Any] | None = None) -> Blueprint:
    """The blueprint; refused where the TPUs are several slices that the mesh cannot cross."""
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    blueprint = make_blueprint(config, mesh, models_without_weights(config), {})
    if chip.topology is not None:
        # Rounded up: a slice that is used in part has to be reached too.
        check_slices(mesh.shape["data"], -(-mesh.size // chip.domain))
    return blueprint


def _as_on(chip: Chip, config: Config) -> Config:
    """The config as it runs there: ``auto`` is bfloat16, and nothing is left to measure."""
    raw = dump_config(unmeasured(config))
    # In this process, which sees CPU devices only, ``auto`` would be float32.
    raw["train"]["dtype"] = raw["train"]["dtype"].replace("auto", "bfloat16")
    # The devices that it is compiled for are not those that it is meant for.
    raw["train"]["attention"] = "auto"
    return parse_config(raw)


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to write the number of devices as data x fsdp x tensor."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor, fsdp in itertools.product(divisors, divisors):
        if devices % (tensor * fsdp) == 0:
            yield dict(zip(AXES, (devices // tensor // fsdp, fsdp, tensor), strict=True))
