"""The LM head's benchmark compares equal losses and gradients, with and without prompts."""

import pytest

from kava_jax.bench import ce, peers, timing
from kava_jax.errors import KavaError

TOY = ce.Sizes(rows=2, length=24, width=8, vocabulary=400, square=16)


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


def test_the_figures_of_the_head_fit_together() -> None:
    found = ce.bench_ce(TOY)
    assert found["product_flops_per_second"] > 0
    positions = {"all": 2 * 24, "answers": 2 * 12}
    assert set(found["cases"]) == set(positions)
    for name, own in found["cases"].items():
        medians = {side: seconds["median"] for side, seconds in own["seconds"].items()}
        assert own["time_of_naive"] == pytest.approx(medians["kava"] / medians["naive"])
        assert own["times_ours"]["naive"] == pytest.approx(medians["naive"] / medians["kava"])
        needed = own["temporary_bytes"]
        assert needed["naive"] >= 4 * 2 * 24 * 400
        assert own["temporaries_of_naive"] == needed["kava"] / needed["naive"] > 0
        assert own["floor_flops"] == 6 * positions[name] * 8 * 400
        seconds = own["floor_flops"] / found["product_flops_per_second"]
        assert own["share_of_floor"] == pytest.approx(seconds / medians["kava"])


def test_a_naive_form_that_gives_other_numbers_is_not_timed(monkeypatch) -> None:
    real = ce._naive
    monkeypatch.setattr(ce, "_naive", lambda head, *rest: 1.0001 * real(head, *rest))
    monkeypatch.setattr(ce, "product_speed", lambda width: 1.0)
    monkeypatch.setattr(peers, "alternate", lambda work: pytest.fail("was timed"))
    with pytest.raises(KavaError, match=r"naive differs from ours by .*other work"):
        ce.bench_ce(TOY)
