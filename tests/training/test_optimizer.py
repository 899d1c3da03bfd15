"""Rates by hand, AdamW by hand, and the two groups kept apart."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.training.optimizer import decayed, learning_rate, make_optimizer
from tests.tolerances import TOL


def test_rates_by_hand() -> None:
    rate = learning_rate(1e-3, 20, warmup_steps=4, min_lr_ratio=0.1)
    warm = [0.2e-3, 0.4e-3, 0.6e-3, 0.8e-3]
    # The last of 20 steps is number 19: there the final share is reached.
    cosine = [
        1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 15)))
        for step in range(4, 20)
    ]
    found = [float(rate(step)) for step in range(20)]
    np.testing.assert_allclose(found, warm + cosine, rtol=TOL["float32"])
    assert found[4] == pytest.approx(1e-3, rel=TOL["float32"])
    assert found[19] == pytest.approx(1e-4, rel=TOL["float32"])
    assert float(rate(30)) == pytest.approx(1e-4, rel=TOL["float32"])


def test_constant_and_unwarmed_rates() -> None:
    constant = learning_rate(2e-3, 10, warmup_steps=1, min_lr_ratio=1.0)
    found = [float(constant(step)) for step in (0, 1, 2, 9, 99)]
    np.testing.assert_allclose(found, [1e-3, 2e-3, 2e-3, 2e-3, 2e-3], rtol=TOL["float32"])
    plain = learning_rate(2e-3, 10)
    np.testing.assert_allclose(
        [float(plain(step)) for step in (0, 3, 9, 10)],
        [2e-3, 1.5e-3, 0, 0],  # a third of the way: (1 + cos 60 degrees) / 2
        rtol=TOL["float32"],
        atol=1e-9,
    )
    assert float(learning_rate(2e-3, 1)(0)) == pytest.approx(2e-3, rel=TOL["float32"])
    all_warmup = learning_rate(3e-3, 2, warmup_steps=2)
    found = [float(all_warmup(step)) for step in range(2)]
    np.testing.assert_allclose(found, [1e-3, 2e-3], rtol=TOL["float32"])


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "student": {
            "embed": {"embedding": draw(5, 3)},
            "blocks": {
                "attention_norm": {"scale": draw(2, 3)},
                "attention": {"q": {"kernel": draw(2, 3, 2, 2), "bias": draw(2, 2, 2)}},
            },
        },
        "projector": {
            "pairs": {
                "big": {"k": {"mixer_kernel": draw(2, 2), "kernel": draw(1, 2, 2)}},
                "small": {"k": {"inner": {"kernel": draw(3, 3)}, "shift": draw(3)}},
            }
        },
    }


DECAYED = {"embedding", "kernel", "mixer_kernel"}


def test_what_decays() -> None:
    for path, flag in jax.tree_util.tree_leaves_with_path(decayed(tree(0))):
        assert flag == (path[-1].key in DECAYED)


def optimizer(clip: float = 1.0, projector: float | None = 1e-2) -> optax.GradientTransformation:
    return make_optimizer(
        {
            "student": optax.constant_schedule(1e-3),
            "projector": None if projector is None else optax.constant_schedule(projector),
        },
        weight_decay=0.1,
        clip_norm=clip,
        b2=0.95,
    )


def adamw64(params, grads_of_steps, rate: float, clip: float) -> list[np.ndarray]:
    """AdamW on one group's leaves in float64, gradient clipped by the group's own norm."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [path[-1].key for path, _ in leaves]
    x = [np.asarray(leaf, np.float64) for _, leaf in leaves]
    m, v = ([np.zeros_like(leaf) for leaf in x] for _ in range(2))
    for t, grads in enumerate(grads_of_steps, start=1):
        g = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
        norm = math.sqrt(sum((leaf**2).sum() for leaf in g))
        for i, leaf in enumerate(g):
            leaf = leaf * min(1.0, clip / norm)
            m[i] = 0.9 * m[i] + 0.1 * leaf
            v[i] = 0.95 * v[i] + 0.05 * leaf**2
            update = (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.95**t)) + 1e-8)
            decay = 0.1 * x[i] if names[i] in DECAYED else 0.0
            x[i] = x[i] - rate * (update + decay)
    return x


