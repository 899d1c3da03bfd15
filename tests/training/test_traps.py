"""A cosine of 0.9 without anything learnt, and that it is called by its name."""

import jax.numpy as jnp
import numpy as np
import optax

from kava_jax.evaluation.heldout import make_held_out
from kava_jax.journal.verdict import collapse_signs, verdict
from kava_jax.training.optimizer import make_optimizer
from kava_jax.training.step import make_train_step
from tests.training.small import Setting, batch, jitted, one_device, setting, start

STEPS = 150
BATCH = batch(0, 16)


def unrelated(made: Setting, seed: int) -> dict:
    """The teacher with an embedding drawn anew: what it says no longer depends on the tokens."""
    teacher = dict(made.teachers["big"])
    shape = teacher["embed"]["embedding"].shape
    drawn = 0.2 * np.random.default_rng(seed).normal(size=shape)
    teacher["embed"] = {"embedding": jnp.asarray(drawn, jnp.float32)}
    return {"big": teacher}


def trained(made: Setting, *, random: bool) -> dict[str, float]:
    """Held-out figures after training on the KV loss alone, on random or on real targets."""
    rate = optax.constant_schedule(1e-2)
    optimizer = make_optimizer(
        dict.fromkeys(("student", "projector"), rate),
        weight_decay=0.0,
        clip_norm=1.0,
        b2=0.95,
    )
    step = jitted(
        make_train_step(made.objective, optimizer, kv_weight=made.kv_weight, microbatches=1)
    )
    state = start(made, optimizer)
    for number in range(STEPS):
        teachers = unrelated(made, number) if random else made.teachers
        state, _ = step(state, teachers, BATCH)
    objective = made.objective
    teachers = unrelated(made, STEPS) if random else made.teachers
    held_out = make_held_out(objective, one_device())
    return held_out(state.params, teachers, state.statistics, [lambda: BATCH]).values


def word_and_signs(found: dict[str, float]) -> tuple[str, list[str]]:
    signs = collapse_signs(
        cos_shuffled=found["eval_cos_shuffled"],
        gap=found["eval_alignment_gap"],
        cos_centered=found["eval_cos_centered"],
        retrieval=found["eval_retrieval"],
        tokens=int(found["eval_sampled_tokens"]),
    )
    return verdict(found["eval_cos_sim"], found["eval_cos_shuffled"]), signs


def test_student_and_projector_agree_on_random_targets_and_are_called_collapsed() -> None:
    made = setting(direction="teacher_to_student", ce_weight=0.0, kv_weight=1.0)
    found = trained(made, random=True)
    assert found["eval_cos_sim"] >= 0.9
    word, signs = word_and_signs(found)
    assert word == "collapsed"
    assert len(signs) >= 2  # the gap, and at least one that does not rest on the shuffled cosine


def test_a_target_that_cannot_drift_is_learnt_and_not_called_collapsed() -> None:
    made = setting(direction="student_to_teacher", ce_weight=0.0, kv_weight=1.0)
    found = trained(made, random=False)
    assert word_and_signs(found)[0] != "collapsed"
    assert found["eval_alignment_gap"] > 0.2
    # The same student cannot pretend on random targets: there is nothing common to agree on.
    assert trained(made, random=True)["eval_cos_sim"] < 0.5
