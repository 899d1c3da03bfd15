"""Checkpoints of the train state through Orbax: asynchronous, atomic, the last K and the best.

Orbax writes to a temporary name and renames when complete, so a directory with a step's name is a
complete checkpoint; digests written before that tell whether it still is what was written. The
teachers are not in it; their fingerprints are in the manifest.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax

from kava_jax.errors import KavaError, StoppedError, is_full_disk, one_line
from kava_jax.journal.digests import damage
from kava_jax.journal.manifest import write_atomically
from kava_jax.models.decoder import Params
from kava_jax.parallel.hosts import absent, from_all, from_first, meet
from kava_jax.storage import Place, absolute, move
from kava_jax.training.step import TrainState

# Held-out losses by which `best` is chosen, the first that a run has. Answers from a cache that is
# handed over come first: the student's own loss stands still where it does not learn.
CHOOSING = ("eval_loss_handed", "eval_loss")
# Next to ``checkpoints/``: what was found damaged there, moved and never deleted.
DAMAGED_NAME = "checkpoints_damaged"


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The ``checkpoints/`` directory of one run; a context manager that waits for writes to end."""

    def __init__(self, run_dir: Place, max_to_keep: int, *, read_only: bool = False):
        """Keep the newest ``max_to_keep`` checkpoints and the best by ``CHOOSING``.

        ``read_only`` creates and deletes nothing.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

        from kava_jax.journal import orbax_items

        # BestN keeps the end of an ascending order, so a loss goes in with its sign turned.
        # Checkpoints without metrics have no place in that order; Orbax would keep all of them.
        best = keeping.BestN(
            get_metric_fn=lambda metrics: -_choosing(metrics),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = keeping.AnyPreservationPolicy([keeping.LatestN(n=max_to_keep), best])
        self._items = orbax_items
        self._directory = absolute(run_dir) / "checkpoints"
        self._keep = max_to_keep
        # Steps that were checked. A resume asks twice: to choose a step, and before it reads it.
        self._intact: set[int] = set()
        self._manager = orbax_items.Manager(
            self._directory,
            item_handlers=orbax_items.DigestedHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=_choosing,
                best_mode="min",
                create=not read_only,
                read_only=read_only,
                # A reader may look while a run writes, whose temporary directory is not abandoned.
                cleanup_tmp_directories=not read_only,
            ),
        )

    def __exit__(self, *raised: Any) -> None:
        """Wait for the last asynchronous write."""
        with self._stops_told():
            self._manager.close()

    def save(self, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        """Start writing; ``metrics`` are those of an evaluation at this very step, if any.

        Saving a step that is already there does nothing. Raises StoppedError when this or the
        write before it finds the disk full, or another process does not take part.
        """
        step = int(state.step)
        # Orbax raises for a step that it has. A run that is asked to end during its last evaluation
        # has saved that step already.
        if step in self._manager.all_steps():
            return
        # A loss that is NaN would be neither better nor worse than any other: it does not count.
        known = metrics is not None and math.isfinite(_choosing(metrics))
        scored = metrics if known else None
        with self._stops_told():
            self._manager.save(step, args=self._items.DigestedSave(state), metrics=scored)

    def wait(self) -> None:
        """Until everything is written; raises as ``save``."""
        with self._stops_told():
            self._manager.wait_until_finished()

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the evaluation at a step to its checkpoint, which was written without one.

        A checkpoint that has an evaluation, or is not there, is left as it is. Deletes what is
        then neither among the newest nor the best; raises as ``save``.
        """
        self.wait()
        bare = step in self._manager.all_steps() and self._manager.metrics(step) is None
        if not from_first(bare, "unscored") or not math.isfinite(_choosing(metrics)):
            return
        if jax.process_index() == 0:
            # Where and how Orbax writes the metrics that ``save`` is given.
            # The digests are of the state alone, so the checkpoint stays intact.
            write_atomically(
                self._directory / str(step) / "metrics" / "metrics", json.dumps(metrics)
            )
        # No process may read the steps again before the file is there.
        meet("checkpoint scored")
        steps = self.steps()  # of memory: the same on all processes, whatever a shared disk shows
        self._manager.reload()
        # Orbax deletes by its policy only while it saves, and after the last step nothing is saved.
        best = from_first(self._manager.best_step() or 0, "best checkpoint")
        for other in steps[: -self._keep]:
            if other != best:
                self._manager.delete(other)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def newest_intact(self, say: Callable[[str], None]) -> int | None:
        """The newest step whose files are as they were written; None when there is no checkpoint.

        Damaged ones that are newer are said and moved to ``checkpoints_damaged/``, where a later
        save of the same step cannot meet them. Every process looks at its share of the files.

        Raises KavaError when there are checkpoints and none is intact; nothing is moved then.
        """
        steps = self.steps()
        if not steps:
            return None
        # All are judged before one is moved: where none is intact, all must stay in their place.
        problems: dict[int, str] = {}
        for intact in reversed(steps):
            if not (problem := self._problem(intact)):
                break
            problems[intact] = problem
        else:
            found = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
            raise KavaError(
                f"{self._name()}: none of the checkpoints {', '.join(map(str, steps))} is intact "
                f"({found}); restore one or name another run.dir"
            )
        for step, problem in problems.items():
            if jax.process_index() == 0:
                self._put_aside(step)
            say(
                f"checkpoint {step} is damaged ({problem}); it is in {DAMAGED_NAME}/ now, "
                f"and the run goes on from step {intact}"
            )
        # Until the first process has moved them, no other may look again.
        meet("damaged checkpoints moved")
        # Orbax lists the steps from memory, where those that were moved still are.
        self._manager.reload()
        return intact

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

    def restore_params(self, step: int, group: str, abstract: Params) -> Params:
        """The parameters of one group (``student``), whatever else there is; as ``restore``."""
        # The optimizer's moments are left on the disk, which together are larger than the student.
        found = self._restored(step, {"params": {group: abstract}}, partial=True)
        return found["params"][group]

    def restore(self, step: int, abstract: Any) -> TrainState:
        """Read a checkpoint into the shapes, dtypes and shardings of ``abstract``.

        Raises KavaError when it is damaged, or holds another state than that, as one by another
        version does.
        """
        return self._restored(step, abstract, partial=False)

    def _restored(self, step: int, abstract: Any, *, partial: bool) -> Any:
        if problem := self._problem(step):
            others = ", ".join(str(other) for other in self.steps() if other != step)
            raise KavaError(
                f"checkpoint={step}: {self._name()}/{step} is damaged ({problem}); "
                + (f"use one of {others}" if others else "restore it")
            )
        try:
            with self._stops_told():
                place = self._directory / str(step) / "default"
                return self._items.restored(place, abstract, partial=partial)
        except (ValueError, KeyError) as error:
            raise KavaError(
                f"checkpoint={step}: {self._name()} does not hold the state that this run has "
                f"({one_line(error)}); use the version of kava_jax that wrote it (see "
                f"manifest.yaml)"
            ) from error

    def _problem(self, step: int) -> str:
        """What is wrong with a step's files, the same on all processes; "" when they are intact.

        Every process reads its share of them, once.
        """
        if step in self._intact:
            return ""
        place = self._directory / str(step) / "default"
        # All must restore the same step, so each hears what the others found in their shares.
        found = damage(place, jax.process_index(), jax.process_count())
        problem = next(filter(None, from_all(found or "", f"checkpoint {step} checked")), "")
        if not problem:
            self._intact.add(step)
        return problem

    def _put_aside(self, step: int) -> None:
        place = self._directory.parent / DAMAGED_NAME
        # The same step may be written again and be damaged again.
        number = sum(1 for path in place.glob(f"{step}*"))
        move(self._directory / str(step), place / (f"{step}.{number}" if number else str(step)))

    @contextmanager
    def _stops_told(self) -> Iterator[None]:
        """StoppedError in the place of what a full disk or a missing process was raised as."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise them as many types
            if missing := absent(error):
                raise StoppedError(
                    f"{self._name()}: {missing} did not take part where the others write or read a "
                    f"checkpoint; earlier ones are as they were: look at what it says last, end "
                    f"all processes and call again"
                ) from error
            if not is_full_disk(error):
                raise
            raise StoppedError(
                f"{self._name()}: no space is left on the disk, so the checkpoint was not written; "
                f"earlier ones are whole: make room and call again"
            ) from error

    def _name(self) -> str:
        return f"{self._directory.parent.name}/{self._directory.name}"


def newest_step(run_dir: Place) -> int:
    """The step of a run's newest complete checkpoint, -1 without one.

    Changes nothing and, unlike ``Checkpoints``, waits for no other process: what each of them sees
    of a shared disk may differ for a moment.
    """
    from orbax.checkpoint.path import step as names

    place = run_dir / "checkpoints"
    return max(names.checkpoint_steps(place), default=-1) if place.is_dir() else -1


def abstract_state(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state with our own shardings, as a restore target."""
    # ``eval_shape`` keeps no shardings, and without them Orbax would restore to other places.
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def _choosing(metrics: Mapping[str, float]) -> float:
    """The loss that ``best`` goes by; NaN where there is none."""
    return next((metrics[name] for name in CHOOSING if name in metrics), math.nan)
