"""Made-up models: pairs with random weights that need no files, and model directories."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kava_jax.config.file import parse_config
from kava_jax.data.batches import Batch
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.hf.config_json import spec_from_config
from kava_jax.models.decoder import Params
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from kava_jax.plan.compiled import Memory, memory_of
from kava_jax.plan.floor import step_floor
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.find_models import Found, Models
from kava_jax.runs.smoke import write_random

Geometry = dict[str, Any]


def qwen2(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int = 151_936
) -> Geometry:
    """A ``config.json`` of Qwen2's shape, embeddings tied; by default with its vocabulary."""
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


def write_model(directory: Path, config: Geometry, seed: int) -> None:
    """A Hugging Face directory with random float32 weights."""
    spec = spec_from_config(config, where="bench")
    write_random(directory, spec, builtin_tokenizer(), "random", seed)


def batch_of(run: Blueprint, prompt: int) -> tuple[Batch, dict[str, Any]]:
    """Random rows without padding, and the tokens and floor FLOPs of a step on them.

    The first ``prompt`` tokens of a row are not predicted.
    """
    shape = rows, length = run.config.data.batch_size, run.config.data.max_length
    specs = [run.student_spec, *(teacher.spec for teacher in run.teachers.values())]
    # Models of one family can differ in vocabulary rows; every model needs every id.
    vocabulary = min(spec.vocab_size for spec in specs)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    answers = np.broadcast_to(np.arange(length) >= prompt, shape).copy()
    everywhere = np.ones(shape, bool)
    batch = Batch(tokens, everywhere, answers, everywhere)  # pyright: ignore[reportArgumentType]  (host arrays)
    flops = sum(step_floor(run, rows, length, rows * (length - prompt)).values())
    return batch, {"tokens": rows * length, "flops": flops}


class Pair(NamedTuple):
    """Two models by their ``config.json``, and what they read; the defaults suit a CPU."""

    teacher: Geometry = qwen2(8, 512, 8, 4, 1408)
    student: Geometry = qwen2(4, 256, 8, 2, 704)
    rows: int = 4
    length: int = 256

    def run(
        self,
        overrides: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        device: Any = None,
    ) -> Blueprint:
        """A run of the pair on the first device, or another.

        All weights are drawn, or the models are ``teacher`` and ``student`` in ``folder``.
        """
        where = folder or Path("random weights")
        control = "none" if folder else "random"
        raw: dict[str, Any] = {
            "run": {"name": "bench"},
            "teachers": [{"name": "teacher", "path": str(where / "teacher"), "control": control}],
            "student": {"path": str(folder / "student")} if folder else {"geometry": self.student},
            "data": {"path": "builtin:word_problems"},
            "loss": {"kv_weight": 1.0},
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        }
        raw["data"] |= {"batch_size": self.rows, "max_length": self.length}
        config = parse_config(raw, [f"{key}={value}" for key, value in (overrides or {}).items()])
        found = [spec_from_config(m, where="bench") for m in (self.student, self.teacher)]
        student = Found(folder and folder / "student", found[0])
        models = Models(student, {"teacher": Found(where / "teacher", found[1])})
        return make_blueprint(config, make_mesh(1, 1, 1, [device or jax.devices()[0]]), models, {})


def stepping(
    run: Blueprint, batch: Batch, projector: Params | None = None
) -> tuple[Callable[[], float], Memory]:
    """A run's train step on one batch, compiled, and the memory that it needs.

    A call takes a step, waits for it and returns its loss. Weights are drawn or loaded by the first
    call.
    """
    placed = put_batch(batch, run.mesh)
    shapes = run.abstract_state(), run.abstract_teachers(), placed
    # From shapes, before any weight is made: a step without room still tells its memory.
    program = run.jitted_step().lower(*shapes).compile()
    held: list[Any] = []

    def step() -> float:
        if not held:
            held.extend((run.load_teachers(), run.fresh_state(projector)))
        # The state's memory becomes that of the next one, so nothing else may hold it.
        state, metrics = program(held.pop(), *held, placed)
        held.append(jax.block_until_ready(state))
        return float(metrics["loss"].value)

    return step, memory_of(program)
