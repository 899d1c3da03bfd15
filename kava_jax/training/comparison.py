"""One teacher's cache and the student's, brought into one space.

Models are read before their keys get a bias, and what stands between that and the keys to compare
(bias, RoPE) is done here in float32: in bfloat16 a large bias leaves little of a key. The layer map
picks layers and the projector maps one side's vectors onto the other's: what comes out has one
shape, [P, B, T, K, H] on both sides. The *space* is the side that is not projected.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import KVCache
from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.layers import KeySpace, Rotation
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import rotate

# A cache can hold keys before their bias too; these two are what may be compared.
ComparedKeys = Literal["pre_rope", "post_rope"]


class Reading(NamedTuple):
    """One model's pass over a batch."""

    model: Decoder
    hidden: Float[Array, "B T D"]
    cache: KVCache
    """Keys before their bias, unless ``read`` was asked for others."""
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
    key_space: KeySpace = "pre_bias",
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
    """Both sides in one space, [P, B, T, K, H] each, and the student's vectors as they are.

    ``own`` is the student's side before any projector, in its own heads and width: its lengths are
    the student's, where a projected vector's are the projector's as well.
    """

    student: KVCache
    target: KVCache
    own: KVCache


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
    key_space: ComparedKeys = "pre_rope"
    remove_key_bias: bool = False

    def __call__(
        self,
        projector: KVDimensionProjector,
        student: Reading,
        teacher: Reading,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Compared:
        """The mapped layers of both sides; dropout in the projector only when a key is given."""
        return self.projected(projector, *self.sides(student, teacher), dropout_key)

    def sides(self, student: Reading, teacher: Reading) -> tuple[KVCache, KVCache]:
        """The mapped layers of student and teacher, each with its own heads and width."""
        layer_map = (
            self.layer_map if teacher.layers is None else self.layer_map.among(teacher.layers)
        )
        ours = self.layer_map.student_cache(self.cache(student))
        return ours, layer_map.teacher_cache(self.cache(teacher))

    def projected(
        self,
        projector: KVDimensionProjector,
        ours: KVCache,
        theirs: KVCache,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Compared:
        """Both ``sides`` in one space. The projector's factors are in the values' dtype."""
        forward = projector.direction == "teacher_to_student"
        source = theirs if forward else ours
        source = source._replace(k=source.k.astype(source.v.dtype))
        mapped = projector.project(self.name, source, dropout_key=dropout_key)
        return Compared(ours, mapped, ours) if forward else Compared(mapped, theirs, ours)

    def cache(self, reading: Reading) -> KVCache:
        """The reading's values, and its keys as they are compared.

        They are float32 where a bias is added or RoPE turns them, else as they were read.
        """
        keys = reading.cache.k
        bias = None if self.remove_key_bias else reading.model.key_bias()
        if bias is not None:
            held = bias if reading.layers is None else bias[np.array(reading.layers)]
            keys = _with_bias(keys, held)
        return reading.cache._replace(
            k=keys if self.key_space == "pre_rope" else _turned(keys, reading.rotation)
        )

    def can_attend(self, direction: str) -> bool:
        """Whether the space has queries of its own: not where it joins teacher layers."""
        return direction == "teacher_to_student" or self.layer_map.sources == 1

    def attended(
        self, compared: Compared, direction: str, student: Reading, teacher: Reading
    ) -> Attended:
        """What the queries of the space (student's or teacher's) need to read both caches."""
        forward = direction == "teacher_to_student"
        space = student if forward else teacher
        layers = np.array(
            self.layer_map.student_layers
            if forward
            else [row[0] for row in self.layer_map.teacher_layers]
        )
        assert space.queries is not None
        bias = space.model.key_bias() if self.remove_key_bias else None

        def read_by_queries(cache: KVCache) -> KVCache:
            if self.key_space == "post_rope":
                return cache
            keys = cache.k if bias is None else _with_bias(cache.k, bias[layers])
            return cache._replace(k=_turned(keys, space.rotation))

        ours, theirs = read_by_queries(compared.student), read_by_queries(compared.target)
        return Attended(space.queries[layers], ours, theirs, space.mask)


def _with_bias(keys: Float[Array, "L B T K H"], bias: Float[Array, "L K H"]) -> Array:
    return keys.astype(jnp.float32) + bias[:, None, None].astype(jnp.float32)


def _turned(keys: Float[Array, "L B T K H"], rotation: Rotation) -> Array:
    """Keys of all layers after RoPE, in float32."""
    return jax.vmap(lambda layer: rotate(layer.astype(jnp.float32), rotation))(keys)
