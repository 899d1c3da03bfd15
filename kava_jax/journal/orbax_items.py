"""Orbax's manager and its standard item, with digests written before a checkpoint is committed.

Orbax writes a step under a temporary name, in the background on every process; when all have
written, it calls ``finalize`` on the first one and then renames the directory. Apart from
``checkpoint`` because it imports Orbax, which is slow.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from kava_jax.journal.digests import write_digests, write_own_digests
from kava_jax.storage import Place, place


class Manager(ocp.CheckpointManager):
    """Orbax's, except that it leaves the question whether to stop to ``preemption``.

    Orbax asks JAX's sync point with the step, ``preemption`` with a count of its own. JAX keeps the
    last number of either: the moment that it then agrees on might be one already passed, at which
    no process would ever stop.
    """

    def reached_preemption(self, step: int) -> bool:
        """Nobody is asked."""
        del step
        return False


class DigestedHandler(ocp.StandardCheckpointHandler):
    """Writes ``sha256.<process>.json`` when a process has written, and ``sha256.json`` last."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """What Orbax waits for in its own thread; the digests are the last of it."""
        writes = await super().async_save(directory, *args, **kwargs) or []
        # Last in the list and waiting for the others, so that it digests files that are complete.
        return [*writes, _OwnDigests(writes, directory)]

    def finalize(self, directory: epath.Path) -> None:
        """Called when every process has written its part."""
        super().finalize(directory)
        write_digests(place(str(directory), "checkpoint"))


class _OwnDigests:
    """As Orbax's futures: ``result`` is called in the thread that waits for the writes."""

    def __init__(self, writes: Sequence[Any], directory: Any):
        self._writes, self._directory = writes, directory

    def result(self, timeout: float | None = None) -> None:
        """Raises TimeoutError as the writes do; each of them has ``timeout`` seconds."""
        for write in self._writes:
            write.result(timeout=timeout)
        # A path, or something that was one before it existed.
        path = getattr(self._directory, "path", self._directory)
        write_own_digests(place(str(path), "checkpoint"), jax.process_index())

    def cancel(self) -> None:
        """Nothing is under way that could be cancelled."""


def restored(directory: Place, abstract: Any, *, partial: bool) -> Any:
    """What was saved there, with the dtypes and shardings of ``abstract``.

    With ``partial`` only what ``abstract`` has, whatever else was saved.
    """
    # The standard handler restores whole trees only, by the same way.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(
            str(directory),
            args=ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=partial,
            ),
        )


# Orbax finds a handler by the class of its arguments, so ours needs a class of its own. It also
# asks for one to restore with, which nobody uses.
@ocp.args.register_with_handler(DigestedHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DigestedSave(ocp.args.StandardSave):
    """What is saved."""