def test_two_groups_two_rates_two_clips() -> None:
    params, transform = tree(0), optimizer()
    # The student's gradient is huge and clipped, the projector's tiny and left alone; clipping
    # both by one norm would shrink the projector's a thousandfold.
    grads = [
        {
            "student": jax.tree.map(lambda x: 100 * x, tree(seed)["student"]),
            "projector": jax.tree.map(lambda x: 1e-3 * x, tree(seed)["projector"]),
        }
        for seed in (1, 2, 3)
    ]
    state, x = transform.init(params), params
    for grad in grads:
        updates, state = transform.update(grad, state, x)
        x = optax.apply_updates(x, updates)
    for group, rate in (("student", 1e-3), ("projector", 1e-2)):
        want = adamw64(params[group], [grad[group] for grad in grads], rate, 1.0)
        for found, leaf in zip(jax.tree.leaves(x[group]), want, strict=True):
            np.testing.assert_allclose(found, leaf, rtol=TOL["float32"], atol=TOL["float32"])


def test_each_group_is_clipped_by_its_own_norm() -> None:
    # Adam alone cannot tell (it is blind to scale), so look at the first moment.
    params, grads = tree(0), jax.tree.map(lambda x: 10 * x, tree(1))
    grads["projector"] = jax.tree.map(lambda x: 1e-3 * x, tree(1)["projector"])
    _, state = optimizer().update(grads, optimizer().init(params), params)
    norms = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        if "mu" in names:
            group = names[names.index("mu") + 1]
            norms[group] = norms.get(group, 0.0) + float(jnp.sum((leaf / 0.1) ** 2))
    own = float(optax.tree.norm(grads["projector"]))
    assert own < 1
    assert math.sqrt(norms["student"]) == pytest.approx(1.0, rel=TOL["float32"])
    assert math.sqrt(norms["projector"]) == pytest.approx(own, rel=TOL["float32"])


def test_without_a_gradient_only_weights_decay() -> None:
    params, transform = tree(0), optimizer()
    updates, _ = transform.update(
        jax.tree.map(jnp.zeros_like, params), transform.init(params), params
    )
    for (path, before), update in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(updates), strict=True
    ):
        rate = 1e-3 if path[0].key == "student" else 1e-2
        want = -rate * 0.1 * before if path[-1].key in DECAYED else jnp.zeros_like(before)
        np.testing.assert_allclose(update, want, rtol=TOL["float32"])


def test_a_frozen_projector_is_not_touched() -> None:
    params, transform = tree(0), optimizer(projector=None)
    updates, _ = transform.update(tree(1), transform.init(params), params)
    after = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, after["projector"], params["projector"])
    assert not np.array_equal(
        after["student"]["embed"]["embedding"], params["student"]["embed"]["embedding"]
    )


def test_the_mean_gradient_can_be_kept_in_half_the_bytes() -> None:
    params = {"student": {"kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}}
    gradient = jax.tree.map(jnp.sin, params)
    found = {}
    for kind in ("float32", "bfloat16"):
        optimizer = make_optimizer(
            {"student": optax.constant_schedule(1e-2)},
            weight_decay=0.0,
            clip_norm=1.0,
            b2=0.999,
            mu_dtype=kind,
        )
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(gradient, state, params)
        kinds = {
            name: {leaf.dtype.name for leaf in jax.tree.leaves(optax.tree.get(state, name))}
            for name in ("mu", "nu")
        }
        assert kinds == {"mu": {kind}, "nu": {"float32"}}
        found[kind] = updates
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=TOL["bf16_model"]),
        found["bfloat16"],
        found["float32"],
    )
