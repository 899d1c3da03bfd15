"""Where arrays live, and that it changes nothing: one train step on four meshes."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kava_jax.errors import KavaError
from kava_jax.models.decoder import Decoder
from kava_jax.parallel.mesh import AXES, make_mesh
from kava_jax.parallel.sharding import (
    batch_sharding,
    matching_shardings,
    param_shardings,
    put_batch,
    replicated,
)
from kava_jax.training.optimizer import make_optimizer
from kava_jax.training.step import initial_state, make_train_step
from tests.tolerances import TOL
from tests.training.small import STUDENT, batch, one_device, setting


def abstract_student() -> nnx.State:
    return nnx.split(nnx.eval_shape(lambda: Decoder(STUDENT, rngs=nnx.Rngs(0))))[1]


def test_the_table_places_every_parameter() -> None:
    mesh = make_mesh(2, 2, 2)
    found, misfits = param_shardings(abstract_student(), mesh)
    assert not misfits
    attention, mlp = found["blocks"]["attention"], found["blocks"]["mlp"]
    for sharding, spec in (
        (found["embed"]["embedding"], ("tensor", "fsdp")),
        (found["final_norm"]["scale"], ("fsdp",)),
        (attention["q"]["kernel"], (None, "fsdp", "tensor", None)),
        (attention["q"]["bias"], (None, "tensor", None)),
        (attention["k"]["kernel"], (None, "fsdp", "tensor", None)),
        (attention["o"]["kernel"], (None, "tensor", None, "fsdp")),
        (mlp["gate"]["kernel"], (None, "fsdp", "tensor")),
        (mlp["down"]["kernel"], (None, "tensor", "fsdp")),
        (found["blocks"]["mlp_norm"]["scale"], (None, "fsdp")),
    ):
        assert sharding == NamedSharding(mesh, PartitionSpec(*spec))


def test_every_parameter_that_does_not_divide_is_listed() -> None:
    with pytest.raises(KavaError, match="mesh does not divide") as caught:
        param_shardings(abstract_student(), make_mesh(1, 1, 8))
    message = str(caught.value)
    for name, axis in (
        ("q/kernel", "heads=4"),
        ("q/bias", "heads=4"),
        ("k/kernel", "kv_heads=2"),
        ("v/bias", "kv_heads=2"),
        ("o/kernel", "heads=4"),
    ):
        assert f"blocks/attention/{name} ({axis} over mesh.tensor=8)" in message
    assert "mlp" not in message
    assert "\n" not in message
    # 4 query heads and 2 KV heads: 2 is the most that divides both.
    assert "use mesh.data=4, mesh.fsdp=1, mesh.tensor=2, or mesh.indivisible=replicate" in message


def test_what_does_not_divide_can_be_repeated() -> None:
    mesh = make_mesh(1, 2, 4)
    found, misfits = param_shardings(abstract_student(), mesh, "replicate")
    assert {m.partition(" ")[2] for m in misfits} == {"(kv_heads=2 over mesh.tensor=4)"}
    attention = found["blocks"]["attention"]
    keys, queries = attention["k"]["kernel"], attention["q"]["kernel"]
    assert keys == NamedSharding(mesh, PartitionSpec(None, "fsdp", None, None))
    assert queries == NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor", None))


def test_moments_lie_where_their_parameters_lie() -> None:
    mesh = make_mesh(2, 2, 2)
    made = setting(mesh)
    rate = optax.constant_schedule(1e-3)
    optimizer = make_optimizer(
        dict.fromkeys(("student", "projector"), rate),
        weight_decay=0.1,
        clip_norm=1.0,
        b2=0.95,
    )
    state = jax.eval_shape(lambda: initial_state(made.params, optimizer, made.statistics))
    placed = matching_shardings(state, made.shardings, mesh)
    assert placed.params == made.shardings
    flat = jax.tree_util.tree_leaves_with_path(placed.opt_state)
    assert len(flat) > 2 * len(jax.tree.leaves(made.params))
    wanted = {
        jax.tree_util.keystr(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(made.shardings)
    }
    moments = 0
    for path, sharding in flat:
        where = jax.tree_util.keystr(path)
        own = [param for param in wanted if where.endswith(param)]
        moments += len(own)
        assert sharding == (wanted[own[0]] if own else replicated(mesh))
    assert moments == 2 * len(wanted)
    assert placed.step == replicated(mesh)


def test_a_batch_is_split_by_rows() -> None:
    mesh = make_mesh(2, 2, 2)
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = put_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def one_step(mesh: Mesh, **options):
    """Loss and the state after one plain step, laid out and donated as a run does it."""
    made = setting(mesh, direction="teacher_to_student", **options)
    optimizer = optax.sgd(0.1, momentum=0.9)
    abstract = jax.eval_shape(lambda: initial_state(made.params, optimizer, made.statistics))
    places = matching_shardings(abstract, made.shardings, mesh)
    state = jax.jit(lambda p: initial_state(p, optimizer, made.statistics), out_shardings=places)(
        made.params
    )
    step = jax.jit(
        make_train_step(made.objective, optimizer, kv_weight=made.kv_weight, microbatches=1),
        in_shardings=(places, made.teacher_shardings, batch_sharding(mesh)),
        out_shardings=(places, replicated(mesh)),
        donate_argnums=0,
    )
    rows = jax.tree.map(np.asarray, batch())
    state, metrics = step(state, made.teachers, put_batch(rows, mesh))
    return state, jax.device_get(metrics)


def test_one_step_is_the_same_on_every_mesh() -> None:
    want, line = one_step(one_device())
    shards = {
        (8, 1, 1): ((48, 32), (3, 32, 4, 8), (16, 16)),
        (1, 8, 1): ((48, 4), (3, 4, 4, 8), (2, 16)),
        (2, 2, 2): ((24, 16), (3, 16, 2, 8), (8, 8)),
    }
    for shape, (embedding, query, inner) in shards.items():
        state, found = one_step(make_mesh(*shape))
        for name in ("loss", "ce", "big/kv_k", "big/kv_v"):
            value = float(line[name].value)
            assert float(found[name].value) == pytest.approx(value, rel=TOL["across_meshes"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=TOL["after_one_step"]),
            jax.device_get(state.params),
            jax.device_get(want.params),
        )
        for tree in (state.params, state.opt_state[0].trace):
            for leaf, size in (
                (tree["student"]["embed"]["embedding"], embedding),
                (tree["student"]["blocks"]["attention"]["q"]["kernel"], query),
                (tree["projector"]["pairs"]["big"]["k"]["inner"]["kernel"], inner),
            ):
                assert {shard.data.shape for shard in leaf.addressable_shards} == {size}


def test_a_step_on_outputs_is_the_same_on_a_mesh() -> None:
    want, line = one_step(one_device(), match="block_outputs")
    state, found = one_step(make_mesh(2, 2, 2), match="block_outputs")
    for name in ("loss", "ce", "big/kv_o"):
        value = float(line[name].value)
        assert float(found[name].value) == pytest.approx(value, rel=TOL["across_meshes"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=TOL["after_one_step"]),
        jax.device_get(state.params),
        jax.device_get(want.params),
    )


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_rows_keep_their_place_on_every_device_order(shape: tuple[int, int, int]) -> None:
    rows, shards = np.arange(16 * 3).reshape(16, 3), shape[0] * shape[1]
    devices = np.array(jax.devices())[np.random.default_rng(0).permutation(8)].reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
    placed = put_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    held = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    for shard, parts in enumerate(devices.reshape(shards, -1)):
        for device in parts:  # along the tensor axis all hold the same rows
            np.testing.assert_array_equal(held[device], np.split(rows, shards)[shard])
