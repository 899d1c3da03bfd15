"""Cache handoff: the prompt cache of one model becomes that of another.

The *reader* reads a prompt; the *answerer* goes on from it. Each layer of the answerer takes the
keys (before RoPE) and values of one layer of the reader, mapped by a projector into its own heads
and width. Its own rotation then turns the keys: the two models may rotate differently.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.models.rope import Rotations, rotate_layers

Reader = Literal["teacher", "student"]


@dataclass(frozen=True)
class Handoff:
    """What carries the caches of readers into one answerer's shape.

    Several readers' caches are averaged, each with its ``weights``, which add up to 1.
    """

    projector: KVDimensionProjector
    """With ``per_layer``, and a pair for every reader."""
    maps: Mapping[str, LayerMap]
    """By pair, the reader's layer for each of the answerer's: the map's students are answerers."""
    weights: Mapping[str, float]

    def __call__(self, caches: Mapping[str, KVCache], rotations: Rotations) -> KVCache:
        """The answerer's cache [L, B, T, K, H], float32, keys after its ``rotations``.

        ``caches`` are by pair [Lr, B, T, Kr, Hr], with full keys before RoPE; ``rotations`` are
        the answerer's ``Decoder.rotation`` of the tokens' positions.

        Raises KavaError for a cache of fewer layers than the map reads, for another width than the
        projector's, and for a pair that is missing.
        """
        if missing := sorted({*self.weights} - {*caches}):
            raise KavaError(
                f"caches: those of {', '.join(missing)} are missing; give each reader's"
            )
        total: dict[str, Array] = {}
        for name, weight in self.weights.items():
            layer_map, cache = self.maps[name], caches[name]
            source = layer_map.teacher_side(cache._asdict())
            for part, mapped in self.projector.project(name, source).items():
                own = weight * mapped.astype(jnp.float32)
                total[part] = total[part] + own if part in total else own
        return KVCache(rotate_layers(total["k"], rotations), total["v"])
