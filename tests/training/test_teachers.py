"""Several teachers: two that are one, routing that never teaches the student, what steps keep."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.alignment.router import Router
from kava_jax.training.comparison import read
from kava_jax.training.objective import Share
from kava_jax.training.step import TrainState, initial_state, make_train_step
from tests.tolerances import TOL
from tests.training.small import Setting, batch, setting

BATCH = batch()
CLOSE = TOL["float32"]
NAMES = ("a", "b")
WHOLE = Share(jnp.ones(()), jnp.ones(()))


def program(made: Setting) -> Callable:
    """``(params, teachers) -> ((loss, metrics), gradients)``, KV at the setting's weight."""
    step = jnp.zeros((), jnp.int32)

    def loss(params: Any, teachers: Any) -> Any:
        losses, (metrics, _) = made.objective(params, teachers, BATCH, step, WHOLE, made.statistics)
        return losses.language + made.kv_weight(step) * losses.kv, metrics

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


@dataclass(frozen=True)
class Told(Router):
    """Shares that are told to it: no function of anything."""

    told: Any = None

    def shares(self, hidden_BTD: Any, gate: Any, prototypes: Any) -> Any:
        return jnp.asarray(self.told)


def test_the_gate_learns_and_routing_never_teaches_the_student() -> None:
    made = setting(names=NAMES, router="learned", kl_weight=0.5)
    (loss, metrics), gradients = program(made)(made.params, made.teachers)
    reading = jax.jit(
        lambda params: read(made.objective.student, params, BATCH, key_space="pre_rope").hidden
    )(made.params["student"])
    shares = made.objective.router.shares(reading, made.params["router"], None)
    counted = np.asarray(BATCH.kv_mask)
    assert np.asarray(shares)[counted].std(axis=0).min() > 0.05  # so it depends on the student
    told = replace(made.objective, router=Told("learned", (1.0, 2.0), None, np.asarray(shares)))
    (same, _), frozen = program(made._replace(objective=told))(made.params, made.teachers)
    assert float(same) == pytest.approx(float(loss), rel=CLOSE)
    for group in ("student", "projector"):
        assert_close(gradients[group], frozen[group])
    assert not any(leaf.any() for leaf in jax.tree.leaves(frozen["router"]))
    of_gate = gradients["router"]
    assert np.abs(of_gate["kernel"]).min() > 0
    # Only what sets one teacher's logit apart from the other's matters.
    assert np.abs(of_gate["bias"]).min() > 100 * CLOSE
    np.testing.assert_allclose(of_gate["bias"].sum(), 0, atol=CLOSE)
    for index, name in enumerate(NAMES):
        want = np.asarray(shares, np.float64)[counted][:, index].mean()
        assert float(metrics[f"{name}/route"].value) == pytest.approx(want, rel=CLOSE)
    p = np.asarray(shares, np.float64)[counted]
    spread = -(p * np.log(p)).sum(axis=-1).mean()
    assert float(metrics["router_entropy"].value) == pytest.approx(spread, rel=CLOSE)


@cache
def two_steps() -> tuple[Setting, list[TrainState], list[dict]]:
    """States before, between and after two steps of two microbatches; each step's metrics."""
    made = setting(names=NAMES, router="similarity", center="running")
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
    """By step, counted vectors by teacher, part and side [P, tokens, K, H], and hidden states."""
    made, states, _ = two_steps()
    run = jax.jit(lambda params: made.objective.compared(params, made.teachers, BATCH))
    counted = np.asarray(BATCH.kv_mask)
    found = []
    for state in states[:2]:
        compared = run(state.params)
        vectors = {
            (name, part, side): np.asarray(getattr(getattr(of[0], side), part), np.float64)[
                :, counted
            ]
            for name, of in compared.items()
            for part in "kv"
            for side in ("student", "target")
        }
        hidden = np.asarray(compared["a"][1].hidden, np.float64)[counted]
        found.append({"vectors": vectors, "hidden": hidden})
    return found


