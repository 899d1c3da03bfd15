"""One teacher's cache and the student's, brought into one space.

Models give their keys before the bias. What is still missing from the keys to compare (bias, RoPE)
is added here in float32: in bfloat16 a large bias leaves little of a key. The layer map
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

# Student and target in one space, [P, B, T, K, H] each, and the student's own mapped vectors. These
# are its vectors before any projector, in its own heads and width: their lengths are the student's,
# where a projected vector's length also depends on the projector.
Compared = tuple[KVCache, KVCache, KVCache]


class ForwardPass(NamedTuple):
    """What one model makes of a batch."""

    model: Decoder
    hidden: Float[Array, "B T D"]
    cache: KVCache
    """Keys before their bias, unless ``forward`` was asked for others."""
    queries: Float[Array, "L B T N H"] | None
    mask: Bool[Array, "B 1 T S"]
    rotation: Rotation
    layers: tuple[int, ...] | None = None
    """Which layers the cache holds; None: all."""


def forward(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    batch: Batch,
    *,
    key_space: KeySpace = "pre_bias",
    queries: bool = False,
    layers: tuple[int, ...] | None = None,
) -> ForwardPass:
    """Run one model over the batch.

    With ``queries`` its post-RoPE queries are kept as well, of all layers; without them ``layers``
    says whose keys and values are kept.
    """
    model = nnx.merge(graph, params)
    positions_BT = token_positions(batch.valid)
    mask = attention_mask(positions_BT, positions_BT, batch.valid, model.spec.sliding_window)
    inputs, asked = (batch.tokens, positions_BT, mask), None
    # Queries are kept of all layers, so the cache is, too, and both are numbered alike.
    if queries:
        layers = None
        hidden, cache, asked = model.with_queries(*inputs, key_space=key_space)
    else:
        hidden, cache = model(*inputs, key_space=key_space, layers=layers)
    return ForwardPass(model, hidden, cache, asked, mask, model.rotation(positions_BT), layers)


@dataclass(frozen=True)
class CacheComparison:
    """How one teacher's cache and the student's become comparable."""

    name: str
    layer_map: LayerMap
    key_space: ComparedKeys = "pre_rope"
    remove_key_bias: bool = False

    def __call__(
        self, projector: KVDimensionProjector, student: ForwardPass, teacher: ForwardPass
    ) -> Compared:
        """The mapped layers of both sides in one space, without dropout."""
        return self.projected(projector, *self.sides(student, teacher))

    def sides(self, student: ForwardPass, teacher: ForwardPass) -> tuple[KVCache, KVCache]:
        """The mapped layers of student and teacher, each with its own heads and width."""
        # A cache that holds a few layers is numbered again, from 0.
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
        """Both ``sides`` in one space; dropout in the projector only when a key is given.

        The projector's factors are in the values' dtype.
        """
        onto_student = projector.direction == "teacher_to_student"
        source = theirs if onto_student else ours
        # Keys are float32 where a bias or RoPE was applied; their products would then be float32 as
        # well, and slow on accelerators.
        if projector.kind != "identity":
            source = source._replace(k=source.k.astype(source.v.dtype))
        mapped = projector.project(self.name, source, dropout_key=dropout_key)
        return (ours, mapped, ours) if onto_student else (mapped, theirs, ours)

    def cache(self, run: ForwardPass) -> KVCache:
        """The values of a forward pass, and its keys as they are compared.

        They are float32 where a bias is added or RoPE turns them, else in the model's dtype.
        """
        keys = run.cache.k
        # The bias before RoPE, as in the model: RoPE turns the sum.
        bias = None if self.remove_key_bias else run.model.key_bias()
        if bias is not None:
            keys = _with_bias(keys, bias if run.layers is None else bias[np.array(run.layers)])
        if self.key_space == "post_rope":
            keys = _turned(keys, run.rotation)
        return run.cache._replace(k=keys)

    def can_attend(self, direction: str) -> bool:
        """Whether the space has queries of its own: not where it joins teacher layers."""
        return direction == "teacher_to_student" or self.layer_map.sources == 1

    def attended(
        self, compared: Compared, direction: str, student: ForwardPass, teacher: ForwardPass
    ) -> tuple[Float[Array, "P B T N H"], KVCache, KVCache, Bool[Array, "B 1 T S"]]:
        """What the queries of the space (student's or teacher's) need to read both caches.

        The queries, student and target with keys after RoPE and with biases, and the mask.
        """
        # Layers of the space's model. In the teacher's space rows have one layer (``can_attend``).
        space, layers = student, list(self.layer_map.student_layers)
        if direction != "teacher_to_student":
            space, layers = teacher, [row[0] for row in self.layer_map.teacher_layers]
        assert space.queries is not None
        # Queries have learnt to read keys with their model's bias, so one that was left out comes
        # back. A bias that was not left out is in the keys already.
        bias = space.model.key_bias() if self.remove_key_bias else None

        def as_attended(cache: KVCache) -> KVCache:
            # These keys are as attention reads them: a config refuses ``remove_key_bias`` after
            # RoPE.
            if self.key_space == "post_rope":
                return cache
            keys = cache.k if bias is None else _with_bias(cache.k, bias[np.array(layers)])
            return cache._replace(k=_turned(keys, space.rotation))

        ours, theirs, _ = compared
        queries = space.queries[np.array(layers)]
        return queries, as_attended(ours), as_attended(theirs), space.mask


def _with_bias(keys: Float[Array, "L B T K H"], bias: Float[Array, "L K H"]) -> Array:
    return keys.astype(jnp.float32) + bias[:, None, None].astype(jnp.float32)


def _turned(keys: Float[Array, "L B T K H"], rotation: Rotation) -> Array:
    """Keys of all layers after RoPE, in float32."""
    return jax.vmap(lambda layer: rotate(layer.astype(jnp.float32), rotation))(keys)
