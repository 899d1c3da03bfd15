"""From sums and counts to numbers, by hand."""

import math

import jax.numpy as jnp
import pytest

from kava_jax.geometry import Mean
from kava_jax.training.summary import summarize, summarize_layers
from tests.tolerances import TOL


def mean(total: float, count: float) -> Mean:
    return Mean(jnp.asarray(total), jnp.asarray(count))


def teacher(name: str, cos_k: float, cos_v: float, shuffled: float, **more: Mean) -> dict:
    found = {
        "kv_k": mean(3.0, 10),
        "kv_v": mean(5.0, 10),
        "cos_k": mean(10 * cos_k, 10),
        "cos_v": mean(10 * cos_v, 10),
        "cos_shuffled_k": mean(8 * shuffled, 8),
        "cos_shuffled_v": mean(8 * shuffled, 8),
        "mag_loss_k": mean(1.0, 10),
        "mag_loss_v": mean(3.0, 10),
        "s_magnitude_k": mean(20.0, 10),
        "s_magnitude_v": mean(30.0, 10),
        "t_magnitude_k": mean(40.0, 10),
        "t_magnitude_v": mean(10.0, 10),
    }
    return {f"{name}/{key}": value for key, value in (found | more).items()}


def test_one_teacher() -> None:
    found = summarize(
        {"ce": mean(6.0, 4), "loss": mean(2.0, 1)}
        | teacher("big", 0.8, 0.6, 0.5, kl=mean(1.0, 4))
        | {"cos_running": mean(7.0, 10), "cos_shuffled_running": mean(4.0, 8)}
    )
    assert found == pytest.approx(
        {
            "ce": 1.5,
            "loss": 2.0,
            "kv": 0.4,
            "cos_sim": 0.7,
            "cos_k": 0.8,
            "cos_v": 0.6,
            "cos_shuffled": 0.5,
            "alignment_gap": 0.2,
            "dir_loss": 0.3,
            "mag_loss": 0.2,
            "mag_ratio": (0.5 + 3.0) / 2,
            "kl": 0.25,
            "cos_running": 0.7,
            "gap_running": 0.2,
        },
        rel=TOL["float32"],
    )
    assert all(type(value) is float for value in found.values())


def test_several_teachers_are_averaged_and_told_apart() -> None:
    found = summarize(
        {"ce": mean(6.0, 4)}
        | teacher("big", 0.8, 0.6, 0.5, kl=mean(1.0, 4))
        | teacher("other", 0.4, 0.2, 0.3, kl=mean(3.0, 4), kv_k=mean(9.0, 10))
    )
    # What both have in common: magnitudes.
    same = {"mag_loss": 0.2, "mag_ratio": (0.5 + 3.0) / 2}
    big = same | {
        "kv": 0.4,
        "cos_sim": 0.7,
        "cos_k": 0.8,
        "cos_v": 0.6,
        "cos_shuffled": 0.5,
        "alignment_gap": 0.2,
        "dir_loss": 0.3,
        "kl": 0.25,
    }
    other = same | {
        "kv": 0.7,
        "cos_sim": 0.3,
        "cos_k": 0.4,
        "cos_v": 0.2,
        "cos_shuffled": 0.3,
        "alignment_gap": 0.0,
        "dir_loss": 0.7,
        "kl": 0.75,
    }
    both = same | {
        "kv": 0.55,
        "cos_sim": 0.5,
        "cos_k": 0.6,
        "cos_v": 0.4,
        "cos_shuffled": 0.4,
        "alignment_gap": 0.1,
        "dir_loss": 0.5,
        "kl": 0.5,
    }
    want = {"ce": 1.5} | both | named("big", big) | named("other", other)
    assert found == pytest.approx(want, rel=TOL["float32"], abs=TOL["float32"])


