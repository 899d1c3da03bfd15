"""Several teachers: two that are one, and what steps keep."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.training.step import TrainState, initial_state, make_train_step
from tests.tolerances import TOL
from tests.training.small import Setting, batch, setting

BATCH = batch()
CLOSE = TOL["float32"]
NAMES = ("a", "b")
STUDENT, TARGET = 0, 1
WHOLE = (1.0, 1.0)


def program(made: Setting) -> Callable:
    """``(params, teachers) -> ((loss, metrics), gradients)``, KV at the setting's weight."""
    step = jnp.zeros((), jnp.int32)

    def loss(params: Any, teachers: Any) -> Any:
        (language, kv), (metrics, _) = made.objective(
            params, teachers, BATCH, step, WHOLE, made.statistics
        )
        return language + made.kv_weight(step) * kv, metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@cache
def alone(direction: str):
    """One teacher of weight 1, and what it teaches."""
    made = setting(names=("a",), weights=(1.0,), direction=direction)
    return made, program(made)(made.params, made.teachers)


def twice(weights: tuple[float, float], direction: str):
    """The same teacher under two names, each with the same projector."""
    single, _ = alone(direction)
    made = setting(names=NAMES, weights=weights, direction=direction)
    pair = single.params["projector"]["pairs"]["a"]
    params = single.params | {"projector": {"pairs": dict.fromkeys(NAMES, pair)}}
    teachers = dict.fromkeys(NAMES, single.teachers["a"])
    return program(made)(params, teachers)


def test_a_teacher_counted_twice_by_halves_is_that_teacher_to_the_bit() -> None:
    # On this side of the projector: beyond it XLA may add one teacher's sum into the other's.
    direction = "teacher_to_student"
    _, ((loss, metrics), gradients) = alone(direction)
    (both, of_both), found = twice((0.5, 0.5), direction)
    assert float(both) == float(loss)
    jax.tree.map(np.testing.assert_array_equal, found["student"], gradients["student"])
    for name in NAMES:
        of_one = gradients["projector"]["pairs"]["a"]
        halves = jax.tree.map(lambda g: 2 * g, found["projector"]["pairs"][name])
        jax.tree.map(np.testing.assert_array_equal, halves, of_one)
    own = {key.removeprefix("a/") for key in metrics if key.startswith("a/")}
    assert {"kv_k", "kv_v", "cos_k", "cos_v", "s_magnitude_k", "t_magnitude_v"} <= own
    assert of_both.keys() == {"ce"} | {f"{name}/{key}" for name in NAMES for key in own}
    for key in own:
        one = metrics[f"a/{key}"]
        for name in NAMES:
            jax.tree.map(np.testing.assert_array_equal, of_both[f"{name}/{key}"], one)


def test_a_teacher_counted_twice_by_other_parts_is_that_teacher() -> None:
    direction = "student_to_teacher"
    _, ((loss, _), gradients) = alone(direction)
    (both, _), found = twice((0.3, 0.7), direction)
    assert float(both) == pytest.approx(float(loss), rel=CLOSE)
    assert_close(found["student"], gradients["student"])
    for name, weight in zip(NAMES, (0.3, 0.7), strict=True):
        whole = jax.tree.map(lambda g, w=weight: g / w, found["projector"]["pairs"][name])
        assert_close(whole, gradients["projector"]["pairs"]["a"])


def assert_close(left: Any, right: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=CLOSE, atol=CLOSE), left, right)


@cache
def two_steps() -> tuple[Setting, list[TrainState], list[dict]]:
    """States before, between and after two steps of two microbatches; each step's metrics."""
    made = setting(names=NAMES, center="running")
    optimizer = optax.sgd(0.1)
    step = jax.jit(
        make_train_step(made.objective, optimizer, kv_weight=made.kv_weight, microbatches=2)
    )
    states, lines = [initial_state(made.params, optimizer, made.statistics)], []
    for _ in range(2):
        state, metrics = step(jax.device_get(states[-1]), made.teachers, BATCH)
        states.append(jax.device_get(state))
        lines.append(jax.device_get(metrics))
    return made, states, lines


@cache
def seen() -> list[dict[str, Any]]:
    """By step, counted vectors by teacher, part and side [P, tokens, K, H]."""
    made, states, _ = two_steps()
    run = jax.jit(lambda params: made.objective.compared(params, made.teachers, BATCH))
    counted = np.asarray(BATCH.kv_mask)
    found = []
    for state in states[:2]:
        compared = run(state.params)
        vectors = {
            (name, part, side): np.asarray(of[0][side][part], np.float64)[:, counted]
            for name, of in compared.items()
            for part in "kv"
            for side in (STUDENT, TARGET)
        }
        found.append(vectors)
    return found


def test_running_means_are_those_of_whole_batches_that_fade() -> None:
    made, states, _ = two_steps()
    for (name, part, side), first in seen()[0].items():
        second = seen()[1][name, part, side]
        assert np.abs(first - second).max() > 100 * CLOSE or side == TARGET
        weights = [np.ones(first.shape[1]), np.ones(second.shape[1])]
        for number in (1, 2):
            vectors = np.concatenate((first, second)[:number], axis=1)
            weight = np.concatenate(weights[:number])
            mean = np.average(vectors, axis=1, weights=weight)
            kept = states[number].statistics[name][part][side]
            assert float(kept.count) == pytest.approx(weight.sum(), rel=CLOSE)
            np.testing.assert_allclose(kept.mean, mean, rtol=CLOSE, atol=CLOSE)
            weights[0] = weights[0] * 0.99
    assert made.statistics.keys() == set(NAMES)


def test_a_step_keeps_the_form_of_the_state() -> None:
    _, (before, between, after), _ = two_steps()
    for state in (between, after):
        assert jax.tree.structure(state) == jax.tree.structure(before)
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(before), strict=True
        ):
            where = jax.tree_util.keystr(path)
            assert (new.shape, new.dtype) == (old.shape, old.dtype), where
            assert np.isfinite(new).all(), where
    assert (int(between.step), int(after.step)) == (1, 2)
