"""``kava bench ce``: cross-entropy at the LM head, beside the same with all logits at once."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kava_jax.bench.peers import beside, check_same, product_speed, temporary_bytes
from kava_jax.bench.timing import circumstances
from kava_jax.losses import cross_entropy
from kava_jax.training.vocabulary import Head, weighted_losses

TOLERANCE = 1e-5  # of the largest entry


class Sizes(NamedTuple):
    """Hidden states [rows, length, width] and a head [vocabulary, width], float32."""

    rows: int = 4
    length: int = 255
    width: int = 256
    vocabulary: int = 151_936
    square: int = 2048
    """Width of the matrices whose product measures the machine."""


class _Inputs(NamedTuple):
    head: Head
    labels_BU: Int[Array, "B U"]
    counted_BU: Bool[Array, "B U"]


def bench_ce(sizes: Sizes) -> dict[str, Any]:
    """Mean cross-entropy, forward and backward in hidden states and head.

    Twice: with all positions counted, and without the first half of each row, the prompt.
    ``naive`` is the plain form, all logits in one array. ``floor_flops`` are those of the three
    matrix products at counted positions, ``6 * positions * width * vocabulary``, and
    ``share_of_floor`` the time in which a plain product does as many, over ours. Temporaries are
    what a compiled program needs beside its arguments and results.

    Raises KavaError where the two give different numbers.
    """
    speed = product_speed(sizes.square)
    cases = {"all": 0, "answers": sizes.length // 2}
    found = {name: _case(_inputs(sizes, prompt), speed) for name, prompt in cases.items()}
    return {
        "name": "ce",
        "sizes": sizes._asdict(),
        "product_flops_per_second": speed,
        "cases": found,
        **circumstances(),
    }


def _inputs(sizes: Sizes, prompt: int) -> _Inputs:
    of_hidden, of_head, of_labels = jax.random.split(jax.random.key(0), 3)
    shape = (sizes.rows, sizes.length)
    hidden = jax.random.normal(of_hidden, (*shape, sizes.width))
    table = 0.02 * jax.random.normal(of_head, (sizes.vocabulary, sizes.width))
    labels_BU = jax.random.randint(of_labels, shape, 0, sizes.vocabulary)
    counted_BU = jnp.broadcast_to(jnp.arange(sizes.length) >= prompt, shape)
    return _Inputs(Head(hidden, table), labels_BU, counted_BU)


def _case(inputs: _Inputs, speed: float) -> dict[str, Any]:
    forms = {"kava": _ours, "naive": _naive}
    compiled = {
        name: jax.jit(jax.value_and_grad(form)).lower(*inputs).compile()
        for name, form in forms.items()
    }
    ours, naive = (program(*inputs) for program in compiled.values())
    check_same("naive", ours, naive, TOLERANCE)
    del ours, naive
    found = beside({name: partial(program, *inputs) for name, program in compiled.items()}, "kava")
    temporaries = {name: temporary_bytes(program) for name, program in compiled.items()}
    vocabulary, width = inputs.head.table.shape
    floor = 6.0 * int(inputs.counted_BU.sum()) * width * vocabulary
    return {
        **found,
        "time_of_naive": 1 / found["times_ours"]["naive"],
        "temporary_bytes": temporaries,
        "temporaries_of_naive": temporaries["kava"] / temporaries["naive"],
        "floor_flops": floor,
        "share_of_floor": floor / speed / found["seconds"]["kava"]["median"],
    }


def _ours(head: Head, labels_BU: Array, counted_BU: Array) -> Float[Array, ""]:
    """As the objective takes it."""
    weights_BUK = (counted_BU / counted_BU.sum())[..., None]

    def losses(logits: dict[str, Array], labels: Array) -> Array:
        return _of_tokens(logits["student"], labels)[..., None]

    total, _ = weighted_losses(head, {}, labels_BU, counted_BU, weights_BUK, losses)
    return total


def _naive(head: Head, labels_BU: Array, counted_BU: Array) -> Float[Array, ""]:
    return cross_entropy(head.hidden @ head.table.T, labels_BU, counted_BU).value


def _of_tokens(logits: Float[Array, "S N V"], labels: Int[Array, "S N"]) -> Float[Array, "S N"]:
    def of_token(row: Array, label: Array) -> Array:
        return cross_entropy(row, label).value

    return jax.vmap(jax.vmap(of_token))(logits, labels)
