"""What is trained in bfloat16 is what is trained in float32: objective, gradients, whole steps.

A config builds every case twice, and both get the same weights and rows.
"""

from functools import cache
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kava_jax.alignment.layer_map import CALIBRATED_MAPS, NAMED_MAPS
from kava_jax.config.recipes import RECIPES
from kava_jax.geometry import masked_mean
from kava_jax.models.layers import Dtypes, Projection, RMSNorm
from kava_jax.training.comparison import LayerComparison, Vectors, forward
from kava_jax.training.objective import Match
from kava_jax.training.step import initial_state, make_train_step
from tests.tolerances import TOL
from tests.training.by_recipe import made
from tests.training.small import KV_LOSSES, PAIRS, STUDENT, batch

BATCH = batch()


def cosine(a: Any, b: Any) -> float:
    """Of two trees, each as one vector in float64."""
    x, y = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])
        for tree in (a, b)
    )
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


class Case(NamedTuple):
    """One run of the lane."""

    recipe: str
    kv: str = "mercator"
    layer_map: Any = "ratio"
    kl_weight: float = 0.0
    match: str = "cache"
    projector: str | None = None


CASES = (
    Case("original"),
    Case("anchored"),
    Case("calibrated", layer_map="calibrated"),
    # The small pair's widths differ, so it cannot be compared as it is.
    Case("healed", layer_map="origin", kl_weight=1.0, projector="linear"),
    Case("anchored", "mse", "origin", kl_weight=0.5),
    Case("original", "smooth_l1", "straddle"),
    Case("calibrated", "hybrid", "last"),
    Case("original", "smooth_l1", match="attention"),
    Case("anchored", "mse", match="attention_outputs"),
    Case("original", match="block_outputs"),
    Case("anchored", layer_map="cka"),
    Case("calibrated", layer_map=PAIRS),
)


def test_the_lane_leaves_nothing_out() -> None:
    assert {case.recipe for case in CASES if case.kv == "mercator"} == set(RECIPES)
    assert {case.kv for case in CASES} == set(KV_LOSSES)
    assert {case.match for case in CASES} == set(get_args(Match))
    assert {case.layer_map for case in CASES} == {*NAMED_MAPS, *CALIBRATED_MAPS, PAIRS}


def stepped(case: Case, dtype: str) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of a whole step in two microbatches, dropout on."""
    fields = {
        "teachers.0.layer_map": case.layer_map,
        "loss.kv": case.kv,
        "loss.kl_weight": case.kl_weight,
        "loss.match": case.match,
    }
    fields |= {"projector.kind": case.projector} if case.projector else {}
    blueprint, params, teachers = made(case.recipe, dtype, **fields)
    plain = optax.sgd(1.0)  # parameters fall by their gradient
    step = make_train_step(
        blueprint.objective, plain, kv_weight=blueprint.kv_weight, microbatches=2
    )
    state = initial_state(params, plain, blueprint.empty_statistics())
    after, metrics = jax.jit(step)(state, teachers, BATCH)
    assert int(after.skips.total) == 0
    return float(metrics["loss"].value), jax.tree.map(np.subtract, params, after.params)


# The first ones are the recipes as they are.
SOME = [*CASES[:4], *(pytest.param(case, marks=pytest.mark.long) for case in CASES[4:])]


@pytest.mark.parametrize("case", SOME, ids=lambda c: f"{c.recipe}-{c.kv}-{c.match}-{c.layer_map}")
def test_a_step_is_that_of_float32(case: Case) -> None:
    wide, wide_gradients = stepped(case, "float32")
    narrow, gradients = stepped(case, "bfloat16")
    assert 0 < abs(narrow / wide - 1) < TOL["bf16_loss"]
    assert 1 - cosine(gradients["student"], wide_gradients["student"]) < TOL["bf16_gradient"]
    if case.recipe == "calibrated":  # its projector is frozen
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients["projector"]))
    else:
        found = cosine(gradients["projector"], wide_gradients["projector"])
        assert 1 - found < TOL["bf16_gradient"]


# The key bias, many times as long as the rest of a key; one layer each, so that inputs are equal.

TIMES = 200.0
DIRECTIONS = ("teacher_to_student", "student_to_teacher")


class OneLayer(NamedTuple):
    """What one layer of both models gives under a key bias ``TIMES`` as long as its keys."""

    student: Vectors
    teacher: Vectors
    gradients: dict[str, dict[str, Any]]
    """By KV loss, of the student's keys and of the projector."""
    spaces: dict[str, jax.Array]
    """Keys with their bias: as they are compared, and as the space's queries read them."""


def enlarged(part: dict[str, Any], embed: dict[str, Any]) -> float:
    """Make a layer's key bias long, and it and the inputs the same in bfloat16; its length."""
    embed["embedding"] = embed["embedding"].astype(jnp.bfloat16).astype(np.float32)
    projection = part["attention"]["k"]
    width, head_dim = projection["kernel"].shape[-3], projection["kernel"].shape[-1]
    length = 1.5 * TIMES * 0.2 * (width * head_dim) ** 0.5  # kernels have a spread of 0.2
    bias = projection["bias"].astype(jnp.bfloat16).astype(np.float32)
    bias *= length / np.linalg.norm(bias, axis=-1, keepdims=True)
    projection["bias"] = bias.astype(jnp.bfloat16).astype(projection["kernel"].dtype)
    return length


