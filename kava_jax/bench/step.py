"""``kava bench step``: the whole train step, beside the original's PyTorch loop.

Both sides load the same weights from the same Hugging Face directories and take their steps in
processes of their own, in turns, on the same batch. The losses of the first step have to agree.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from kava_jax.bench import timing
from kava_jax.bench.pairs import (
    STUDENT,
    TEACHER,
    VOCABULARY,
    Sizes,
    geometry,
    one_device,
    write_model,
)
from kava_jax.bench.turns import Facts, Taken, take_turns
from kava_jax.config_file import parse_config
from kava_jax.errors import KavaError
from kava_jax.plan.floor import step_floor
from kava_jax.training.blueprint import find_models, make_blueprint

AGREE = 1e-4
PEERS = {"torch": ("torch", "torch_compile"), "torch-eager": ("torch",)}


class Pair(NamedTuple):
    """Sizes of what is measured; the defaults are the bench pair's."""

    teacher: Sizes = TEACHER
    student: Sizes = STUDENT
    vocabulary: int = VOCABULARY
    rows: int = 4
    length: int = 256
    prompt: int = 128
    """Tokens of every row that are not predicted."""


def bench_step(pair: Pair, peer: str | None) -> dict[str, Any]:
    """Seconds, tokens per second and memory of the step; with ``peer`` also those of PyTorch.

    ``floor`` is ``plan.floor.step_floor`` with the predicted tokens alone. Memory is what a process
    holds at most during its steps, beyond the libraries and the models' weights: gradients,
    moments, activations. Raises KavaError for an unknown peer, and when the first losses differ by
    more than 1e-4.
    """
    if peer is not None and peer not in PEERS:
        raise KavaError(f"--peer={peer!r} is unknown; use {' or '.join(PEERS)}, or leave it out")
    sides = ("ours", *(PEERS[peer] if peer else ()))
    with tempfile.TemporaryDirectory() as folder:
        floor = write_job(Path(folder), pair)
        measured = _measured(Path(folder), sides)
    tokens = pair.rows * pair.length
    medians = {side: own["seconds"]["median"] for side, own in measured.items() if "seconds" in own}
    return {
        "name": "step",
        "pair": pair._asdict(),
        "floor_flops": floor,
        "sides": measured,
        "tokens_per_second": {side: tokens / seconds for side, seconds in medians.items()},
        "times_faster_than": {
            side: seconds / medians["ours"] for side, seconds in medians.items() if side != "ours"
        },
        "memory_over": {
            side: measured["ours"]["above_models"] / own["above_models"]
            for side, own in measured.items()
            if side != "ours" and "above_models" in own
        },
        **timing.circumstances(),
    }


def write_job(folder: Path, pair: Pair) -> float:
    """Models, projector, batch and config into ``folder``; the floor in FLOPs."""
    rng = np.random.default_rng(0)
    for name, sizes in (("teacher", pair.teacher), ("student", pair.student)):
        write_model(folder / name, geometry(sizes, pair.vocabulary), rng)
    raw = _config(folder, pair)
    config = parse_config(dict(raw))
    blueprint = make_blueprint(config, one_device(), find_models(config, 1), {})
    projector, link = blueprint.projector, blueprint.teachers["teacher"]
    assert projector is not None
    nnx.merge(projector.graph, projector.fresh(1)).save(folder / "projector.safetensors")
    shape = (pair.rows, pair.length)
    answers = np.broadcast_to(np.arange(pair.length) >= pair.prompt, shape)
    everywhere = np.ones(shape, bool)
    tokens = rng.integers(0, pair.vocabulary, shape, dtype=np.int32)
    masks = {"valid": everywhere, "loss_mask": answers, "kv_mask": everywhere}
    np.savez(folder / "batch.npz", tokens=tokens, **masks)
    job = {
        "config": raw,
        "layers": [row[0] for row in link.layer_map.teacher_layers],
        "rates": [config.optimizer.student_lr, config.optimizer.projector_lr],
        "kv_weight": 1.0,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    targets = pair.rows * (pair.length - pair.prompt)
    return step_floor(blueprint, pair.rows, pair.length, targets).total


def _config(folder: Path, pair: Pair) -> dict[str, Any]:
    """The original's recipe in the original's frame: whole post-RoPE vectors, no dropout."""
    return {
        "recipe": "original",
        "run": {"name": "bench", "dir": str(folder / "run")},
        "teachers": [{"name": "teacher", "path": str(folder / "teacher"), "dtype": "float32"}],
        "student": {"path": str(folder / "student"), "dtype": "float32"},
        "projector": {"dropout": 0.0},
        "loss": {"kv_weight": 1.0, "key_space": "post_rope", "per_head": False, "sink_tokens": 0},
        "data": {"path": "builtin:word_problems", "batch_size": pair.rows},
        "optimizer": {"schedule": "constant", "warmup_steps": 0},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }


def _measured(folder: Path, sides: tuple[str, ...]) -> dict[str, Any]:
    """What each side took; a compiled peer that cannot be compiled here is left out, with words."""
    taken = take_turns(
        "kava_jax.bench.step_sides", sides, folder, _check_same, optional=("torch_compile",)
    )
    return {
        name: {
            "first_loss": own.first["loss"],
            "seconds": timing.summary(own.seconds),
            **own.last,
        }
        if isinstance(own, Taken)
        else {"failed": own}
        for name, own in taken.items()
    }


def _check_same(first: Mapping[str, Facts]) -> None:
    ours = first["ours"]["loss"]
    for name, facts in first.items():
        if abs(facts["loss"] / ours - 1) > AGREE:
            raise KavaError(
                f"--peer: the first loss of {name} is {facts['loss']:.6f}, ours {ours:.6f}; they "
                f"do not do the same work, so their times mean nothing"
            )
