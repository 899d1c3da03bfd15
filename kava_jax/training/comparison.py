"""One teacher's cache and the student's, brought into one space.

The layer map picks layers, the key bias is taken out where asked, and the projector maps one side's
vectors onto the other's: what comes out has one shape, [P, B, T, K, H] on both sides. The *space*
is the side that is not projected.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import KVCache
from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Decoder, KeySpace, Params
from kava_jax.models.layers import Rotation
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import rotate


class Reading(NamedTuple):
    """One model's pass over a batch."""

    model: Decoder
    hidden: Float[Array, "B T D"]
    cache: KVCache
    queries: Float[Array, "L B T N H"] | None
    mask: Bool[Array, "B 1 T S"]
    rotation: Rotation
    layers: tuple[int, ...] | None = None
    """Which layers the cache holds; None: all."""


def read(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    batch: Batch,
    *,
    key_space: KeySpace,
    queries: bool = False,
    layers: tuple[int, ...] | None = None,
) -> Reading:
    """Run one model over the batch.

    With ``queries`` its post-RoPE queries are kept as well, of all layers; without them ``layers``
    says whose keys and values are kept.
    """
    model = nnx.merge(graph, params)
    positions_BT = token_positions(batch.valid)
    mask = attention_mask(positions_BT, positions_BT, batch.valid, model.spec.sliding_window)
    inputs = (batch.tokens, positions_BT, mask)
    asked = None
    if queries:
        hidden, cache, asked = model.with_queries(*inputs, key_space=key_space)
    else:
        hidden, cache = model(*inputs, key_space=key_space, layers=layers)
    held = None if queries else layers
    return Reading(model, hidden, cache, asked, mask, model.rotation(positions_BT), held)


class Compared(NamedTuple):
    """Both sides in one space, [P, B, T, K, H] each."""

    student: KVCache
    target: KVCache


class Attended(NamedTuple):
    """Both sides as the space's own queries read them: keys after RoPE, biases back in."""

    queries: Float[Array, "P B T N H"]
    student: KVCache
    target: KVCache
    mask: Bool[Array, "B 1 T S"]


@dataclass(frozen=True)
class Comparison:
    """How one teacher's cache and the student's become comparable."""

    name: str
    layer_map: LayerMap
    key_space: KeySpace = "pre_rope"
    remove_key_bias: bool = False

    def __call__(
        self,
        projector: KVDimensionProjector,
        student: Reading,
        teacher: Reading,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Compared:
        """The mapped layers of both sides; dropout in the projector only when a key is given."""
        ours = self.layer_map.student_cache(self.without_bias(student))
        layer_map = (
            self.layer_map if teacher.layers is None else self.layer_map.among(teacher.layers)
        )
        theirs = layer_map.teacher_cache(self.without_bias(teacher))
        if projector.direction == "student_to_teacher":
            return Compared(projector.project(self.name, ours, dropout_key=dropout_key), theirs)
        return Compared(ours, projector.project(self.name, theirs, dropout_key=dropout_key))

    def can_attend(self, direction: str) -> bool:
        """Whether the space has queries of its own: not where it joins or mixes teacher layers."""
        single = self.layer_map.sources == 1 and self.layer_map.weights is None
        return direction == "teacher_to_student" or single

    def attended(
        self, compared: Compared, direction: str, student: Reading, teacher: Reading
    ) -> Attended:
        """What the queries of the space (student's or teacher's) need to read both caches."""
        forward = direction == "teacher_to_student"
        space = student if forward else teacher
        layers = (
            self.layer_map.student_layers
            if forward
            else tuple(row[0] for row in self.layer_map.teacher_layers)
        )
        assert space.queries is not None
        bias = self._bias(space)

        def read_by_queries(cache: KVCache) -> KVCache:
            if self.key_space == "post_rope":
                return cache
            keys = cache.k if bias is None else cache.k + _per_layer(bias[np.array(layers)], cache)
            return KVCache(jax.vmap(lambda layer: rotate(layer, space.rotation))(keys), cache.v)

        queries = space.queries[np.array(layers)]
        ours, theirs = read_by_queries(compared.student), read_by_queries(compared.target)
        return Attended(queries, ours, theirs, space.mask)

    def _bias(self, reading: Reading) -> Array | None:
        return reading.model.key_bias() if self.remove_key_bias else None

    def without_bias(self, reading: Reading) -> KVCache:
        """The cache, keys less the bias of their projection if that is asked for."""
        bias = self._bias(reading)
        if bias is None:
            return reading.cache
        if reading.layers is not None:
            bias = bias[np.array(reading.layers)]
        return reading.cache._replace(k=reading.cache.k - _per_layer(bias, reading.cache))


def _per_layer(bias_LKH: Array, cache: KVCache) -> Any:
    """[L, K, H] as it is added to keys [L, B, T, K, H]."""
    return bias_LKH[:, None, None].astype(cache.k.dtype)
