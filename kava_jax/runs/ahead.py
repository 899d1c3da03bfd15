"""The train step compiled for every length of its batches before the first one is taken.

So no step waits for a compiler in the middle of a run, and a run that is resumed does not either.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kava_jax.data.batches import abstract_batch
from kava_jax.models.decoder import Params
from kava_jax.runs.loop import Step
from kava_jax.training.step import TrainState


def compiled_ahead(
    step: Any,
    state: TrainState,
    teachers: Mapping[str, Params],
    rows: int,
    lengths: Sequence[int],
    tell: Callable[[str], None] | None = None,
) -> Step:
    """``step`` for batches [rows, T] with T among ``lengths``, and no others.

    The longest comes first: what needs the most memory fails at once.

    Args:
        step: the jitted train step.
        state: that of the run, or its shapes.
        teachers: as the step takes them, or their shapes.
        rows: of the global batch.
        lengths: every T that a batch can have.
        tell: hears once what is being done, in a sentence; None where that is said already.
    """
    longest_first = sorted(lengths, reverse=True)
    if tell and lengths:  # none are left when a run that has ended is called again
        count = f"{len(lengths)} padded length{'s' if len(lengths) > 1 else ''}"
        tell(f"compiling the step for {count}: {', '.join(map(str, longest_first))}")
    # Kept here, because ``jit`` does not find what was compiled ahead and would compile it again.
    programs = {
        length: step.lower(state, teachers, abstract_batch(rows, length)).compile()
        for length in longest_first
    }

    return lambda state, teachers, batch: programs[batch.tokens.shape[1]](state, teachers, batch)
