"""AdamW with one learning rate for the student and one for the projector, clipped apart."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import optax


class Rate(NamedTuple):
    """A learning rate over the run: linear warm-up to ``peak``, then constant or cosine.

    ``final_share`` of the peak is what the cosine reaches at the last of ``steps`` steps.
    """

    peak: float
    steps: int
    warmup_steps: int = 0
    schedule: str = "cosine"
    final_share: float = 0.0

    def build(self) -> optax.Schedule:
        """The schedule: step (from 0) -> rate."""
        after = max(1, self.steps - 1 - self.warmup_steps)
        main = (
            optax.constant_schedule(self.peak)
            if self.schedule == "constant"
            else optax.cosine_decay_schedule(self.peak, after, self.final_share)
        )
        if self.warmup_steps == 0:
            return main
        # Starts one notch above zero, so that the first step already learns.
        warmup = optax.linear_schedule(
            self.peak / (self.warmup_steps + 1), self.peak, self.warmup_steps
        )
        return optax.join_schedules([warmup, main], [self.warmup_steps])


def make_optimizer(
    rates: Mapping[str, optax.Schedule | None],
    *,
    weight_decay: float,
    clip_norm: float,
    b1: float,
    b2: float,
    mean_dtype: str = "float32",
) -> optax.GradientTransformation:
    """One chain per group (``student``, ``projector``), each with its own rate.

    Each group's gradient is clipped by its own global norm. Weight decay leaves out norms and
    biases. A rate of None freezes its group. ``mean_dtype`` is that of AdamW's first moment.
    """

    def group(rate: optax.Schedule | None) -> optax.GradientTransformation:
        if rate is None:
            return optax.set_to_zero()
        return optax.chain(
            optax.clip_by_global_norm(clip_norm),
            optax.adamw(
                rate,
                b1=b1,
                b2=b2,
                weight_decay=weight_decay,
                mask=decayed,
                mu_dtype=mean_dtype,
            ),
        )

    def labels(params: dict[str, Any]) -> dict[str, Any]:
        return {name: jax.tree.map(partial(_just, name), tree) for name, tree in params.items()}

    return optax.multi_transform({name: group(rate) for name, rate in rates.items()}, labels)


def _just(name: str, _: Any) -> str:
    return name


def decayed(params: Any) -> Any:
    """True for the weights that decay: matrices and embeddings, not norms and biases."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return "kernel" in str(path[-1].key) or str(path[-1].key) == "embedding"

    return jax.tree_util.tree_map_with_path(decays, params)
