"""How long a step takes at a chip's peak figures: an estimate, and what it assumes."""

from typing import NamedTuple

from kava_jax.plan.chips import Chip
from kava_jax.plan.compiled import Compiled
from kava_jax.plan.program import Message

ASSUMPTIONS = (
    "matrix products run at the chip's bfloat16 peak; real steps reach 40 to 60 % of it",
    "every argument and temporary is read and written once a step",
    "messages go around rings at the link's full bandwidth, through the network where a group "
    "leaves the fast links' domain; there is no latency",
    "least: products, memory and messages overlap wholly; most: not at all",
)


class Roofline(NamedTuple):
    """Seconds of one step, by what limits it."""

    products: float
    memory: float
    messages: float

    @property
    def least(self) -> float:
        """All three at the same time."""
        return max(self)

    @property
    def most(self) -> float:
        """One after the other."""
        return sum(self)


def roofline(program: Compiled, temporaries: float, chip: Chip) -> Roofline:
    """``flops / peak``, ``2 * (arguments + temporaries) / bandwidth``, ``bytes / link``."""
    moved = 2 * (program.memory.arguments + temporaries)
    messages = sum(
        times * message.bytes / _bandwidth(message, chip)
        for message, times in program.work.messages.items()
    )
    return Roofline(program.work.flops / chip.flops, moved / chip.memory_bandwidth, messages)


def _bandwidth(message: Message, chip: Chip) -> float:
    domains = {device // chip.domain for device in message.group}
    return chip.link if len(domains) == 1 else chip.network