def test_running_means_are_those_of_whole_batches_that_fade() -> None:
    made, states, _ = two_steps()
    for (name, part, side), first in seen()[0]["vectors"].items():
        second = seen()[1]["vectors"][name, part, side]
        assert np.abs(first - second).max() > 100 * CLOSE or side == "target"
        weights = [np.ones(first.shape[1]), np.ones(second.shape[1])]
        for number in (1, 2):
            vectors = np.concatenate((first, second)[:number], axis=1)
            weight = np.concatenate(weights[:number])
            mean = np.average(vectors, axis=1, weights=weight)
            kept = getattr(states[number].statistics.means[name][part], side)
            assert float(kept.count) == pytest.approx(weight.sum(), rel=CLOSE)
            np.testing.assert_allclose(kept.mean, mean, rtol=CLOSE, atol=CLOSE)
            weights[0] = weights[0] * 0.99
    assert made.statistics.means.keys() == set(NAMES)


def token_losses(vectors: dict, name: str, memory: Any) -> np.ndarray:
    """Mercator's loss of every counted token, keys and values, around the remembered means."""
    total = 0.0
    for part in "kv":
        s, t = (
            vectors[name, part, side] - np.asarray(memory[name][part][i].mean, np.float64)[:, None]
            for i, side in enumerate(("student", "target"))
        )
        of_s, of_t = (np.linalg.norm(x, axis=-1) for x in (s, t))
        cos = (s * t).sum(axis=-1) / (of_s * of_t)
        total = total + 0.5 * (1 - cos + 0.01 * np.log(of_s / of_t) ** 2).mean(axis=(0, 2))
    return total


def test_prototypes_are_the_directions_of_the_tokens_each_served_best() -> None:
    _, states, lines = two_steps()
    sums, counts = np.zeros((2, 32)), np.zeros(2)
    routed = [np.full(2, [1 / 3, 2 / 3])]
    # In the first step there are no means to remember yet, and each microbatch has its own.
    for number, now in enumerate(seen()):
        directions = now["hidden"] / np.linalg.norm(now["hidden"], axis=-1, keepdims=True)
        if number == 1:
            prototypes = sums / np.linalg.norm(sums, axis=-1, keepdims=True)
            terms = np.exp(directions @ prototypes.T / 0.1) * np.array([1.0, 2.0])
            routed.append((terms / terms.sum(axis=-1, keepdims=True)).mean(axis=0))
        best = best_of(number, now["vectors"], states[number])
        sums = 0.99 * sums + np.stack([directions[best == m].sum(axis=0) for m in range(2)])
        counts = 0.99 * counts + np.bincount(best, minlength=2)
        kept = states[number + 1].statistics.prototypes
        assert counts.min() > 1
        np.testing.assert_allclose(kept.sum, sums, rtol=CLOSE, atol=CLOSE)
        np.testing.assert_allclose(kept.count, counts, rtol=CLOSE)
        found = [float(lines[number][f"{name}/route"].value) for name in NAMES]
        np.testing.assert_allclose(found, routed[number], rtol=CLOSE)


def best_of(number: int, vectors: dict, state: TrainState) -> np.ndarray:
    """Which teacher serves each counted token best in this step."""
    if number:
        memory = state.statistics.means
        return np.argmin([token_losses(vectors, name, memory) for name in NAMES], axis=0)
    rows = np.nonzero(np.asarray(BATCH.kv_mask))[0]
    best = np.zeros(len(rows), int)
    for micro in range(2):  # every second row
        mine = rows % 2 == micro
        own = {key: x[:, mine] for key, x in vectors.items()}
        memory = {
            name: {
                part: [Means(own[name, part, side].mean(axis=1)) for side in ("student", "target")]
                for part in "kv"
            }
            for name in NAMES
        }
        best[mine] = np.argmin([token_losses(own, name, memory) for name in NAMES], axis=0)
    return best


@dataclass
class Means:
    """The one field that counts here."""

    mean: np.ndarray


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
