"""``kava bench teacher``: the teacher's pass as it is run, and a whole forward pass."""

import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kava_jax.bench.harness import Facts, Side, compare, compiled, peer_version
from kava_jax.bench.pairs import Pair, batch_of, write_model
from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.hf.load import load_model, read_spec
from kava_jax.models.decoder import Params
from kava_jax.parallel.sharding import put_batch
from kava_jax.plan.floor import step_floor
from kava_jax.training.comparison import forward

TOLERANCE = 1e-4  # of the largest entry
# Logits of every eighth position are compared: all of them would be a gigabyte.
EVERY = 8


def bench_teacher(peer: str | None = None, pair: Pair = Pair()) -> Facts:  # noqa: B008 (immutable)
    """Seconds of keys and values of the mapped layers, and of logits and cache of the whole model.

    The cut teacher ends in the last mapped layer, of which only keys and values are projected, and
    has no head; with the default map that is the model's last layer, ``half`` maps the first half
    only. FLOPs are the teachers' part of ``plan.floor.step_floor``. With ``peer="tunix"`` also the
    whole pass of Google's Tunix, a public JAX implementation of the same models (the extra
    ``bench`` installs it), whose logits, keys and values have to be ours; KavaError without it.
    """
    if peer not in (None, "tunix"):
        raise KavaError(f"--peer={peer!r} is unknown; use tunix, or leave it out")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "teacher"
        sides = {name: partial(_cut, name, pair) for name in ("cut", "half")}
        sides["whole"] = partial(_whole, directory, pair)
        if peer:
            peer_version("google-tunix")
            sides["tunix"] = partial(_tunix, directory, pair)
        write_model(directory, pair.teacher, seed=0)
        return {"pair": pair._asdict(), **compare(sides, TOLERANCE)}


def _cut(name: str, pair: Pair) -> Side:
    """The teacher as a run has it; ``half`` of its layers are mapped, or all."""
    depth, mapped = (m["num_hidden_layers"] for m in (pair.teacher, pair.student))
    half = [[layer * (depth // 2) // mapped, layer] for layer in range(mapped)]
    run = pair.run({"teachers.0.layer_map": half} if name == "half" else {})
    batch, params = put_batch(batch_of(run, 0)[0], run.mesh), run.load_teachers()["teacher"]
    graph = run.teachers["teacher"].link.graph

    def cache(params: Params) -> KVCache:
        return KVCache(**forward(graph, params, batch, key_space="post_rope").vectors)

    flops = step_floor(run, pair.rows, pair.length, 0)["teachers"]
    tokens = pair.rows * pair.length
    return compiled(cache, params, compared=False, tokens=tokens, flops=flops)


def _whole(directory: Path, pair: Pair) -> Side:
    graph, params = load_model(directory)
    batch = jax.tree.map(jnp.asarray, batch_of(pair.run(), 0)[0])

    def whole(params: Params) -> tuple[Any, KVCache]:
        found = forward(graph, params, batch, key_space="post_rope")
        return found.model.logits(found.hidden), KVCache(**found.vectors)

    return _compared(partial(jax.jit(whole), params), pair)


def _tunix(directory: Path, pair: Pair) -> Side:
    """Its Qwen2 with the weights of a Hugging Face directory, in float32, compiled."""
    models: Any = importlib.import_module("tunix.models.qwen2")
    spec = read_spec(directory)
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
    load = models.params.create_model_from_safe_tensors
    layers = [f"layer_{number}" for number in range(spec.num_layers)]
    shape, tokens = (pair.rows, pair.length), jnp.asarray(batch_of(pair.run(), 0)[0].tokens)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(load(str(directory), config, mesh, dtype=jnp.float32))

        @jax.jit
        def forward(state: Any, tokens_BT: Any) -> tuple[Any, KVCache]:
            room = jnp.zeros((*shape, spec.num_kv_heads, spec.head_dim))
            empty = {"k": room, "v": room, "end_index": jnp.zeros(shape[:1], jnp.int32)}
            positions = jnp.broadcast_to(jnp.arange(pair.length), shape)
            mask = jnp.broadcast_to(jnp.tri(pair.length, dtype=bool), (*shape, pair.length))
            model = nnx.merge(graph, state)
            logits, cache = model(tokens_BT, positions, dict.fromkeys(layers, empty), mask)
            parts = (jnp.stack([cache[name][part] for name in layers]) for part in "kv")
            return logits, KVCache(*parts)

    def run() -> tuple[Any, KVCache]:
        with jax.set_mesh(mesh):
            return forward(state, tokens)

    return _compared(run, pair)


def _compared(forward: Callable[[], tuple[Any, KVCache]], pair: Pair) -> Side:
    def run() -> Any:
        logits, cache = jax.block_until_ready(forward())
        return np.asarray(logits)[:, ::EVERY], cache  # on a CPU a view, which takes no time

    return Side(run, {"tokens": pair.rows * pair.length})
