"""The real train step, compiled with shapes in place of weights."""

import math
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from kava_jax.data.batches import abstract_batch
from kava_jax.parallel.sharding import batch_sharding
from kava_jax.plan.program import Work, work_of
from kava_jax.runs.blueprint import Blueprint

# Only memory and messages are asked for: no machine code has to be good.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Before this pass the program is that of all devices together; later ones fuse and rewrite
# products for one kind of hardware, and their dtypes are no longer the true ones.
_PASS = "spmd-partitioning"


class Memory(NamedTuple):
    """Bytes of one device, as the compiler lays them out."""

    arguments: int
    """State, teachers and batch."""
    results: int
    """What is not written in the arguments' place."""
    temporaries: int
    """Gradients, activations, gathered weights."""


def compile_step(blueprint: Blueprint, rows: int, length: int) -> tuple[Work, Memory]:
    """One device's share of the step, for the blueprint's mesh of (virtual) CPU devices."""
    program = lowered(blueprint, rows, length)
    if blueprint.mesh.size == 1:  # nothing to partition
        return work_of(program.as_text("hlo")), memory_of(program.compile(QUICK))
    text, compiled = partitioned(program)
    return work_of(text), memory_of(compiled)


def partitioned(program: Any) -> tuple[str, Any]:
    """One device's program as the partitioner left it, and the compiled one."""
    with tempfile.TemporaryDirectory() as folder, uncached():
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": _PASS}
        compiled = program.compile(QUICK | dump)
        # Unpacking fails unless the pass ran once: no other program is counted by mistake.
        (text,) = Path(folder).glob(f"*after_{_PASS}*")
        return text.read_text(encoding="utf-8"), compiled


def held(blueprint: Blueprint, rows: int, length: int) -> dict[str, int]:
    """Bytes that one device holds between steps, by what they are; exact, nothing is compiled."""
    state, places = blueprint.abstract_state(), blueprint.state_shardings()
    rest = {"params": {}, "opt_state": ()}
    batch = abstract_batch(rows, length)
    of_batch = jax.tree.map(lambda _: batch_sharding(blueprint.mesh), batch)
    parts = {
        "teachers": (blueprint.abstract_teachers(), blueprint.teacher_shardings()),
        "student": (state.params["student"], places.params["student"]),
        "projector": ({**state.params, "student": {}}, {**places.params, "student": {}}),
        "optimizer": (state.opt_state, places.opt_state),
        "statistics": (state._replace(**rest), places._replace(**rest)),
        "batch": (batch, of_batch),
    }

    def size(leaf: Any, sharding: Any) -> int:
        # Not size / devices: an axis that the mesh does not divide may be held whole.
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return {name: sum(jax.tree.leaves(jax.tree.map(size, *own))) for name, own in parts.items()}


def lowered(blueprint: Blueprint, rows: int, length: int, *, dearest: bool = False) -> Any:
    """The step for the blueprint's mesh, not yet compiled.

    ``dearest``: the step that measures its KV weight, where a run has one; it needs more memory.
    """
    share = blueprint.config.loss.share if dearest else None
    return blueprint.jitted_step(share and share.share).lower(
        blueprint.abstract_state(), blueprint.abstract_teachers(), abstract_batch(rows, length)
    )


def memory_of(compiled: Any) -> Memory:
    """What a compiled program says of itself."""
    found = compiled.memory_analysis()
    # The old state is donated: its bytes become the new state and are counted as arguments.
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, results, found.temp_size_in_bytes)


@contextmanager
def uncached() -> Any:
    """Compile anew. Out of JAX's cache a program leaves no text behind.

    And one for chips that are only described cannot be read back: JAX warns, and compiles it.
    """
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]  (made at run time)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else the switch is not looked at again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
