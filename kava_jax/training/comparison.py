"""What is compared: one teacher's vectors and the student's, brought into one space.

``loss.match`` decides which vectors those are: keys and values (parts ``k`` and ``v``), or one
output of every layer (part ``o``); all that differs between them is here. The layer map picks
layers and the projector maps one side's vectors onto the other's: what comes out has one shape,
[P, B, T, J, H] on both sides. The *space* is the side that is not projected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from kava_jax.alignment.attention import Attended
from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import HandedOver, KVCache
from kava_jax.data.batches import Batch
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.layers import KeySpace, Output
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.rope import Rotations, of_layers, rotate_layers
from kava_jax.models.spec import DecoderSpec

# A cache can hold keys before their bias too; these two are what may be compared.
ComparedKeys = Literal["pre_rope", "post_rope"]

# Parts, which are also suffixes in the names of metrics, in words.
PARTS = {"k": "keys", "v": "values", "o": "outputs"}
# By part, the vectors of layers [L, B, T, J, H]: J heads of H numbers. Both sides meet in one
# function, each with sizes of its own, so the sizes have no names here.
Vectors = dict[str, Float[Array, "_ _ _ _ _"]]
# Student and target in one space, and the student's own mapped vectors. These are its vectors
# before any projector, in its own heads and width: their lengths are the student's, where a
# projected vector's length also depends on the projector.
Compared = tuple[Vectors, Vectors, Vectors]


class ForwardPass(NamedTuple):
    """What one model makes of a batch."""

    model: Decoder
    hidden: Float[Array, "B T D"]
    vectors: Vectors
    """Of the kept layers, by part; keys before their bias, unless others were asked for."""
    queries: Float[Array, "L B T N H"] | None
    masks: Bool[Array, "B W T S"]
    rotations: Rotations
    """Of all layers."""
    layers: tuple[int, ...] | None = None
    """Which layers were kept; None: all."""


def forward(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    batch: Batch,
    *,
    output: Output | None = None,
    key_space: KeySpace = "pre_bias",
    queries: bool = False,
    layers: tuple[int, ...] | None = None,
    handed: Callable[[Rotations], HandedOver] | None = None,
) -> ForwardPass:
    """Run one model over the batch, keeping its cache or, where it is named, one ``output``.

    With ``queries`` a cache comes with the post-RoPE queries, of all layers; otherwise ``layers``
    says of which layers anything is kept. ``handed`` gives what is handed over, for the model's
    rotations, to a pass that keeps no more than its cache.
    """
    model = nnx.merge(graph, params)
    positions_BT = token_positions(batch.valid)
    mask = attention_mask(positions_BT, positions_BT, batch.valid, model.spec.windows)
    inputs, asked = (batch.tokens, positions_BT, mask), None
    rotations = model.rotation(positions_BT)
    if output is not None:
        hidden, outputs = model.keeping(*inputs, attrgetter(output), layers=layers)
        vectors = {"o": outputs[..., None, :]}
    else:
        # Queries are kept of all layers, so the cache is, too, and both are numbered alike.
        if queries:
            layers = None
            hidden, (cache, asked) = model.keeping(
                *inputs, lambda new: (new.cache(key_space), new.q), by_mask=True
            )
        else:
            past = None if handed is None else handed(rotations)
            hidden, cache = model(*inputs, past=past, key_space=key_space, layers=layers)
        vectors = cache._asdict()
    return ForwardPass(model, hidden, vectors, asked, mask, rotations, layers)


@dataclass(frozen=True)
class LayerComparison:
    """How one teacher's vectors and the student's become comparable.

    Models give their keys before the bias. What is still missing from the keys to compare (bias,
    RoPE) is added here in float32: in bfloat16 a large bias leaves little of a key.
    """

    name: str
    layer_map: LayerMap
    key_space: ComparedKeys = "pre_rope"
    remove_key_bias: bool = False
    output: Output | None = None
    """Which output of layers is compared, as wide as the model; None: keys and values."""

    def heads(self, spec: DecoderSpec) -> tuple[int, int]:
        """Number and width of the vectors that a model has of one token in one layer."""
        return (1, spec.hidden_size) if self.output else (spec.num_kv_heads, spec.head_dim)

    def cut(self) -> tuple[int, bool]:
        """How many whole blocks a teacher needs, and whether a KV-only tail after them."""
        last = self.layer_map.last_teacher_layer
        return (last + 1, False) if self.output else (last, True)

    def vectors(self, run: ForwardPass) -> Vectors:
        """What is compared of a forward pass, of all layers that it kept.

        Keys are float32 where a bias is added or RoPE turns them, all else in the model's dtype.
        """
        if self.output:
            return run.vectors
        whole = run.vectors if self.remove_key_bias else full_cache(run)._asdict()
        if self.key_space == "post_rope":
            kept = range(len(whole["k"])) if run.layers is None else run.layers
            whole = whole | {"k": rotate_layers(whole["k"], of_layers(run.rotations, kept))}
        return whole

    def sides(self, student: ForwardPass, teacher: ForwardPass) -> tuple[Vectors, Vectors]:
        """The mapped layers of student and teacher, each with its own heads and width."""
        # Where only a few layers were kept, they are numbered again, from 0.
        layer_map = (
            self.layer_map if teacher.layers is None else self.layer_map.among(teacher.layers)
        )
        ours = self.layer_map.student_side(self.vectors(student))
        return ours, layer_map.teacher_side(self.vectors(teacher))

    def projected(
        self,
        projector: KVDimensionProjector,
        ours: Vectors,
        theirs: Vectors,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Compared:
        """Both ``sides`` in one space; dropout in the projector only when a key is given."""
        onto_student = projector.direction == "teacher_to_student"
        source = theirs if onto_student else ours
        mapped = projector.project(self.name, source, dropout_key=dropout_key)
        return (ours, mapped, ours) if onto_student else (mapped, theirs, ours)

    def can_attend(self, direction: str) -> bool:
        """Whether the space has queries of its own: not for outputs, nor where it joins layers."""
        alone = direction == "teacher_to_student" or self.layer_map.sources == 1
        return alone and not self.output

    def attended(
        self, compared: Compared, direction: str, student: ForwardPass, teacher: ForwardPass
    ) -> Attended:
        """What the queries of the space (student's or teacher's) need to read both caches."""
        # Layers of the space's model. In the teacher's space rows have one layer (``can_attend``).
        space, layers = student, list(self.layer_map.student_layers)
        if direction != "teacher_to_student":
            space, layers = teacher, [row[0] for row in self.layer_map.teacher_layers]
        assert space.queries is not None

        def as_attended(vectors: Vectors) -> KVCache:
            cache = KVCache(**vectors)
            # These keys are as attention reads them: a config refuses ``remove_key_bias`` after
            # RoPE.
            if self.key_space == "post_rope":
                return cache
            # Queries have learnt to read keys with their model's bias, so one that was left out
            # comes back. A bias that was not left out is in the keys already.
            keys = _with_bias(cache.k, space, layers) if self.remove_key_bias else cache.k
            return cache._replace(k=rotate_layers(keys, of_layers(space.rotations, layers)))

        ours, theirs, _ = compared
        queries, spec = space.queries[np.array(layers)], space.model.spec
        if spec.attention_scale is not None:
            queries = queries * (spec.attention_scale * spec.head_dim**0.5)
        which = tuple(spec.windows.index(spec.layer_windows[layer]) for layer in layers)
        caches = (as_attended(ours), as_attended(theirs))
        return Attended(queries, *caches, space.masks, which, spec.attention_cap)


def full_cache(run: ForwardPass) -> KVCache:
    """Keys before RoPE, with their bias, and values, of the layers that were kept."""
    return KVCache(_with_bias(run.vectors["k"], run, run.layers), run.vectors["v"])


def _with_bias(
    keys: Float[Array, "L B T K H"], run: ForwardPass, layers: Sequence[int] | None
) -> Array:
    """Keys of these layers with their bias, float32; as they are where the model has none."""
    bias = run.model.key_bias()
    if bias is None:
        return keys
    own = bias if layers is None else bias[np.array(layers)]
    return keys.astype(jnp.float32) + own[:, None, None].astype(jnp.float32)