@cache
def with_large_bias(direction: str, dtype: str) -> OneLayer:
    """Layer 0 of the student's blocks meets layer 0 of the teacher, which is its cut tail."""
    fields = {"teachers.0.layer_map": ((0, 0),), "loss.remove_key_bias": True}
    fields |= {"projector.direction": direction}
    blueprint, params, teachers = made("original", dtype, 1, **fields)
    objective = blueprint.objective
    link, rows = objective.teachers["big"], BATCH
    assert blueprint.teachers["big"].blocks == 0
    lengths = [
        enlarged(params["student"]["blocks"], params["student"]["embed"]),
        enlarged(teachers["big"]["tail"], teachers["big"]["embed"]),
    ]

    def look(params: Any, teachers: Any) -> OneLayer:
        student = forward(objective.student, params["student"], rows, queries=True)
        teacher = forward(link.graph, teachers["big"], rows, queries=True)
        ours, theirs = link.comparison.sides(student, teacher)

        def compared(keys: jax.Array, projector: Any) -> Any:
            module = nnx.merge(objective.projector, projector)
            return link.comparison.projected(module, ours | {"k": keys}, theirs)

        def losses(keys: jax.Array, projector: Any) -> jax.Array:
            s, t, _ = compared(keys, projector)
            mask = rows.kv_mask
            found = [loss()(s["k"], t["k"], mask) for loss in KV_LOSSES.values()]
            return masked_mean(jnp.stack(found), mask[None], (1, 2)).value

        by_kind = jax.jacrev(losses, argnums=(0, 1))(ours["k"], params["projector"])
        gradients = {
            kind: dict(
                zip(
                    ("keys", "projector"),
                    jax.tree.map(lambda x, i=i: x[i], by_kind),
                    strict=True,
                )
            )
            for i, kind in enumerate(KV_LOSSES)
        }
        spaces = {
            space: LayerComparison("big", link.comparison.layer_map, space).vectors(student)["k"]
            for space in ("pre_rope", "post_rope")
        }
        both = compared(ours["k"], params["projector"])
        attended = link.comparison.attended(both, direction, student, teacher)
        onto_student = direction == "teacher_to_student"
        spaces["attended"] = attended[1].k if onto_student else attended[2].k
        return OneLayer(ours, theirs, gradients, spaces)

    found = jax.jit(look)(params, teachers)
    for length, vectors in zip(lengths, (found.student, found.teacher), strict=True):
        assert length > TIMES * lengths_of(vectors["k"]).mean()
    return found


def lengths_of(keys: Any) -> np.ndarray:
    """Of every key of a token that counts."""
    return np.linalg.norm(np.asarray(keys, np.float64)[:, np.asarray(BATCH.kv_mask)], axis=-1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_large_key_bias_takes_nothing_from_keys_without_it(direction: str) -> None:
    wide, narrow = (with_large_bias(direction, dtype) for dtype in ("float32", "bfloat16"))
    for side in ("student", "teacher"):
        left, right = getattr(narrow, side)["k"], getattr(wide, side)["k"]
        assert (left.dtype, right.dtype) == (jnp.bfloat16, jnp.float32)
        assert 1 - cosine(left, right) < TOL["bf16_keys"]
    for kind in KV_LOSSES:
        for what, gradient in wide.gradients[kind].items():
            found = cosine(narrow.gradients[kind][what], gradient)
            assert 1 - found < TOL["bf16_kv_gradient"], (kind, what)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_large_key_bias_takes_nothing_from_keys_with_it(direction: str) -> None:
    """What a mean taken off them, or a query that reads them, finds is their content."""
    wide, narrow = (with_large_bias(direction, dtype) for dtype in ("float32", "bfloat16"))
    for space, keys in wide.spaces.items():
        side = wide.teacher if (space, direction) == ("attended", DIRECTIONS[1]) else wide.student
        missed = lengths_of(np.asarray(narrow.spaces[space]) - np.asarray(keys))
        content, whole = lengths_of(side["k"]).mean(), lengths_of(keys).mean()
        assert whole > 0.9 * TIMES * content
        assert missed.mean() < TOL["bf16_content"] * content, space


def test_gradients_of_biases_and_scales_are_summed_in_float32() -> None:
    tokens, width = 1 << 14, 8
    x = np.random.default_rng(0).normal(1.0, 1.0, (1, tokens, width)).astype(jnp.bfloat16)

    def gradients(dtype: Any) -> Any:
        dtypes = Dtypes(jnp.dtype(jnp.float32), jnp.dtype(dtype))
        build = {"inputs": {"embed": width}, "outputs": {"ffw": width}, "bias": True, "std": 0.2}
        model = {
            "norm": RMSNorm({"embed": width}, spec=STUDENT, dtypes=dtypes),
            "map": Projection(**build, dtypes=dtypes, rngs=nnx.Rngs(0)),
        }
        graph, params = nnx.split(nnx.Dict(model))

        def loss(params: Any) -> jax.Array:
            parts = nnx.merge(graph, params)
            y = parts["map"](parts["norm"](jnp.asarray(x, dtype))).astype(jnp.float32)
            return jnp.sum((y + 1.0) ** 2)

        found = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
        return found["map"]["bias"], found["norm"]["scale"]

    for narrow, wide in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert narrow.dtype == jnp.float32
        error = np.abs(narrow - wide).max() / np.abs(wide).max()
        assert 0 < error < TOL["bf16_sums"]
