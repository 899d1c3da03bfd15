"""From sums and counts to numbers, by hand."""

import math

import jax.numpy as jnp
import pytest

from kava_jax.geometry import Mean
from kava_jax.training.summary import summarize
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


def test_baselines_of_the_held_out_evaluation_pass_through() -> None:
    more = {
        f"{name}_{part}": mean(value, 10)
        for part in "kv"
        for name, value in (("cos_constant", 4.0), ("cos_centered", 2.0))
    }
    found = summarize({"ce": mean(1.0, 1)} | teacher("big", 0.8, 0.6, 0.5, **more))
    assert found["cos_constant"] == pytest.approx(0.4, rel=TOL["float32"])
    assert found["cos_centered"] == pytest.approx(0.2, rel=TOL["float32"])


def test_several_teachers_are_averaged_and_told_apart() -> None:
    found = summarize(
        {"ce": mean(6.0, 4)} | teacher("big", 0.8, 0.6, 0.5) | teacher("other", 0.4, 0.2, 0.3)
    )
    want = {
        "cos_sim": 0.5,
        "cos_k": 0.6,
        "cos_v": 0.4,
        "cos_shuffled": 0.4,
        "alignment_gap": 0.1,
        "big/cos_sim": 0.7,
        "big/alignment_gap": 0.2,
        "other/cos_sim": 0.3,
        "other/alignment_gap": 0.0,
    }
    assert {name: found[name] for name in want} == pytest.approx(want, abs=TOL["float32"])
    assert sorted(name for name in found if "/" in name) == sorted(n for n in want if "/" in n)


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
