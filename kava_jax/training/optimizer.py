"""AdamW with one learning rate for the student and one for the projector, clipped apart."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def learning_rate(
    peak: float, steps: int, *, warmup_steps: int = 0, min_lr_ratio: float = 0.0
) -> optax.Schedule:
    """Step (from 0) -> rate: linear warm-up to ``peak``, then a cosine down to a part of it.

    ``min_lr_ratio`` of the peak is reached at the last of ``steps`` steps; with 1 the rate is
    constant after the warm-up. The warm-up starts above zero, so that the first step already
    learns.
    """
    # The last of ``steps`` steps has the number ``steps - 1``. The bound is there because optax
    # refuses a cosine over no steps.
    last = max(steps - 1, warmup_steps + 1)
    cosine = optax.cosine_decay_schedule(peak, last - warmup_steps, min_lr_ratio)
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, max(warmup_steps, 1))
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def make_optimizer(
    rates: Mapping[str, optax.Schedule | None],
    *,
    weight_decay: float,
    clip_norm: float,
    b2: float,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """One AdamW per group (``student``, ``projector``, ...), each with its own rate; b1 is 0.9.

    Each group's gradient is clipped by its own global norm. Weight decay leaves out norms and
    biases. A rate of None freezes its group. ``mu_dtype`` is that of AdamW's first moment.
    """

    def group(rate: optax.Schedule | None) -> optax.GradientTransformation:
        if rate is None:
            # Not a rate of 0: AdamW would keep two moments of weights that never move.
            return optax.set_to_zero()
        # Clipped within the group, as in the original: by one common norm, a large gradient of the
        # student would shrink the projector's.
        return optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(rate, b2=b2, weight_decay=weight_decay, mask=decayed, mu_dtype=mu_dtype),
        )

    # A group's name stands for all of its parameters.
    return optax.multi_transform(
        {name: group(rate) for name, rate in rates.items()}, {name: name for name in rates}
    )


def decayed(params: Any) -> Any:
    """True for the weights that decay: matrices and embeddings, not norms and biases."""

    # By name and not by rank: stacked layers give biases and norms a leading axis, too.
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return "kernel" in str(path[-1].key) or str(path[-1].key) == "embedding"

    return jax.tree_util.tree_map_with_path(decays, params)
