"""Fifty steps of a whole run on five meshes: the same losses, from the same first gradients.

In float32 and at a constant rate, for the demo's pair and for grouped queries whose KV heads the
tensor axis does not divide.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from kava_jax.config.file import parse_config, read_yaml, shipped_config
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from kava_jax.runs.blueprint import make_blueprint
from kava_jax.runs.find_models import find_models
from kava_jax.runs.prepare import load_dataset, prepare
from tests.tolerances import TOL

STEPS = 50
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2))
CONSTANT = [
    "optimizer.min_lr_ratio=1",
    "optimizer.warmup_steps=0",
    "optimizer.student_lr=3.0e-4",
    "optimizer.projector_lr=3.0e-4",
    "train.dtype=float32",
    "mesh.indivisible=replicate",
    "data.rows=256",
    "data.eval_rows=8",
    "data.batch_size=8",
]
PAIRS = {
    # One KV head and two query heads in the student, two and four in the teacher.
    "demo": [],
    # Two KV heads under four query heads in the student: neither 4 nor the teacher's 2 over 4.
    "gqa": [
        "student.geometry.num_attention_heads=4",
        "student.geometry.num_key_value_heads=2",
        "projector.direction=teacher_to_student",
    ],
}


class Trajectory(NamedTuple):
    """What a run did on one mesh."""

    gradients: Any
    losses: list[float]


@cache
def prepared(pair: str):
    raw = read_yaml(shipped_config("demo.yaml"))
    config = parse_config(raw, [*CONSTANT, *PAIRS[pair]])
    run = prepare(config)
    stream = load_dataset(run).stream
    models = find_models(config, len(run.tokenizer))
    return config, models, [stream.batch(number) for number in range(STEPS)]


@cache
def trajectory(pair: str, shape: tuple[int, int, int]) -> Trajectory:
    config, models, batches = prepared(pair)
    mesh = make_mesh(*shape, jax.devices()[: math.prod(shape)])
    blueprint = make_blueprint(config, mesh, models, {})
    teachers, state = blueprint.load_teachers(), blueprint.fresh_state()
    step, losses, gradients = blueprint.jitted_step(), [], None
    for batch in batches:
        state, metrics = step(state, teachers, put_batch(batch, mesh))
        losses.append(float(metrics["loss"].value))
        if gradients is None:
            # After one step Adam's first moment is the (clipped) gradient times 1 - b1.
            moments = optax.tree.get_all_with_path(state.opt_state, "mu")
            gradients = jax.device_get([moment for _, moment in moments])
    return Trajectory(gradients, losses)


@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", MESHES[1:])
def test_fifty_steps_are_the_same_on_every_mesh(pair: str, shape: tuple[int, int, int]) -> None:
    want, found = trajectory(pair, MESHES[0]), trajectory(pair, shape)
    for ours, theirs in zip(
        jax.tree.leaves(found.gradients), jax.tree.leaves(want.gradients), strict=True
    ):
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(
            ours, theirs, atol=TOL["gradients_across_meshes"] * largest, rtol=0
        )
    assert len(want.losses) == STEPS
    assert want.losses[-1] < want.losses[0]
    np.testing.assert_allclose(found.losses, want.losses, rtol=TOL["across_meshes"])
