"""Chips that a run can be planned for: what their makers say they do.

``roofline`` says how long a step takes at these peak figures. That is an estimate.
"""

import re
from typing import NamedTuple

from kava_jax.errors import KavaError
from kava_jax.plan.program import Work

ASSUMPTIONS = (
    "matrix products run at the chip's bfloat16 peak; real steps reach 40 to 60 % of it",
    "every argument and temporary is read and written once a step",
    "messages go around rings at the link's full bandwidth, through the network where a group "
    "leaves the fast links' domain; there is no latency",
    "least: products, memory and messages overlap wholly; most: not at all",
)


class Chip(NamedTuple):
    """Peak figures of one device; bandwidths in bytes a second, one way."""

    name: str
    flops: float
    """Dense bfloat16, a second."""
    memory: float
    """Bytes of device memory, in the maker's decimal gigabytes."""
    memory_bandwidth: float
    link: float
    """Of one device to its ring neighbours: NVLink one way; ICI both directions of one axis."""
    domain: int
    """Devices that the fast links join: a host of GPUs, a TPU slice."""
    network: float
    """Of one device beyond the domain: 400 Gb/s (A100: 200) a GPU; the data-centre network."""
    topology: str | None
    """Name of the TPU's topologies for the ahead-of-time compiler."""


# TPUs: jax-ml.github.io/scaling-book/tpus. GPUs: NVIDIA's data sheets of the A100 80GB SXM, the
# H100 SXM and the H200 SXM, and of the HGX B200.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16e9, 819e9, 90e9, 256, 3.1e9, "v5e"),
        Chip("v5p", 459e12, 95e9, 2765e9, 180e9, 8960, 6.2e9, "v5p"),
        Chip("v6e", 918e12, 32e9, 1640e9, 180e9, 256, 12.5e9, "v6e"),
        Chip("a100", 312e12, 80e9, 2039e9, 300e9, 8, 25e9, None),
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, 8, 50e9, None),
        Chip("h200", 989e12, 141e9, 4800e9, 450e9, 8, 50e9, None),
        Chip("b200", 2250e12, 180e9, 8000e9, 900e9, 8, 50e9, None),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of that name, in whatever case; raises KavaError for an unknown one."""
    if name.lower() not in CHIPS:
        raise KavaError(f"--chip={name!r} is unknown; use one of {', '.join(CHIPS)}")
    return CHIPS[name.lower()]


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device is by what it calls itself; None for one that is not in the table."""
    # Runtimes call some TPUs by another name: "TPU v5 lite" is a v5e, and a bare "TPU v5" a v5p.
    kind = re.sub(r"(v\d) lite", r"\1e", device_kind.lower())
    kind = re.sub(r"tpu v5$", "tpu v5p", kind)
    # Drivers put more into the name, as in "NVIDIA H100 80GB HBM3".
    return next((chip for name, chip in CHIPS.items() if name in kind), None)


def roofline(work: Work, memory: float, chip: Chip) -> dict[str, float]:
    """Seconds of one step of one device, by what limits it.

    ``products`` = flops / peak, ``memory`` = 2 * bytes / bandwidth of ``memory`` bytes of arguments
    and temporaries, ``messages`` = bytes / link. ``least`` is all three at the same time, ``most``
    one after the other.
    """
    seconds = {
        "products": work.flops / chip.flops,
        "memory": 2 * memory / chip.memory_bandwidth,
        # A plan's mesh numbers devices host by host, so id // domain is the domain. A ring is as
        # slow as its slowest link: one device outside of the domain makes the network count.
        "messages": sum(
            payload / (chip.link if len({n // chip.domain for n in group}) == 1 else chip.network)
            for (_, group), payload in work.messages.items()
        ),
    }
    return seconds | {"least": max(seconds.values()), "most": sum(seconds.values())}


def topology_name(chip: Chip, devices: int) -> str | None:
    """The torus of that number of TPU chips, as the compiler calls it; None if there is none.

    Slices of v5e and v6e are rectangles of at most 16 x 16 chips; slices of v5p are boxes.
    """
    shapes = {
        2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
        | {256: "16x16"},
        3: {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
        | {128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"},
    }
    if chip.topology is None:
        return None
    shape = shapes[3 if chip.name == "v5p" else 2].get(devices)
    return f"{chip.topology}:{shape}" if shape else None
