"""Will it fit, and what will it cost: one mesh planned, or every mesh that fits ranked."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax

from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import AXES, batch_shards, check_slices, make_mesh
from kava_jax.plan.accelerators import described_devices, own_memory
from kava_jax.plan.chips import Chip
from kava_jax.plan.compiled import compile_step, compiled_memory, held, lowered
from kava_jax.plan.floor import step_floor
from kava_jax.plan.gpus import GPUS
from kava_jax.plan.most_rows import Boundary, RowSearch, Tried
from kava_jax.plan.roofline import Roofline, roofline
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.calibrate import unmeasured
from kava_jax.runs.prepare import models_without_weights

# The compiler for CPUs widens bfloat16 and keeps wide copies of whole models, so temporaries are
# those of a program that is float32 throughout: an accelerator's are at most that, and about this
# part of it where all could be bfloat16. docs/pods.md has them beside the compiler for TPUs.
NARROWEST = 0.45
# Of a GPU's bytes JAX takes the first share by itself, the second where the variable says so.
SHARES = (0.75, 0.92)
SHARE_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


class Range(NamedTuple):
    """Bytes, at least and at most; equal when exact."""

    least: float
    most: float


@dataclass(frozen=True)
class Plan:
    """One mesh. Bytes, FLOPs and messages are those of one device; times are seconds."""

    name: str
    mesh: Mapping[str, int]
    chip: str
    hbm: float
    rows: int
    length: int
    held: Mapping[str, int]
    estimated: Range
    """Temporaries by the compiler for CPUs."""
    temporaries: Range
    """As estimated, or exactly where ``exact``."""
    peak: Range
    exact: bool
    """Whether the device's own compiler laid the memory out."""
    largest_batch: tuple[int, int]
    """Rows of the whole batch that fit, surely and at best, by the estimate."""
    boundaries: tuple[Boundary, ...]
    """The largest batches of a GPU, by its own compiler, under both shares of its memory."""
    flops: float
    floor: float
    """The fewest FLOPs that such a step can do, all devices together."""
    messages: Mapping[str, float]
    time: Roofline

    @property
    def devices(self) -> int:
        """How many there are."""
        size = 1
        for axis in self.mesh.values():
            size *= axis
        return size

    @property
    def verdict(self) -> str:
        """``fits``, ``may fit`` or ``does not fit``."""
        if self.peak.most <= self.hbm:
            return "fits"
        return "may fit" if self.peak.least <= self.hbm else "does not fit"

    @property
    def tokens_per_second(self) -> Range:
        """All devices together, padding included."""
        tokens = self.rows * self.length
        return Range(tokens / self.time.most, tokens / self.time.least)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {
            "estimated": self.estimated._asdict(),
            "temporaries": self.temporaries._asdict(),
            "peak": self.peak._asdict(),
            "boundaries": [one.as_dict() for one in self.boundaries],
            "time": self.time._asdict() | {"least": self.time.least, "most": self.time.most},
            "devices": self.devices,
            "verdict": self.verdict,
            "flops_over_floor": self.flops * self.devices / self.floor,
            "tokens_per_second": self.tokens_per_second._asdict(),
        }


def virtual_devices(count: int) -> None:
    """Make this process see so many CPU devices; has to come before JAX is used for anything.

    Raises KavaError when it came too late.
    """
    try:
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
    blueprint = _blueprint_on(chip, config)
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
    blueprint = _blueprint(_as_on(chip, config), devices)
    return lowered(blueprint, config.data.batch_size, config.data.max_length).compile()


def search(config: Config, chip: Chip, hbm: float, say: Callable[[str], None]) -> list[Plan]:
    """Plans of every mesh over this process's devices that fits or may fit, the fastest first.

    Raises KavaError when there is none.
    """
    models_without_weights(config)  # a model that is not at hand is no matter of meshes
    found = []
    for mesh in _meshes(jax.device_count()):
        config_there = _as_on(chip, config).model_copy(
            update={"mesh": config.mesh.model_copy(update=mesh)}
        )
        written = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
        try:
            blueprint = _blueprint_on(chip, config_there)
        except KavaError:  # something is not divisible
            continue
        rows, length = config.data.batch_size, config.data.max_length
        if sum(held(blueprint, rows, length).values()) > hbm:
            say(f"{written}: weights and moments alone are too many")
            continue
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
    return sorted(found, key=lambda plan: plan.time.most)


