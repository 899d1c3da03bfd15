"""Checkpoints: bit for bit, on another mesh too, the last few and the best."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.errors import KavaError
from kava_jax.geometry import Mean
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import matching_shardings
from kava_jax.training.checkpoint import Checkpoints, abstract_state
from kava_jax.training.objective import Statistics
from kava_jax.training.optimizer import make_optimizer
from kava_jax.training.step import LossScale, TrainState, initial_state
from tests.training.small import one_device, setting

RATE = optax.constant_schedule(1e-3)
OPTIMIZER = make_optimizer(
    dict.fromkeys(("student", "projector", "router"), RATE),
    weight_decay=0.1,
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
)


def full_state(mesh):
    """A state with noise in every moment, and where it lies."""
    made = setting(mesh, names=("big", "other"), center="running", router="similarity")
    abstract = jax.eval_shape(lambda: initial_state(made.params, OPTIMIZER, made.statistics))
    places = matching_shardings(abstract, made.shardings, mesh)
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.normal(size=leaf.shape) * 10
        return np.asarray(values, leaf.dtype)

    state = jax.tree.map(draw, abstract)._replace(step=np.asarray(7, np.int32))
    return jax.device_put(state, places), places


def small_state(step: int) -> TrainState:
    params = {"x": jnp.full((3,), float(step))}
    none = Statistics({}, None)
    scale = LossScale(jnp.ones(()), Mean(jnp.zeros(()), jnp.zeros(())))
    return TrainState(jnp.asarray(step, jnp.int32), jnp.uint32(0), params, {}, {}, none, scale)


def assert_bitwise(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_state_comes_back_bit_for_bit_on_this_mesh_and_on_another(tmp_path: Path) -> None:
    state, places = full_state(make_mesh(1, 8, 1))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, None)
    other, moved = full_state(make_mesh(2, 2, 2))
    single, alone = full_state(one_device())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [7]
        for target, where in ((state, places), (other, moved), (single, alone)):
            restored = checkpoints.restore(7, abstract_state(target, where))
            assert_bitwise(restored, state)
            for leaf, sharding in zip(
                jax.tree.leaves(restored), jax.tree.leaves(where), strict=True
            ):
                assert leaf.sharding == sharding


def save_all(directory: Path, losses: dict[int, float | None], keep: int = 2) -> None:
    with Checkpoints(directory, keep) as checkpoints:
        for step, loss in losses.items():
            metrics = None if loss is None else {"eval_loss": loss, "eval_cos_sim": 0.5}
            checkpoints.save(small_state(step), metrics)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save_all(tmp_path, {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: None})
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.choose("last") == 6
        assert checkpoints.choose("best") == 2
        assert checkpoints.choose("5") == 5
        places = jax.tree.map(lambda x: x.sharding, small_state(0))
        restored = checkpoints.restore(2, abstract_state(small_state(0), places))
        assert_bitwise(restored, small_state(2))
        checkpoints.save(small_state(7), {"eval_loss": 0.5})
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [6, 7]
        assert checkpoints.choose("best") == 7


def test_saving_a_step_twice_does_nothing(tmp_path: Path) -> None:
    save_all(tmp_path, {1: None})
    with Checkpoints(tmp_path, 2) as checkpoints:
        changed = small_state(1)._replace(params={"x": jnp.zeros(3)})
        checkpoints.save(changed, {"eval_loss": 1.0})
        places = jax.tree.map(lambda x: x.sharding, changed)
        restored = checkpoints.restore(1, abstract_state(changed, places))
    assert_bitwise(restored, small_state(1))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path / "run", 2) as checkpoints,
        pytest.raises(KavaError, match=r"run/checkpoints holds none; train"),
    ):
        checkpoints.choose("last")
    save_all(tmp_path / "run", {1: None, 2: None})
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        with pytest.raises(KavaError, match=r"none in run/checkpoints was evaluated; use last"):
            checkpoints.choose("best")
        for which in ("3", "-1", "newest"):
            with pytest.raises(KavaError, match=f"'{which}' does not exist; .*one of 1, 2"):
                checkpoints.choose(which)


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    save_all(tmp_path, {1: 2.0, 2: float("nan"), 3: 3.0, 4: float("nan"), 5: None})
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [1, 4, 5]
        assert checkpoints.choose("best") == 1
