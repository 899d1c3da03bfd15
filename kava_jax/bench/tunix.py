"""Google's Tunix, a public JAX implementation of the same models: a peer of the teacher's pass.

The extra ``bench`` installs it; nothing else of this package knows it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from kava_jax.bench.peers import peer
from kava_jax.cache import KVCache
from kava_jax.models.spec import DecoderSpec

# tokens [B, T] -> logits [B, T, V] and every layer's keys, after RoPE, and values
Forward = Callable[[Int[Array, "B T"]], tuple[Array, KVCache]]


def tunix_forward(directory: Path, spec: DecoderSpec) -> Forward:
    """Its Qwen2 with the weights of a Hugging Face directory, in float32, compiled.

    Raises KavaError without Tunix.
    """
    models: Any = peer("tunix.models.qwen2")
    config = models.model.ModelConfig(
        num_layers=spec.num_layers,
        vocab_size=spec.vocab_size,
        embed_dim=spec.hidden_size,
        hidden_dim=spec.intermediate_size,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        num_kv_heads=spec.num_kv_heads,
        rope_theta=int(spec.rope_theta),
        norm_eps=spec.norm_eps,
        use_tied_embedding=spec.tie_embeddings,
    )
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        load = models.params.create_model_from_safe_tensors
        graph, state = nnx.split(load(str(directory), config, mesh, dtype=jnp.float32))
    layers = [f"layer_{number}" for number in range(spec.num_layers)]

    @jax.jit
    def forward(state: Any, tokens_BT: Array) -> tuple[Array, KVCache]:
        rows, length = tokens_BT.shape
        room = jnp.zeros((rows, length, spec.num_kv_heads, spec.head_dim))
        empty = {"k": room, "v": room, "end_index": jnp.zeros((rows,), jnp.int32)}
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
        logits, cache = nnx.merge(graph, state)(
            tokens_BT, positions, dict.fromkeys(layers, empty), mask
        )
        return logits, KVCache(
            *(jnp.stack([cache[name][part] for name in layers]) for part in "kv")
        )

    def run(tokens_BT: Array) -> tuple[Array, KVCache]:
        with jax.set_mesh(mesh):
            return forward(state, tokens_BT)

    return run
