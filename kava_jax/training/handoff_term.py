"""Training through the handoff: which tokens are handed over, and of which rows.

The reader reads a row's prompt up to its last token but one. The answerer reads that last token
and the answer, and nothing of its own before it. In a batch it runs over whole rows all the same,
with the reader's keys and values in place of its own: positions and shapes are those of any row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Key

from kava_jax.alignment.handoff import Handoff, Reader
from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import HandedOver
from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Params
from kava_jax.models.rope import Rotations
from kava_jax.training.comparison import ForwardPass, full_cache

# The draw of rows has a key of its own; microbatches have the small numbers.
_DRAW = 2**31


@dataclass(frozen=True)
class HandoffTerm:
    """How caches are handed over in training; the projector's weights are ``params["handoff"]``."""

    projector: nnx.GraphDef[KVDimensionProjector]
    maps: Mapping[str, LayerMap]
    """By teacher, the reader's layer for each of the answerer's."""
    shares: Mapping[str, float]
    """By teacher, what its cache counts in the mean; they add up to 1."""
    reader: Reader
    weight: optax.Schedule
    """Of the language loss on what was handed over."""
    alone_share: float
    """The share of rows that a student reads alone, where it would be the answerer."""

    def dealt(self, key: Key[Array, ""], batch: Batch) -> tuple[Batch, Bool[Array, "B"]]:
        """Which rows are handed over. Nothing of a student that answers is compared in those."""
        rows = batch.tokens.shape[0]
        if self.reader == "student":
            return batch, jnp.ones(rows, bool)
        # As many in every step: one row left alone has no other to be told apart from.
        order_B = jax.random.permutation(jax.random.fold_in(key, _DRAW), rows)
        handed_B = order_B >= round(self.alone_share * rows)
        return batch._replace(kv_mask=batch.kv_mask & ~handed_B[:, None]), handed_B

    def handoff(self, params: Params, readers: Mapping[str, tuple[int, ...] | None]) -> Handoff:
        """The handoff from some readers, each with the layers that its cache holds (None: all)."""
        total = sum(self.shares[name] for name in readers)
        maps = {
            name: self.maps[name] if layers is None else self.maps[name].among(layers)
            for name, layers in readers.items()
        }
        shares = {name: self.shares[name] / total for name in readers}
        return Handoff(nnx.merge(self.projector, params), maps, shares)

    def past(
        self,
        params: Params,
        batch: Batch,
        handed_B: Bool[Array, "B"],
        readers: Mapping[str, ForwardPass],
        rotations: Rotations,
    ) -> HandedOver:
        """What an answerer with these rotations is given of the readers' passes, by teacher."""
        handoff = self.handoff(params, {name: run.layers for name, run in readers.items()})
        cache = handoff({name: full_cache(run) for name, run in readers.items()}, rotations)
        where_BT = handed_tokens(batch) & handed_B[:, None]
        return HandedOver(cache, jnp.broadcast_to(where_BT, (cache.k.shape[0], *where_BT.shape)))


def handed_tokens(batch: Batch) -> Bool[Array, "B T"]:
    """The tokens of every row before the last one of its prompt; none of a row without prompt."""
    # The answer begins with the first target, and rows are padded on the right.
    answer_B1 = jnp.argmax(batch.loss_mask, axis=1)[:, None]
    return jnp.arange(batch.tokens.shape[1])[None] < answer_B1 - 1
