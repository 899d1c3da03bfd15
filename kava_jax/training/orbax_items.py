"""Orbax's standard item with digests beside its files, written before the checkpoint is committed.

Orbax writes a step under a temporary name, calls ``finalize`` on the first process when all have
written, and then renames it. Apart from ``checkpoint`` because it imports Orbax, which is slow.
"""

import dataclasses

import orbax.checkpoint as ocp
from etils import epath

from kava_jax.storage import place
from kava_jax.training.digests import write_digests


class DigestedHandler(ocp.StandardCheckpointHandler):
    """Writes ``sha256.json`` as its last act."""

    def finalize(self, directory: epath.Path) -> None:
        """Called when every process has written its part."""
        super().finalize(directory)
        write_digests(place(str(directory), "checkpoint"))


@ocp.args.register_with_handler(DigestedHandler, for_save=True)
@dataclasses.dataclass
class DigestedSave(ocp.args.StandardSave):
    """What is saved."""


@ocp.args.register_with_handler(DigestedHandler, for_restore=True)
@dataclasses.dataclass
class DigestedRestore(ocp.args.StandardRestore):
    """What it is restored into."""
