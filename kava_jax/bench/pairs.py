"""Made-up models: runs with random weights that need no files, and model directories."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from kava_jax.config_file import parse_config
from kava_jax.data.batches import Batch
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.hf.export import export_model
from kava_jax.hf.geometry import spec_from_config
from kava_jax.hf.names import parameter_shapes
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from kava_jax.training.blueprint import Blueprint, Found, Models, make_blueprint

Sizes = tuple[int, int, int, int, int]
"""Layers, width, query heads, KV heads, feed-forward width."""

# The bench pair: Qwen2's shape and vocabulary at a size that a CPU can take.
TEACHER: Sizes = (8, 512, 8, 4, 1408)
STUDENT: Sizes = (4, 256, 8, 2, 704)
VOCABULARY = 151_936


def geometry(sizes: Sizes, vocabulary: int) -> dict[str, Any]:
    """A ``config.json`` of Qwen2's shape, embeddings tied."""
    layers, width, heads, kv_heads, inner = sizes
    return {
        "model_type": "qwen2",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def write_model(
    directory: Path, config: Mapping[str, Any], rng: np.random.Generator, std: float = 0.02
) -> DecoderSpec:
    """A Hugging Face directory of this ``config.json`` with random float32 weights.

    Norms' scales are drawn around 1, all else around 0.
    """
    spec = spec_from_config(dict(config), where="bench")
    flat = {
        path: np.float32(std) * rng.standard_normal(shape, np.float32)
        + np.float32(path.endswith("scale"))
        for path, shape in parameter_shapes(spec).items()
    }
    params, tokenizer = unflatten_dict(flat, sep="/"), builtin_tokenizer()
    export_model(directory, params, spec, dtype="float32", tokenizer=tokenizer, card="random")
    return spec


def one_device() -> Mesh:
    """The first device alone, as a mesh."""
    return make_mesh(1, 1, 1, jax.devices()[:1])


def random_run(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    *,
    rows: int,
    overrides: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Blueprint:
    """A run over random models of these geometries, on all devices or a mesh; weights are drawn."""
    nowhere = Path("random weights")
    raw: dict[str, Any] = {
        "run": {"name": "bench"},
        "teachers": [{"name": "teacher", "path": str(nowhere), "control": "random"}],
        "student": {"geometry": dict(student)},
        "data": {"path": "builtin:word_problems", "batch_size": rows},
        "loss": {"kv_weight": 1.0},
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
    }
    written = [f"{field}={value}" for field, value in (overrides or {}).items()]
    config = parse_config(raw, written)
    models = Models(
        Found(None, spec_from_config(dict(student), where="bench")),
        {"teacher": Found(nowhere, spec_from_config(dict(teacher), where="bench"))},
    )
    return make_blueprint(config, mesh or make_mesh(1, -1, 1), models, {})


def random_batch(rows: int, length: int, vocabulary: int, prompt: int) -> Batch:
    """Random tokens without padding, of which the first ``prompt`` are not predicted."""
    shape = (rows, length)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    answers = np.broadcast_to(np.arange(length) >= max(1, prompt), shape).copy()
    everywhere = np.ones(shape, bool)
    return Batch(tokens, everywhere, answers, everywhere)  # pyright: ignore[reportArgumentType]  (host arrays)


class Stepping:
    """A run's train steps on one batch, one for each call."""

    def __init__(self, run: Blueprint, batch: Batch):
        """Draw weights and put the batch on the devices; the first call compiles."""
        self._state, self._teachers = run.fresh_state(), run.load_teachers()
        self._step, self._batch = run.jitted_step(), put_batch(batch, run.mesh)

    def __call__(self) -> None:
        """Take one step and wait for it."""
        self._state, _ = self._step(self._state, self._teachers, self._batch)
        jax.block_until_ready(self._state)
