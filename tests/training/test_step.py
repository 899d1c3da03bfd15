"""One step: accumulation, groups, dropout and running means, against the objective's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.training.optimizer import make_optimizer
from kava_jax.training.step import make_train_step
from tests.tolerances import TOL
from tests.training.small import Setting, batch, jitted, setting, start, total_loss

BATCH = batch()
# Plain descent: Adam would blow the rounding of gradients near zero up to whole steps.
PLAIN = optax.sgd(0.1)


def rates(student: float, projector: float) -> dict:
    groups = {"student": student, "projector": projector}
    return {name: optax.constant_schedule(rate) for name, rate in groups.items()}


def run(made: Setting, optimizer=PLAIN, *, microbatches: int = 1, steps: int = 1, state=None):
    step = jitted(
        make_train_step(
            made.objective, optimizer, kv_weight=made.kv_weight, microbatches=microbatches
        )
    )
    state, lines = start(made, optimizer) if state is None else state, []
    for _ in range(steps):
        state, metrics = step(state, made.teachers, BATCH)
        lines.append(jax.device_get(metrics))
    return state, lines


def assert_params_close(left, right) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=TOL["after_one_step"]), left, right
    )


def test_microbatches_take_the_step_of_the_whole_batch() -> None:
    made = setting(kl_weight=0.5, direction="teacher_to_student")
    share = (1.0, 1.0)
    objective = jax.jit(jax.value_and_grad(total_loss(made), has_aux=True))
    zero = jnp.zeros((), jnp.int32)
    (loss, _), grads = objective(made.params, made.teachers, BATCH, zero, share)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, made.params, grads)
    assert max(jax.tree.leaves(jax.tree.map(lambda g: float(jnp.abs(g).max()), grads))) > 0.1
    for microbatches in (1, 2, 4):
        state, (line,) = run(made, microbatches=microbatches)
        assert_params_close(state.params, want)
        assert int(state.step) == 1
        assert float(line["loss"].sum) == pytest.approx(float(loss), rel=TOL["float32"])
        assert int(line["tokens"].sum) == int(np.asarray(BATCH.valid).sum())
        assert int(line["ce"].count) == int(np.asarray(BATCH.loss_mask)[:, 1:].sum())
        for group in ("student", "projector"):
            norm = float(optax.tree.norm(grads[group]))
            assert float(line[f"grad_norm_{group}"].sum) == pytest.approx(norm, rel=TOL["float32"])


def test_a_frozen_projector_stays_bitwise_and_the_rates_are_the_groups_own() -> None:
    made = setting(trainable=False)
    optimizer = make_optimizer(
        {"student": optax.constant_schedule(1e-3), "projector": None},
        weight_decay=0.1,
        clip_norm=1.0,
        b2=0.95,
    )
    state, _ = run(made, optimizer)
    jax.tree.map(np.testing.assert_array_equal, state.params["projector"], made.params["projector"])
    made = setting()
    optimizer = make_optimizer(
        rates(1e-3, 1e-2),
        weight_decay=0.0,
        clip_norm=1.0,
        b2=0.95,
    )
    state, _ = run(made, optimizer)
    moved = jax.tree.map(lambda a, b: np.abs(a - b), state.params, made.params)
    # Adam's first step is the rate times the gradient's sign, wherever there is a gradient.
    for group, rate in (("student", 1e-3), ("projector", 1e-2)):
        largest = max(float(leaf.max()) for leaf in jax.tree.leaves(moved[group]))
        assert largest == pytest.approx(rate, rel=1e-3)


def test_dropout_depends_on_the_step_and_running_means_forget() -> None:
    made = setting(dropout=0.5)
    still = optax.sgd(0.0)
    state, lines = run(made, still, steps=3)
    jax.tree.map(np.testing.assert_array_equal, state.params, made.params)
    losses = [float(line["big/kv_k"].value) for line in lines]
    assert len(set(losses)) == 3
    assert len({float(line["ce"].value) for line in lines}) == 1
    # Step and seed are all there is to the dropout: the third step alone draws the third masks.
    third = start(made, still)._replace(step=jnp.asarray(2, jnp.int32))
    _, (again,) = run(made, still, state=third)
    assert float(again["big/kv_k"].value) == losses[2]
    _, (other,) = run(made, still, state=third._replace(seed=jnp.uint32(1)))
    assert float(other["big/kv_k"].value) != losses[2]
    for name in ("cos", "cos_shuffled"):
        total = count = 0.0
        for line in lines:
            parts = [line[f"big/{name}_{part}"] for part in "kv"]
            total = 0.95 * total + sum(float(part.sum) for part in parts)
            count = 0.95 * count + sum(float(part.count) for part in parts)
            running = line[f"{name}_running"]
            assert float(running.sum) == pytest.approx(total, rel=TOL["float32"])
            assert float(running.count) == pytest.approx(count, rel=TOL["float32"])


def test_training_lowers_the_loss() -> None:
    optimizer = make_optimizer(
        rates(3e-3, 3e-3),
        weight_decay=0.0,
        clip_norm=1.0,
        b2=0.95,
    )
    _, lines = run(setting(), optimizer, steps=30)
    assert float(lines[-1]["loss"].sum) < 0.7 * float(lines[0]["loss"].sum)
    assert float(lines[-1]["big/cos_k"].value) > float(lines[0]["big/cos_k"].value) + 0.1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_everything_bitwise(what: str) -> None:
    """NaN in the teacher makes the loss NaN; a KV weight of 1e38 only the gradient infinite."""
    made = setting(kv_weight=1e38 if what == "gradient" else 0.7)
    step = jitted(make_train_step(made.objective, PLAIN, kv_weight=made.kv_weight, microbatches=2))
    before = start(made, PLAIN)
    teachers = made.teachers
    if what == "loss":
        teachers = jax.tree.map(lambda x: x * jnp.nan, teachers)
    state, metrics = step(before, teachers, BATCH)
    assert np.isfinite(float(metrics["loss"].sum)) == (what == "gradient")
    assert not np.isfinite(float(metrics["grad_norm_student"].sum))
    same = state._replace(step=before.step, skips=before.skips)
    jax.tree.map(np.testing.assert_array_equal, same, before)
    assert (int(state.step), int(state.skips.total), int(state.skips.in_a_row)) == (1, 1, 1)
    again, _ = step(state, teachers, BATCH)
    assert (int(again.skips.total), int(again.skips.in_a_row)) == (2, 2)
