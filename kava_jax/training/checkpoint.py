"""Checkpoints of the train state through Orbax: asynchronous, atomic, the last K and the best.

Orbax writes to a temporary name and renames when complete, so a directory with a step's name is a
complete checkpoint. The teachers are not in it; their fingerprints are in the manifest.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from kava_jax.errors import KavaError
from kava_jax.training.step import TrainState

BEST_METRIC = "eval_loss"


class Checkpoints:
    """The ``checkpoints/`` directory of one run; a context manager that waits for writes to end."""

    def __init__(self, run_dir: Path, keep: int, *, read_only: bool = False):
        """Keep the newest ``keep`` checkpoints and the one with the lowest held-out loss.

        ``read_only`` creates and deletes nothing.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

        best = keeping.BestN(
            get_metric_fn=lambda metrics: -metrics[BEST_METRIC],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = keeping.AnyPreservationPolicy([keeping.LatestN(n=keep), best])
        self._ocp = ocp
        self._directory = (run_dir / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda metrics: metrics[BEST_METRIC],
                best_mode="min",
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        """Nothing to do; the manager is ready."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the last asynchronous write."""
        self._manager.close()

    def save(self, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        """Start writing; ``metrics`` are those of an evaluation at this very step, if any.

        Saving a step that is already there does nothing.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        # A loss that is NaN would be neither better nor worse than any other: it does not count.
        known = metrics is not None and math.isfinite(metrics.get(BEST_METRIC, math.nan))
        scored = metrics if known else None
        self._manager.save(step, args=self._ocp.args.StandardSave(state), metrics=scored)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def choose(self, which: str) -> int:
        """The step that ``last``, ``best`` or a number means.

        Raises KavaError when there is no such checkpoint, naming those that exist.
        """
        steps = self.steps()
        if not steps:
            raise KavaError(f"checkpoint={which!r}: {self._name()} holds none; train the run first")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            if best is None:
                raise KavaError(
                    f"checkpoint={which!r}: none in {self._name()} was evaluated; use last"
                )
            return best
        if which.isdigit() and int(which) in steps:
            return int(which)
        listed = ", ".join(map(str, steps))
        raise KavaError(f"checkpoint={which!r} does not exist; use last, best or one of {listed}")

    def restore(self, step: int, abstract: Any) -> TrainState:
        """Read a checkpoint into the shapes, dtypes and shardings of ``abstract``.

        Raises KavaError when it holds another state than that, as one by another version does.
        """
        try:
            found: Any = self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise KavaError(
                f"checkpoint={step}: {self._name()} does not hold the state that this run has "
                f"({reason}); use the version of kava_jax that wrote it (see manifest.json)"
            ) from error
        return found

    def _name(self) -> str:
        return f"{self._directory.parent.name}/{self._directory.name}"


def abstract_state(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state with our own shardings, as a restore target."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