def named(teacher: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{teacher}/{name}": value for name, value in figures.items()}


def test_a_figure_that_one_teacher_has_alone_is_the_figure() -> None:
    found = summarize(
        teacher("big", 0.8, 0.6, 0.5, attention_kl=mean(3.0, 4)) | teacher("other", 0.4, 0.2, 0.3)
    )
    assert found["attention_kl"] == found["big/attention_kl"] == 0.75
    assert "other/attention_kl" not in found


def test_where_nothing_was_compared_there_is_nothing_to_tell() -> None:
    nothing = {name: mean(0.0, 0) for name in teacher("big", 0.8, 0.6, 0.5)}
    running = {"cos_running": mean(0.0, 0), "cos_shuffled_running": mean(0.0, 0)}
    told = {"ce": mean(6.0, 4), "big/kl": mean(1.0, 4)}
    assert summarize(nothing | running | told) == {"ce": 1.5, "kl": 0.25}


def test_one_part_alone_is_its_own_mean() -> None:
    only = {
        name.removesuffix("_v") + "_o": value
        for name, value in teacher("big", 0.8, 0.6, 0.5).items()
        if name.endswith("_v")
    }
    found = summarize({"ce": mean(6.0, 4)} | only)
    assert found == pytest.approx(
        {
            "ce": 1.5,
            "kv": 0.5,
            "cos_sim": 0.6,
            "cos_o": 0.6,
            "cos_shuffled": 0.5,
            "alignment_gap": 0.1,
            "dir_loss": 0.4,
            "mag_loss": 0.3,
            "mag_ratio": 3.0,
        },
        rel=TOL["float32"],
    )
    layers = summarize_layers({"big/cka_o": jnp.array([0.5, 0.25])})
    assert layers == ({"cka": 0.375}, {"big/cka_o": [0.5, 0.25]})


LAYERS = {
    "big/cka_k": jnp.array([0.5, 0.25]),
    "big/cka_v": jnp.array([0.75, 1.0]),
    "big/attention_cos": jnp.array([0.25, 0.75]),
}


def test_layers_of_one_teacher_are_listed_and_averaged() -> None:
    found = summarize_layers(LAYERS)
    assert found.values == {"cka": 0.625, "attention_cos": 0.5}
    assert found.layers == {
        "big/cka_k": [0.5, 0.25],
        "big/cka_v": [0.75, 1.0],
        "big/attention_cos": [0.25, 0.75],
    }
    assert all(type(value) is float for value in found.values.values())
    assert all(type(value) is float for row in found.layers.values() for value in row)
    assert summarize_layers({}) == ({}, {})


def test_layers_of_several_teachers_are_averaged_and_told_apart() -> None:
    # A mean of teachers, not of layers: one layer of this one weighs as much as two of the other.
    other = {"other/cka_k": jnp.array([0.125]), "other/cka_v": jnp.array([0.375])}
    found = summarize_layers(LAYERS | other)
    assert found.values == {
        "cka": (0.625 + 0.25) / 2,
        "attention_cos": 0.5,
        "big/cka": 0.625,
        "big/attention_cos": 0.5,
        "other/cka": 0.25,
    }
    assert found.layers.keys() == LAYERS.keys() | other.keys()
    assert found.layers["other/cka_v"] == [0.375]


def test_a_batch_of_one_has_a_cosine_and_no_gap() -> None:
    nothing = mean(0.0, 0)
    metrics = teacher("big", 0.8, 0.6, 0.5, cos_shuffled_k=nothing, cos_shuffled_v=nothing)
    running = {"cos_running": mean(7.0, 10), "cos_shuffled_running": nothing}
    found = summarize({"ce": mean(1.0, 1)} | metrics | running)
    assert found["cos_sim"] == pytest.approx(0.7, rel=TOL["float32"])
    for name in ("cos_shuffled", "alignment_gap", "gap_running"):
        assert math.isnan(found[name])


def test_without_a_teacher_there_is_only_cross_entropy() -> None:
    assert summarize({"ce": mean(3.0, 2)}) == {"ce": 1.5}
    assert math.isnan(summarize({"ce": mean(0.0, 0)})["ce"])
    assert summarize({}) == {}