def _plan(blueprint: Blueprint, chip: Chip, hbm: float, own: "_Own | None" = None) -> Plan:
    config = blueprint.config
    rows, length = config.data.batch_size, config.data.max_length
    program, wide = compile_step(blueprint, rows, length), _Wide.of(config)
    fixed = program.memory.arguments + program.memory.results
    temporaries = Range(own.temporaries, own.temporaries) if own else wide.range
    return Plan(
        name=config.run.name,
        mesh=dict(blueprint.mesh.shape),
        chip=chip.name,
        hbm=hbm,
        rows=rows,
        length=length,
        held=held(blueprint, rows, length),
        estimated=wide.range,
        temporaries=temporaries,
        peak=Range(fixed + temporaries.least, fixed + temporaries.most),
        exact=own is not None,
        largest_batch=wide.largest_batch(hbm - fixed),
        boundaries=own.boundaries if own else (),
        flops=program.work.flops,
        floor=step_floor(blueprint, rows, length, rows * (length - 1)).total,
        messages=program.work.bytes_by_kind(),
        time=roofline(program, temporaries.most, chip),
    )


class _Wide(NamedTuple):
    """Temporaries of the same run in float32 throughout, a line through two sizes of batch."""

    rows: int
    temporaries: int
    of_row: float
    unit: int
    """Batches are multiples of so many rows."""

    @classmethod
    def of(cls, config: Config) -> "_Wide":
        raw = dump_config(config)
        raw["train"]["dtype"] = "float32"
        blueprint = _blueprint(parse_config(raw))
        rows, length = config.data.batch_size, config.data.max_length
        unit = batch_shards(blueprint.mesh) * config.train.grad_accumulation
        other = unit if rows != unit else 2 * unit
        here, there = (compiled_memory(blueprint, size, length) for size in (rows, other))
        of_row = (here.temporaries - there.temporaries) / (rows - other)
        return cls(rows, here.temporaries, of_row, unit)

    @property
    def range(self) -> Range:
        return Range(NARROWEST * self.temporaries, float(self.temporaries))

    def largest_batch(self, room: float) -> tuple[int, int]:
        """Rows whose temporaries have room, surely and at best."""

        def most(share: float) -> int:
            at_zero = self.temporaries - self.of_row * self.rows
            rows = int((room - share * at_zero) / (share * self.of_row))
            return max(0, rows // self.unit * self.unit)

        return most(1.0), most(NARROWEST)


class _Own(NamedTuple):
    """What the chip's own compiler says."""

    temporaries: float
    boundaries: tuple[Boundary, ...]


def _by_own_compiler(config: Config, chip: Chip, say: Callable[[str], None]) -> _Own | None:
    """Temporaries, and for a GPU the largest batches; None where it is not at hand."""
    devices = described_devices(chip, jax.device_count())
    if devices is None:
        return None
    blueprint, length = _blueprint(config, devices), config.data.max_length

    def attempt(rows: int) -> Tried:
        memory = own_memory(blueprint, rows, length)
        tried = Tried(rows, memory.arguments, memory.temporaries)
        say(f"{rows} rows, compiled for {chip.name}: {tried.needed / 1e9:.2f} GB of a device")
        return tried

    own, boundaries = attempt(config.data.batch_size), ()
    if chip.name in GPUS:
        unit = batch_shards(blueprint.mesh) * config.train.grad_accumulation
        search, memory = RowSearch(attempt, unit, own), GPUS[chip.name].memory
        boundaries = tuple(search.boundary(share, memory) for share in SHARES)
    return _Own(float(own.temporaries), boundaries)


def _blueprint_on(chip: Chip, config: Config) -> Blueprint:
    """The blueprint, refused where so many TPUs are several slices that the mesh cannot cross."""
    blueprint = _blueprint(config)
    if chip.topology is not None:
        check_slices(blueprint.mesh.shape["data"], -(-blueprint.mesh.size // chip.domain))
    return blueprint


def _blueprint(config: Config, devices: list[Any] | None = None) -> Blueprint:
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    return make_blueprint(config, mesh, models_without_weights(config), {})


def _as_on(chip: Chip, config: Config) -> Config:
    """The config as it runs there: ``auto`` is bfloat16, and nothing is left to measure."""
    raw = dump_config(unmeasured(config))
    raw["train"]["dtype"] = raw["train"]["dtype"].replace("auto", "bfloat16")
    # The devices that it is compiled for are not those that it is meant for.
    raw["train"]["attention"] = "auto"
    return parse_config(raw)


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to write the number of devices as data x fsdp x tensor."""
    for tensor in _divisors(devices):
        for fsdp in _divisors(devices // tensor):
            yield dict(zip(AXES, (devices // tensor // fsdp, fsdp, tensor), strict=True))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
