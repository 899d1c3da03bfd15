"""One RoPE decoder for all supported families.

Parameters of all layers are stacked and ``lax.scan`` runs over them. A 48-layer model therefore
compiles as fast as a 2-layer one, and the keys and values of all layers come out stacked. Where
layers differ in window or rotation, each is told by a number which of a few it takes. The cache is
a return value; there are no hooks. A teacher that needs no logits is *cut*: it has fewer blocks,
a KV-only tail and no head.

Left out on purpose: sampling and beam search.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kava_jax.cache import HandedOver, KVCache
from kava_jax.models.attend import Attend, Implementation, attend, capped
from kava_jax.models.experts import Experts
from kava_jax.models.layers import (
    MLP,
    Activations,
    Block,
    Dtypes,
    KeySpace,
    Projection,
    RMSNorm,
)
from kava_jax.models.rope import Rotations, layer_rotations, rope_rotations
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.sharding import Layouts

Remat = Literal["none", "dots", "full"]
Params = dict[str, Any]


# By layer, the number of its mask and of its rotation; None where all take the first.
_Own = tuple[Array | None, Array | None]


class Decoder(nnx.Module):
    """A causal language model that returns its last hidden states and its key/value cache."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        rngs: nnx.Rngs,
        blocks: int | None = None,
        tail: bool = False,
        head: bool = True,
        param_dtype: Any = jnp.float32,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
        layouts: Layouts | None = None,
        attention: Implementation = "xla",
    ):
        """Build ``blocks`` full layers (all by default), optionally a KV-only ``tail`` after them.

        ``head=False`` leaves out the final norm and LM head: the decoder has a cache but no logits.
        ``layouts`` holds the shardings of hidden states on a mesh. ``attention`` is used by calls
        without a past; unless it is ``xla``, rows must be padded on the right.
        """
        dtypes = Dtypes(jnp.dtype(param_dtype), jnp.dtype(dtype))
        count = spec.num_layers if blocks is None else blocks
        self.spec, self.dtype = spec, dtypes.compute
        self.remat: Remat = remat
        self.layouts = layouts
        self.attention: Implementation = attention
        self.embed = nnx.Embed(
            spec.vocab_size,
            spec.hidden_size,
            param_dtype=dtypes.param,
            embedding_init=nnx.initializers.normal(spec.initializer_range),
            embedding_metadata={"axes": ("vocab", "embed")},
            rngs=rngs,
        )
        mlp = partial(Experts, layouts=layouts) if spec.num_experts else MLP
        # One module of as many layers, whose parameters have a leading layer axis.
        stack = nnx.vmap(lambda rngs: Block(spec, mlp, dtypes=dtypes, rngs=rngs))
        self.blocks = stack(rngs.split(count)) if count else None
        self.tail = Block(spec, None, dtypes=dtypes, rngs=rngs) if tail else None
        final_norm = projection = None
        if head:
            final_norm = RMSNorm({"embed": spec.hidden_size}, spec=spec, dtypes=dtypes)
        if head and not spec.tie_embeddings:
            axes = ({"embed": spec.hidden_size}, {"vocab": spec.vocab_size})
            project = partial(Projection, std=spec.initializer_range, dtypes=dtypes, rngs=rngs)
            projection = project(*axes, bias=False)
        self.final_norm, self.head = final_norm, projection

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        mask_BWTS: Bool[Array, "B W T S"],
        *,
        past: KVCache | HandedOver | None = None,
        key_space: KeySpace = "pre_rope",
        layers: tuple[int, ...] | None = None,
        lengths_B: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Run the layers over ``tokens``.

        ``past`` holds the post-RoPE keys and values [L, B, S - T, K, H] of earlier tokens, or what
        was handed over in place of these tokens' own (then S = T). The returned cache holds only
        the *new* tokens' [L, B, T, K, H], with keys in ``key_space``. If ``layers`` (ascending) is
        given, only those layers' keys and values are kept. ``lengths_B`` is the final length of
        each row (``rope.rope_rotations``); pass it with a past.
        Positions and masks, one for each of ``spec.windows``, come from ``models.masks``.
        """
        inputs = (tokens_BT, positions_BT, mask_BWTS)
        keep = partial(Activations.cache, key_space=key_space)
        return self.keeping(*inputs, keep, past=past, layers=layers, lengths_B=lengths_B)

    def keeping(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        mask_BWTS: Bool[Array, "B W T S"],
        keep: Callable[[Activations], Any],
        *,
        past: KVCache | HandedOver | None = None,
        layers: tuple[int, ...] | None = None,
        lengths_B: Int[Array, "B"] | None = None,
        by_mask: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """A call that keeps what ``keep`` makes of each layer, stacked over layers, and no cache.

        A KV-only tail has keys, values and queries alone. With ``by_mask`` the attention is XLA's,
        which reads the mask, also where the decoder has another one.
        """
        cached = isinstance(past, KVCache)
        hows = [self._by_xla()] if cached or by_mask else self._by_kernel(positions_BT)
        rotations = rope_rotations(self.spec, positions_BT, lengths_B)
        x_BTD = self._by_rows(self._embedded(tokens_BT))
        kept, depth = [], 0
        if self.blocks is not None:
            graph, params = nnx.split(self.blocks)

            def layer(
                x_BTD: Array, xs: tuple[Any, KVCache | HandedOver | None, _Own]
            ) -> tuple[Array, Any]:
                own_params, layer_past, own = xs
                block = nnx.merge(graph, own_params)
                window, rope = (0 if number is None else number for number in own)
                rotation = jax.tree.map(lambda part: part[rope], rotations)
                mask_B1TS = mask_BWTS[:, window, None]
                # Kernels know their window when they are compiled.
                how = hows[0] if len(hows) == 1 else partial(jax.lax.switch, window, hows)
                x_BTD, new = block(x_BTD, rotation, mask_B1TS, layer_past, how)
                # ``keep`` runs inside the scan, so what it drops is never stacked over layers.
                return self._by_rows(x_BTD), keep(new)

            run = _remat(layer, self.remat)
            depth = jax.tree.leaves(params)[0].shape[0]
            own = self._of_each(depth)
            of_blocks = layers and tuple(number for number in layers if number < depth)
            if of_blocks is None or len(of_blocks) == depth:
                x_BTD, found = jax.lax.scan(run, x_BTD, (params, past, own))
            else:
                x_BTD, found = _scan_keeping(run, x_BTD, (params, past, own), depth, of_blocks)
            kept.append(found)
        if self.tail is not None and (layers is None or depth in layers):
            own = self.spec.ropes.index(self.spec.layer_ropes[depth])
            rotation = jax.tree.map(lambda part: part[own], rotations)
            of_tail = keep(self.tail.without_attending(x_BTD, rotation))
            kept.append(jax.tree.map(lambda array: array[None], of_tail))
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
        if self.final_norm is not None:
            # Products of these with the head are logits, whatever scales those have.
            x_BTD = self.final_norm(x_BTD) * self.spec.logit_scale
        return x_BTD, stacked

    def rotation(self, positions_BT: Int[Array, "B T"]) -> Rotations:
        """What turns pre-RoPE keys of all layers into post-RoPE ones (``rope.rotate_layers``)."""
        return layer_rotations(self.spec, positions_BT)

    def key_bias(self) -> Float[Array, "L K H"] | None:
        """The bias that ``pre_bias`` keys lack, for all layers that write keys.

        None if keys have no bias, or if a key norm follows the projection.
        """
        if self.spec.qk_norm:
            return None
        projections = [part.attention.k for part in (self.blocks, self.tail) if part is not None]
        biases = [projection.bias[...] for projection in projections if projection.bias is not None]
        shape = (-1, self.spec.num_kv_heads, self.spec.head_dim)
        return jnp.concatenate([bias.reshape(shape) for bias in biases]) if biases else None

    def _of_each(self, depth: int) -> _Own:
        """Which of the masks and rotations each layer takes; numbers where all take the first."""
        spec = self.spec
        windows = [spec.windows.index(window) for window in spec.layer_windows[:depth]]
        ropes = [spec.ropes.index(rope) for rope in spec.layer_ropes[:depth]]
        window, rope = (jnp.array(own) if any(own) else None for own in (windows, ropes))
        return window, rope

    def _by_kernel(self, positions_BT: Int[Array, "B T"]) -> list[Attend]:
        """This decoder's attention for calls without a past: one for each window, or for all."""
        if self.attention == "xla":  # the mask says all
            return [self._by_xla()]
        kernel = partial(
            self._by_xla(),
            implementation=self.attention,
            # Padding repeats the position before it. Using positions here leaves the mask unused,
            # so that XLA never builds it.
            valid_BT=jnp.diff(positions_BT, axis=1, prepend=-1) > 0,
            rows=None if self.layouts is None else self.layouts.rows,
        )
        return [partial(kernel, window=window) for window in self.spec.windows]

    def _by_xla(self) -> Attend:
        return partial(attend, scale=self.spec.attention_scale, cap=self.spec.attention_cap)

    def _embedded(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = self.embed.embedding[...][tokens_BT]
        if self.layouts is not None:
            # The lookup's result first lies as the table does. Without this step the partitioner
            # would go to the layout of rows by way of whole copies.
            x_BTD = jax.lax.with_sharding_constraint(x_BTD, self.layouts.embedded)
        # After the lookup, so that only the rows of the batch are cast and not the whole table.
        x_BTD = x_BTD.astype(self.dtype)
        width = self.spec.hidden_size if self.spec.embedding_by_width else 1
        return x_BTD * (self.spec.embedding_scale * width**0.5)

    def _by_rows(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.layouts is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, self.layouts.rows)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits: ``hidden @ head_table().T``, capped where the family does so.

        The factors have the compute dtype. The result is not rounded to it, because close logits
        would become equal.
        """
        table = self.head_table().astype(self.dtype)
        found = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        return capped(found, self.spec.logit_cap)

    def head_table(self) -> Float[Array, "V D"]:
        """The LM head's rows in the parameter dtype: the embedding table when tied."""
        if self.head is not None:
            return self.head.kernel[...].T
        return self.embed.embedding[...]


def _scan_keeping(
    layer: Any, x: Array, xs: Any, depth: int, wanted: tuple[int, ...]
) -> tuple[Array, Any]:
    """``lax.scan`` that keeps only the outputs of the ``wanted`` layers (ascending).

    Every layer writes its output. An unwanted layer writes to the slot of the next wanted one,
    which then overwrites it. Layers after the last wanted one share a slot that is dropped.
    """
    # A scan that returned every layer's output would hold the caches of all layers at once, even if
    # most are dropped afterwards.
    places = np.searchsorted(wanted, np.arange(depth))
    one = jax.eval_shape(lambda x, xs: layer(x, jax.tree.map(lambda a: a[0], xs))[1], x, xs)
    room = int(places.max()) + 1
    empty = jax.tree.map(lambda a: jnp.zeros((room, *a.shape), a.dtype), one)

    def step(state: tuple[Array, Any], xs: tuple[Any, Array]) -> tuple[tuple[Array, Any], None]:
        x, kept = state
        x, new = layer(x, xs[0])
        kept = jax.tree.map(
            lambda all_, own: jax.lax.dynamic_update_index_in_dim(all_, own, xs[1], 0), kept, new
        )
        return (x, kept), None

    (x, kept), _ = jax.lax.scan(step, (x, empty), (xs, jnp.asarray(places, jnp.int32)))
    return x, jax.tree.map(lambda all_: all_[: len(wanted)], kept)


def _remat(layer: Any, policy: Remat) -> Any:
    """In the backward pass recompute nothing, all but matmul results (``dots``), or everything."""
    if policy == "none":
        return layer
    # Attention scores have batch dimensions and projections have none. So ``dots`` keeps the
    # projections and computes the scores, which grow with the square of the length, again.
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    # Inside a scan the recomputation is not merged with the forward pass, so prevent_cse would only
    # cost time (documentation of jax.checkpoint).
    return jax.checkpoint(layer, policy=saved[policy], prevent_cse=False)
