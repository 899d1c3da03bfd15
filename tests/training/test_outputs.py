"""Outputs of layers as what is compared, against numpy on hidden states of shortened models."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.models.decoder import Decoder
from kava_jax.models.spec import DecoderSpec
from kava_jax.training.probe import examine, figures
from kava_jax.training.step import initial_state, make_train_step
from tests.tolerances import TOL
from tests.training.by_recipe import made
from tests.training.small import SINKS, STUDENT, TEACHER, Setting, batch, setting, total_loss

BATCH = batch()
OUTPUTS = ("attention_outputs", "block_outputs")
DIRECTIONS = ("teacher_to_student", "student_to_teacher")
# The student's last layer is not mapped, nor are the teacher's first and last.
MAP = LayerMap((0, 1), ((2,), (1,)))
STEP = jnp.zeros((), jnp.int32)


def hidden_after(spec: DecoderSpec, params: Any, layers: int) -> np.ndarray:
    """The residual stream after the first ``layers`` layers: what a model of only those gives."""
    short = {
        "embed": params["embed"],
        "blocks": jax.tree.map(lambda x: x[:layers], params["blocks"]),
    }
    length = BATCH.tokens.shape[1]
    positions = jnp.minimum(jnp.arange(length)[None], BATCH.valid.sum(axis=1)[:, None] - 1)
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & BATCH.valid[:, None, :]
    graph = nnx.split(
        nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0), blocks=layers, head=False))
    )[0]
    run = jax.jit(lambda params: nnx.merge(graph, params)(BATCH.tokens, positions, mask[:, None]))
    return np.asarray(run(short)[0], np.float64)


def output_of(spec: DecoderSpec, params: Any, layer: int, match: str) -> np.ndarray:
    """[B, T, D]; without an MLP a layer adds its attention alone."""
    if match == "block_outputs":
        return hidden_after(spec, params, layer + 1)
    if layer == 0:
        before = np.asarray(params["embed"]["embedding"], np.float64)[np.asarray(BATCH.tokens)]
    else:
        before = hidden_after(spec, params, layer)
    # The layers before it keep their MLPs.
    blocks = params["blocks"]
    down = jax.tree.map(lambda x: x.at[layer].set(0.0), blocks["mlp"]["down"])
    quiet = params | {"blocks": blocks | {"mlp": blocks["mlp"] | {"down": down}}}
    return hidden_after(spec, quiet, layer + 1) - before


@cache
def measured(match: str, direction: str = DIRECTIONS[1], **options: Any):
    """A setting of KV alone through a linear projector; loss, metrics and gradients."""
    options = {"kv_weight": 1.0, "ce_weight": 0.0, "kind": "linear", "layer_map": MAP} | options
    built = setting(match=match, direction=direction, **options)
    run = jax.jit(jax.value_and_grad(total_loss(built), has_aux=True))
    (loss, metrics), gradients = run(built.params, built.teachers, BATCH, STEP, (1.0, 1.0))
    return built, float(loss), metrics, gradients


@cache
def sides(match: str, direction: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per mapped layer, student and target [B, T, D] in one space, in float64."""
    built = measured(match, direction)[0]
    out = built.params["projector"]["pairs"]["big"]["o"]["out"]
    kernel, bias = (np.asarray(out[name], np.float64) for name in ("kernel", "bias"))
    found = []
    for student, (teacher,) in zip(MAP.student_layers, MAP.teacher_layers, strict=True):
        ours = output_of(STUDENT, built.params["student"], student, match)
        theirs = output_of(TEACHER, built.teachers["big"], teacher, match)
        if direction == "teacher_to_student":
            found.append((ours, theirs @ kernel + bias))
        else:
            found.append((ours @ kernel + bias, theirs))
    return found


def counted() -> np.ndarray:
    return np.asarray(BATCH.valid) & (np.arange(BATCH.tokens.shape[1]) >= SINKS)[None]


