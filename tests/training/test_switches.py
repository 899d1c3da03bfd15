"""Every pair of switches, in a few dozen runs of the small pair under jit and grad.

Bugs that need two switches to show are far more common than those that need three, and all pairs
fit into about as many runs as the two longest lists have pairs.
"""

import itertools
import random
from functools import cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.config.distillation import LossConfig
from kava_jax.models.layers import Output
from kava_jax.training.objective import Match
from tests.training.small import KV_LOSSES, MAP, TEACHER, batch, setting

SIDE_BY_SIDE = LayerMap((0, 2), ((0, 1), (1, 2)))
MAPS = {"single": MAP, "side_by_side": SIDE_BY_SIDE}
PROJECTORS = {
    "elastic": {"kind": "elastic"},
    "linear_per_layer": {"kind": "linear", "per_layer": True},
}
SWITCHES = {
    "kv": tuple(KV_LOSSES),
    "match": get_args(Match),
    "center": ("none", "batch", "running"),
    "layer_map": tuple(MAPS),
    "projector": tuple(PROJECTORS),
    "teachers": (1, 2),
    "direction": ("student_to_teacher", "teacher_to_student"),
    "key_space": ("pre_rope", "post_rope"),
    "remove_key_bias": (False, True),
    "kl_weight": (0.0, 0.5),
}
# Switch by switch: what a configuration refuses, or a map without queries of its own.
REFUSED = (
    {"remove_key_bias": (True,), "key_space": ("post_rope",)},
    {
        "match": ("attention",),
        "direction": ("student_to_teacher",),
        "layer_map": ("side_by_side",),
    },
    {"match": get_args(Output), "key_space": ("post_rope",)},
    {"match": get_args(Output), "remove_key_bias": (True,)},
)
Row = dict[str, Any]


def valid(row: Row) -> bool:
    """Whether a row, or a part of one, is refused by nothing."""
    return not any(
        all(name in row and row[name] in values for name, values in rule.items())
        for rule in REFUSED
    )


def pairs(row: Row) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def every_valid_pair() -> list[frozenset]:
    settings = [(name, value) for name, values in SWITCHES.items() for value in values]
    found = itertools.combinations(settings, 2)
    return [frozenset(p) for p in found if p[0][0] != p[1][0] and valid(dict(p))]


def filled(start: Row, left: set[frozenset], order: list[str]) -> Row:
    """``start`` with each other switch, in turn, at the value that brings most pairs still left."""
    row = dict(start)
    for name in order:
        if name not in row:
            options = [row | {name: value} for value in SWITCHES[name]]
            row = max(filter(valid, options), key=lambda option: len(pairs(option) & left))
    return {name: row[name] for name in SWITCHES}


@cache
def covering_rows() -> list[Row]:
    """Rows that hold every valid pair: greedily, each the best of fifty orders to fill one in."""
    ordered, left = every_valid_pair(), set(every_valid_pair())
    draw, rows = random.Random(0), []
    while left:
        start = dict(next(pair for pair in ordered if pair in left))
        orders = [draw.sample(list(SWITCHES), len(SWITCHES)) for _ in range(50)]
        candidates = [filled(start, left, order) for order in orders]
        rows.append(max(candidates, key=lambda row: len(pairs(row) & left)))
        left -= pairs(rows[-1])
    return rows


def test_the_rows_hold_every_pair_that_is_not_refused() -> None:
    rows = covering_rows()
    assert all(valid(row) and list(row) == list(SWITCHES) for row in rows)
    for (one, first), (other, second) in itertools.combinations(SWITCHES.items(), 2):
        for a, b in itertools.product(first, second):
            found = any(row[one] == a and row[other] == b for row in rows)
            assert found == valid({one: a, other: b}), (one, a, other, b)
    assert len(rows) <= 26


def test_what_is_left_out_is_what_a_configuration_refuses() -> None:
    names = ("kv", "match", "key_space", "remove_key_bias")
    for values in itertools.product(*(SWITCHES[name] for name in names)):
        row = dict(zip(names, values, strict=True))
        try:
            LossConfig(**row)
        except ValueError:
            assert not valid(row), row
        else:
            assert valid(row), row
    for direction, name in itertools.product(SWITCHES["direction"], MAPS):
        made = setting(direction=direction, layer_map=MAPS[name])
        can = made.objective.teachers["big"].comparison.can_attend(direction)
        assert can == valid({"match": "attention", "direction": direction, "layer_map": name})


BATCH = batch(0, 4)
OTHER_PADDING = BATCH._replace(
    tokens=jnp.where(BATCH.valid, BATCH.tokens, (BATCH.tokens + 17) % TEACHER.vocab_size)
)


def made_of(row: Row):
    options = {name: row[name] for name in row.keys() - {"projector", "teachers", "layer_map"}}
    names = ("big", "other")[: row["teachers"]]
    return setting(
        names=names, layer_map=MAPS[row["layer_map"]], **PROJECTORS[row["projector"]], **options
    )


def program(made):
    """``(batch, weights of language and KV, statistics) -> ((loss, seen), gradients)``."""
    whole, step = (1.0, 1.0), jnp.zeros((), jnp.int32)

    def loss(params, teachers, data, weights, statistics):
        losses, seen = made.objective(params, teachers, data, step, whole, statistics)
        return weights[0] * losses[0] + weights[1] * losses[1], seen

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    # From the host: statistics that a step left on the device would be compiled for once more.
    return lambda data, weights, statistics: run(
        made.params, made.teachers, data, jnp.array(weights), jax.device_get(statistics)
    )


def assert_like(found, wanted) -> None:
    """Finite, and of the same structure, shapes and dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype), where
        assert np.isfinite(leaf).all(), where


def name_of(row: Row) -> str:
    return "-".join(name if value is True else str(value) for name, value in row.items() if value)


@pytest.mark.parametrize("row", covering_rows(), ids=name_of)
def test_switches(row: Row) -> None:
    made = made_of(row)
    run = program(made)
    found = run(BATCH, (1.0, 0.7), made.statistics)
    (loss, (metrics, seen)), gradients = found
    assert loss.shape == ()
    assert np.isfinite(loss)
    assert_like(gradients, made.params)
    assert_like(seen, made.statistics)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(metrics))
    # Padding is never seen.
    again = run(OTHER_PADDING, (1.0, 0.7), made.statistics)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    # KV alone, with the statistics of one step behind it, pulls at both mapped layers.
    (kv, _), gradients = run(BATCH, (0.0, 1.0), seen)
    assert np.isfinite(kv)
    assert_like(gradients, made.params)
    of_attention = gradients["student"]["blocks"]["attention"]
    for part, layer in itertools.product("kv", MAPS[row["layer_map"]].student_layers):
        assert np.abs(of_attention[part]["kernel"][layer]).max() > 0
