"""One dense RoPE decoder for Qwen2/2.5, Qwen3, Llama, Mistral and SmolLM.

Parameters of all layers are stacked and ``lax.scan`` runs over them. A 48-layer model therefore
compiles as fast as a 2-layer one, and the keys and values of all layers come out stacked. The cache
is a return value; there are no hooks. A teacher that needs no logits is *cut*: it has fewer blocks,
a KV-only tail and no head.

Left out on purpose: sampling, beam search and mixture-of-experts layers.
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
from kava_jax.models.attend import Attend, Implementation, attend
from kava_jax.models.layers import (
    Activations,
    Block,
    Dtypes,
    KeySpace,
    Output,
    Projection,
    RMSNorm,
)
from kava_jax.models.rope import Rotation, rope_rotation
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.sharding import Layouts

Remat = Literal["none", "dots", "full"]
Params = dict[str, Any]


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
        self.blocks = _stacked_blocks(spec, count, dtypes, rngs) if count else None
        self.tail = Block(spec, dtypes=dtypes, rngs=rngs, whole=False) if tail else None
        self.final_norm = (
            RMSNorm(spec.hidden_size, "embed", eps=spec.norm_eps, dtypes=dtypes) if head else None
        )
        self.head = (
            Projection(
                {"embed": spec.hidden_size},
                {"vocab": spec.vocab_size},
                bias=False,
                std=spec.initializer_range,
                dtypes=dtypes,
                rngs=rngs,
            )
            if head and not spec.tie_embeddings
            else None
        )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        mask_BTS: Bool[Array, "B 1 T S"],
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
        each row (``rope.rope_rotation``); pass it with a past.
        Positions and mask come from ``models.masks``.
        """

        def cache(new: Activations) -> KVCache:
            return new.cache(key_space)

        how = attend if isinstance(past, KVCache) else self._by_kernel(positions_BT)
        rotation = self.rotation(positions_BT, lengths_B)
        return self._run(tokens_BT, rotation, mask_BTS, past, cache, how, layers)

    def with_queries(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        mask_BTS: Bool[Array, "B 1 T S"],
        *,
        key_space: KeySpace = "pre_rope",
    ) -> tuple[Float[Array, "B T D"], KVCache, Float[Array, "L B T N H"]]:
        """A call without a past, with XLA attention; also returns all layers' post-RoPE queries."""

        def both(new: Activations) -> tuple[KVCache, Array | None]:
            return new.cache(key_space), new.q

        inputs = (tokens_BT, self.rotation(positions_BT), mask_BTS)
        hidden, (cache, queries) = self._run(*inputs, None, both, attend, None)
        return hidden, cache, queries

    def with_outputs(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        mask_BTS: Bool[Array, "B 1 T S"],
        output: Output,
        *,
        layers: tuple[int, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"]]:
        """A call without a past that keeps one ``output`` of the layers, and no cache.

        If ``layers`` (ascending) is given, only those layers' outputs are kept. A KV-only tail has
        none.
        """

        def keep(new: Activations) -> Array:
            return getattr(new, output)

        inputs = (tokens_BT, self.rotation(positions_BT), mask_BTS)
        return self._run(*inputs, None, keep, self._by_kernel(positions_BT), layers)

    def rotation(
        self, positions_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"] | None = None
    ) -> Rotation:
        """Cosines and sines that turn pre-RoPE keys into post-RoPE ones (``rope.rotate``)."""
        return rope_rotation(self.spec, positions_BT, lengths_B)

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

    def _run(
        self,
        tokens_BT: Int[Array, "B T"],
        rotation: Rotation,
        mask_BTS: Bool[Array, "B 1 T S"],
        past: KVCache | HandedOver | None,
        keep: Callable[[Activations], Any],
        how: Attend,
        wanted: tuple[int, ...] | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states, and the results of ``keep`` for the wanted layers, stacked over layers."""
        x_BTD = self._by_rows(self._embedded(tokens_BT))
        kept, depth = [], 0
        if self.blocks is not None:
            graph, layers = nnx.split(self.blocks)

            def layer(
                x_BTD: Array, xs: tuple[Any, KVCache | HandedOver | None]
            ) -> tuple[Array, Any]:
                params, layer_past = xs
                x_BTD, new = nnx.merge(graph, params)(x_BTD, rotation, mask_BTS, layer_past, how)
                # ``keep`` runs inside the scan, so what it drops is never stacked over layers.
                return self._by_rows(x_BTD), keep(new)

            run = _remat(layer, self.remat)
            depth = jax.tree.leaves(layers)[0].shape[0]
            of_blocks = wanted and tuple(number for number in wanted if number < depth)
            if of_blocks is None or len(of_blocks) == depth:
                x_BTD, found = jax.lax.scan(run, x_BTD, (layers, past))
            else:
                x_BTD, found = _scan_keeping(run, x_BTD, (layers, past), depth, of_blocks)
            kept.append(found)
        if self.tail is not None and (wanted is None or depth in wanted):
            of_tail = keep(self.tail.without_attending(x_BTD, rotation))
            kept.append(jax.tree.map(lambda array: array[None], of_tail))
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
        return (x_BTD if self.final_norm is None else self.final_norm(x_BTD)), stacked

    def _by_kernel(self, positions_BT: Int[Array, "B T"]) -> Attend:
        """This decoder's attention for calls without a past."""
        if self.attention == "xla":
            return attend
        return partial(
            attend,
            implementation=self.attention,
            # Padding repeats the position before it. Using positions here leaves the mask unused,
            # so that XLA never builds it.
            valid_BT=jnp.diff(positions_BT, axis=1, prepend=-1) > 0,
            window=self.spec.sliding_window,
            rows=None if self.layouts is None else self.layouts.rows,
        )

    def _embedded(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = self.embed.embedding[...][tokens_BT]
        if self.layouts is not None:
            # The lookup's result first lies as the table does. Without this step the partitioner
            # would go to the layout of rows by way of whole copies.
            x_BTD = jax.lax.with_sharding_constraint(x_BTD, self.layouts.embedded)
        # After the lookup, so that only the rows of the batch are cast and not the whole table.
        return x_BTD.astype(self.dtype)

    def _by_rows(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.layouts is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, self.layouts.rows)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits: ``hidden @ head_table().T``.

        The factors have the compute dtype. The result is not rounded to it, because close logits
        would become equal.
        """
        table = self.head_table().astype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

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


def _stacked_blocks(spec: DecoderSpec, count: int, dtypes: Dtypes, rngs: nnx.Rngs) -> Block:
    """``count`` blocks as one module whose parameters have a leading layer axis."""
    build = nnx.vmap(lambda r: Block(spec, dtypes=dtypes, rngs=r), in_axes=0, out_axes=0)
    return build(rngs.split(count))


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