def cosines(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    return (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)


def mercator(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    lengths = np.log(np.linalg.norm(s, axis=-1)) - np.log(np.linalg.norm(t, axis=-1))
    return 1 - cosines(s, t) + 0.01 * lengths**2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("match", OUTPUTS)
def test_loss_and_cosine_are_those_of_the_outputs_in_float64(match, direction) -> None:
    _, loss, metrics, _ = measured(match, direction)
    found = sides(match, direction)
    wanted = np.mean([mercator(s, t)[counted()].mean() for s, t in found])
    assert loss == pytest.approx(wanted, rel=TOL["float32"])
    assert float(metrics["big/kv_o"].value) == pytest.approx(wanted, rel=TOL["float32"])
    cosine = np.mean([cosines(s, t)[counted()].mean() for s, t in found])
    assert float(metrics["big/cos_o"].value) == pytest.approx(cosine, abs=TOL["float32"])
    assert int(metrics["big/cos_o"].count) == len(MAP) * counted().sum()
    assert not any(name.endswith(("_k", "_v")) for name in metrics)


@pytest.mark.parametrize("match", OUTPUTS)
def test_frame_and_other_losses_are_those_of_keys_and_values(match) -> None:
    _, loss, _, _ = measured(match, kv="mse", center="batch")
    wanted = []
    for pair in sides(match, DIRECTIONS[1]):
        s, t = (x[counted()] - x[counted()].mean(axis=0) for x in pair)
        wanted.append(((s - t) ** 2).mean())
    assert loss == pytest.approx(np.mean(wanted), rel=TOL["float32"])


def test_a_shuffled_target_is_the_row_before() -> None:
    _, loss, metrics, _ = measured("block_outputs", control="shuffled")
    mask = counted() & np.roll(counted(), 1, axis=0)
    found = sides("block_outputs", DIRECTIONS[1])
    wanted = np.mean([mercator(s, np.roll(t, 1, axis=0))[mask].mean() for s, t in found])
    assert loss == pytest.approx(wanted, rel=TOL["float32"])
    true = measured("block_outputs")[2]
    assert metrics["big/cos_o"] == true["big/cos_o"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("match", OUTPUTS)
def test_where_the_gradient_goes(match, direction) -> None:
    built, _, _, gradients = measured(match, direction)
    assert jax.tree.structure(gradients) == jax.tree.structure(built.params)  # not the teachers
    blocks = gradients["student"]["blocks"]

    def largest(kernel: Any) -> list[float]:
        return [float(np.abs(layer).max()) for layer in kernel]

    for kernel in (blocks["attention"][name]["kernel"] for name in "qkvo"):
        first, second, unmapped = largest(kernel)
        assert first > 0
        assert second > 0
        assert unmapped == 0
    # What a layer's attention gives does not depend on the same layer's MLP.
    first, second, unmapped = largest(blocks["mlp"]["down"]["kernel"])
    assert first > 0
    assert (second > 0) == (match == "block_outputs")
    assert unmapped == 0
    assert min(largest(gradients["projector"]["pairs"]["big"]["o"]["out"]["kernel"])) > 0


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    built, _, _, gradients = measured("attention_outputs")
    run = jax.jit(lambda params: total_loss(built)(params, built.teachers, BATCH, STEP, (1.0, 1.0)))
    where = built.params["student"]["blocks"]["attention"]["o"]["kernel"]
    slope = gradients["student"]["blocks"]["attention"]["o"]["kernel"]
    way = np.random.default_rng(0).normal(size=where.shape).astype(np.float32)
    losses = []
    for step in (-1e-3, 1e-3):
        student = jax.tree.map(lambda x: x, built.params["student"])
        student["blocks"]["attention"]["o"]["kernel"] = where + step * way
        losses.append(float(run(built.params | {"student": student})[0]))
    # Central differences: their own error is of the second order in the step.
    found = (losses[1] - losses[0]) / 2e-3
    assert found == pytest.approx(float((slope * way).sum()), rel=1e-2)


def test_microbatches_add_up_to_the_whole_batch() -> None:
    built = setting(match="block_outputs", center="running", names=("a", "b"))
    plain = optax.sgd(0.1)
    steps = [
        jax.jit(
            make_train_step(built.objective, plain, kv_weight=built.kv_weight, microbatches=parts)
        )
        for parts in (1, 4)
    ]
    # Before there are running means, each microbatch goes by its own.
    start = steps[0](initial_state(built.params, plain, built.statistics), built.teachers, BATCH)[0]
    start = jax.device_get(start)
    ends = [step(start, built.teachers, BATCH)[0] for step in steps]
    for name in ("params", "statistics"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=TOL["after_one_step"]),
            *(getattr(end, name) for end in ends),
        )
    kept = ends[0].statistics["a"]["o"]
    assert {mean.mean.shape for mean in kept} == {(2, 1, TEACHER.hidden_size)}


def test_diagnostics_are_those_of_outputs() -> None:
    built: Setting = measured("block_outputs")[0]
    look = jax.jit(
        lambda params, teachers: figures(
            [examine(built.objective, params, teachers, BATCH, tokens=64)]
        )
    )
    found = look(built.params, built.teachers)
    assert all(name.endswith("_o") for name in found)  # no attention to read a cache with
    for layer, (s, t) in enumerate(sides("block_outputs", DIRECTIONS[1])):
        wanted = cosines(s, t)[counted()].mean()
        assert float(found["big/cos_sim_o"][layer]) == pytest.approx(wanted, abs=TOL["float32"])
        s, t = (x[counted()] - x[counted()].mean(axis=0) for x in (s, t))
        centred = cosines(s, t).mean()
        assert float(found["big/cos_centered_o"][layer]) == pytest.approx(
            centred, abs=TOL["float32"]
        )


@pytest.mark.parametrize("match", OUTPUTS)
def test_a_teacher_has_its_layers_up_to_the_last_mapped_one(match) -> None:
    pairs = {"teachers.0.layer_map": ((0, 0), (2, 1)), "loss.match": match}
    for kl_weight, blocks in ((0.0, 3), (0.5, 4)):
        blueprint, _, teachers = made("anchored", **pairs, **{"loss.kl_weight": kl_weight})
        part, params = blueprint.teachers["big"], teachers["big"]
        assert (part.blocks, part.tail) == (blocks, False)
        assert len(params["blocks"]["mlp"]["down"]["kernel"]) == blocks
        assert ("final_norm" in params) == bool(kl_weight)
        assert "tail" not in params
    projector = blueprint.projector.abstract["pairs"]["big"]
    assert set(projector) == {"o"}
    widths = projector["o"]["inner"]["kernel"].get_value().shape
    assert widths == (STUDENT.hidden_size, STUDENT.hidden_size)


def test_layers_side_by_side_widen_the_target() -> None:
    layer_map = LayerMap((0, 2), ((0, 1), (1, 2)))
    built, loss, _, _ = measured("block_outputs", DIRECTIONS[0], layer_map=layer_map)
    kernel = built.params["projector"]["pairs"]["big"]["o"]["out"]["kernel"]
    assert kernel.shape == (2 * TEACHER.hidden_size, STUDENT.hidden_size)
    assert math.isfinite(loss)


def test_a_projector_of_another_part_survives_its_file(tmp_path) -> None:
    side = {"big": {"d_model": 6}}
    projector = KVDimensionProjector(side, 4, dropout=0.5, parts=("o",), rngs=nnx.Rngs(3))
    projector.save(tmp_path / "projector.safetensors")
    loaded = KVDimensionProjector.load(tmp_path / "projector.safetensors")
    x = {"o": jnp.ones((2, 3, 5, 1, 6))}
    found, again = (one.project("big", x) for one in (projector, loaded))
    assert found["o"].shape == (2, 3, 5, 1, 4)
    np.testing.assert_array_equal(found["o"], again["o"])
