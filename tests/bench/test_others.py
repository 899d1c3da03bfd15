"""The other benchmarks at toy size: what they count is consistent, whatever the machine's pace."""

import jax
import pytest

from kava_jax.bench import gpu, peers, reading, scaling, startup, teacher, timing
from kava_jax.bench.gpu import Job, bench_gpu
from kava_jax.bench.gpu_worker import CHECKED
from kava_jax.errors import KavaError


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


def test_an_exponent_is_the_slope_of_a_power_law() -> None:
    sizes = (1, 2, 4, 8)
    assert scaling.exponent(sizes, [3.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.exponent(sizes, [7.0] * 4) == pytest.approx(0, abs=1e-12)


def test_scaling_over_every_axis(monkeypatch) -> None:
    monkeypatch.setattr(scaling, "STEPS", 1)
    sizes = scaling.Range(
        lengths=(8, 16),
        depths=(1, 2),
        rows=(8, 16),
        length=8,
        depth=1,
        row=8,
        width=16,
        vocabulary=64,
    )
    curves = scaling.bench_scaling(sizes)["curves"]
    assert set(curves) == {"length", "depth", "rows"}
    # FLOPs of a token do not depend on the rows, and grow with the layers.
    assert curves["rows"]["floor_exponent"] == pytest.approx(0, abs=1e-9)
    one, two = curves["depth"]["flops_per_token"]
    assert one < two
    for curve in curves.values():
        assert len(curve["seconds_per_token"]) == 2
        assert all(seconds > 0 for seconds in curve["seconds_per_token"])


TEACHER = teacher.TeacherSizes((4, 32, 4, 2, 64), (2, 16, 4, 2, 32), 128, rows=8, length=16)


def test_the_cut_teacher_beside_the_whole_one() -> None:
    found = teacher.bench_teacher(TEACHER)
    assert set(found["seconds"]) == {"cut", "half", "whole"}
    assert found["of_whole"]["whole"] == 1
    # Three layers and keys and values of the fourth, against one and the second's.
    assert found["floor_flops"]["half"] < 0.5 * found["floor_flops"]["cut"]


def test_a_public_implementation_gives_the_same_numbers(monkeypatch) -> None:
    pytest.importorskip("tunix", reason="Tunix (the extra bench) is not installed")
    with jax.numpy_rank_promotion("allow"):  # theirs, not ours
        assert "tunix" in teacher.bench_teacher(TEACHER, "tunix")["seconds"]
        monkeypatch.setattr(teacher, "TOLERANCE", -1.0)
        with pytest.raises(KavaError, match=r"tunix differs from ours by .*other work"):
            teacher.bench_teacher(TEACHER, "tunix")


def test_a_peer_of_the_teacher_that_is_unknown_or_missing_is_told(monkeypatch) -> None:
    with pytest.raises(KavaError, match="--peer='torch' is unknown; use tunix, or leave it out"):
        teacher.bench_teacher(TEACHER, "torch")
    monkeypatch.setattr(peers, "PACKAGES", {"absent": "google-tunix"})
    monkeypatch.setattr(teacher, "tunix_forward", lambda *_: peers.peer("absent.models"))
    with pytest.raises(KavaError, match="absent, which is not installed; pip install google-tunix"):
        teacher.bench_teacher(TEACHER, "tunix")


def test_reading_rows_and_weights(monkeypatch) -> None:
    monkeypatch.setattr(reading, "ROWS", 64)
    monkeypatch.setattr(reading, "BATCH", 8)
    monkeypatch.setattr(reading, "BATCHES", 4)
    rows = reading.bench_input()
    assert set(rows["tokens_per_second"]) == {"encode", "batch", "put"}
    weights = reading.bench_import(reading.ModelSizes((2, 32, 8, 8, 64), 128))
    parameters = 128 * 32 + 32 + 2 * (4 * 32 * 32 + 3 * 32 + 3 * 32 * 64 + 2 * 32)
    assert weights["bytes"] == 4 * parameters
    assert weights["times_reading"] > 0


def test_startup_waits_for_a_real_first_step(monkeypatch) -> None:
    monkeypatch.setattr(startup, "ROUNDS", 1)
    monkeypatch.setattr(startup, "LIMIT", 0.2)
    with pytest.raises(KavaError, match="the demo did not come to its first step"):
        startup.bench_startup()


def test_the_gpu_script_at_toy_size() -> None:
    job = Job("toy", CHECKED, CHECKED, 16, rows=(4,), dtype="float32", steps=1)
    found = bench_gpu((job,), ("ours",), budget=300.0)
    assert found["checks"]["mercator"] < 1e-5
    ours = found["jobs"]["toy"]["ours"]
    assert ours["rows"] == 4
    assert ours["tokens_per_second"] == pytest.approx(4 * 16 / ours["step_seconds"])
    assert ours["mfu"] is None  # no such chip


def test_what_fails_on_the_gpu_stands_in_the_result(monkeypatch) -> None:
    monkeypatch.setattr(
        gpu,
        "_worker",
        lambda side, job, limit: (
            {"failed": "too large"} if job.get("rows") == 8 else {"side": side}
        ),
    )
    job = Job("two sizes", {}, {}, 16, rows=(8, 4))
    found = bench_gpu((job,), ("ours", "torch"), budget=300.0)
    assert found["jobs"]["two sizes"]["torch"] == {"side": "torch", "rows": 4}
    none_left = bench_gpu((job,), ("ours",), budget=5.0)
    assert none_left["jobs"]["two sizes"]["ours"] == {"failed": "no time was left"}
    monkeypatch.setattr(gpu, "_worker", lambda *_: {"failed": "bfloat16 is off"})
    with pytest.raises(KavaError, match="the checks before measuring failed: bfloat16 is off"):
        bench_gpu((job,), ("ours",), budget=300.0)
