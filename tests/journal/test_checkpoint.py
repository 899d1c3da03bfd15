"""Checkpoints: bit for bit, on another mesh too, the last few and the best."""

import errno
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from kava_jax.errors import KavaError, StoppedError
from kava_jax.geometry import Mean
from kava_jax.journal import orbax_items
from kava_jax.journal.checkpoint import Checkpoints, abstract_state
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import matching_shardings
from kava_jax.training.objective import Statistics
from kava_jax.training.optimizer import make_optimizer
from kava_jax.training.step import LossScale, Skips, TrainState, initial_state
from tests.tiny import contents
from tests.training.small import one_device, setting

RATE = optax.constant_schedule(1e-3)
OPTIMIZER = make_optimizer(
    dict.fromkeys(("student", "projector"), RATE),
    weight_decay=0.1,
    clip_norm=1.0,
    b2=0.95,
)


def full_state(mesh):
    """A state with noise in every moment, and where it lies."""
    made = setting(mesh, names=("big", "other"), center="running")
    abstract = jax.eval_shape(lambda: initial_state(made.params, OPTIMIZER, made.statistics))
    places = matching_shardings(abstract, made.shardings, mesh)
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.normal(size=leaf.shape) * 10
        return np.asarray(values, leaf.dtype)

    state = jax.tree.map(draw, abstract)._replace(step=np.asarray(7, np.int32))
    return jax.device_put(state, places), places


def small_state(step: int) -> TrainState:
    params = {"x": jnp.full((3,), float(step))}
    none: Statistics = {}
    scale = LossScale(jnp.ones(()), Mean(jnp.zeros(()), jnp.zeros(())))
    number, skips = jnp.asarray(step, jnp.int32), Skips(jnp.int32(0), jnp.int32(0))
    return TrainState(number, jnp.uint32(0), params, {}, {}, none, scale, skips)


def assert_bitwise(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_state_comes_back_bit_for_bit_on_this_mesh_and_on_another(tmp_path: Path) -> None:
    state, places = full_state(make_mesh(1, 8, 1))
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        checkpoints.save(state, None)
    other, moved = full_state(make_mesh(2, 2, 2))
    single, alone = full_state(one_device())
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.steps() == [7]
        for target, where in ((state, places), (other, moved), (single, alone)):
            restored = checkpoints.restore(7, abstract_state(target, where))
            assert_bitwise(restored, state)
            for leaf, sharding in zip(
                jax.tree.leaves(restored), jax.tree.leaves(where), strict=True
            ):
                assert leaf.sharding == sharding


def save_all(directory: Path, losses: dict[int, float | None], keep: int = 2) -> None:
    with Checkpoints(directory, keep) as checkpoints:
        for step, loss in losses.items():
            metrics = None if loss is None else {"eval_loss": loss, "eval_cos_sim": 0.5}
            checkpoints.save(small_state(step), metrics)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save_all(tmp_path, {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: None})
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.choose("last") == 6
        assert checkpoints.choose("best") == 2
        assert checkpoints.choose("5") == 5
        places = jax.tree.map(lambda x: x.sharding, small_state(0))
        restored = checkpoints.restore(2, abstract_state(small_state(0), places))
        assert_bitwise(restored, small_state(2))
        checkpoints.save(small_state(7), {"eval_loss": 0.5})
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [6, 7]
        assert checkpoints.choose("best") == 7


def test_an_evaluation_that_is_added_counts_as_one_that_was_saved(tmp_path: Path) -> None:
    """As Orbax writes it, kept by the same rule, and never added twice."""
    save_all(tmp_path / "at_once", {1: 1.0, 2: 3.0, 3: 2.0, 4: 0.5})
    save_all(tmp_path / "later", {1: 1.0, 2: 3.0, 3: 2.0, 4: None})
    with Checkpoints(tmp_path / "later", 2) as checkpoints:
        assert checkpoints.steps() == [1, 3, 4]
        for loss in (float("nan"), 0.5, 9.0):
            checkpoints.score(4, {"eval_loss": loss, "eval_cos_sim": 0.5})
        checkpoints.score(7, {"eval_loss": 0.1})  # there is no such step
    found = []
    for name in ("at_once", "later"):
        with Checkpoints(tmp_path / name, 2, read_only=True) as checkpoints:
            found.append((checkpoints.steps(), checkpoints.choose("best")))
    assert found == [([3, 4], 4)] * 2
    written = [tmp_path / name / "checkpoints/4/metrics/metrics" for name in ("at_once", "later")]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_saving_leaves_the_question_whether_to_stop_to_preemption(tmp_path, monkeypatch):
    """JAX keeps one count: another caller's number would put the moment to stop into the past."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        checkpoints.save(small_state(1), None)
        checkpoints.save(small_state(2), {"eval_loss": 1.0})
        checkpoints.wait()
    assert asked == []


def test_saving_a_step_twice_does_nothing(tmp_path: Path) -> None:
    save_all(tmp_path, {1: None})
    with Checkpoints(tmp_path, 2) as checkpoints:
        changed = small_state(1)._replace(params={"x": jnp.zeros(3)})
        checkpoints.save(changed, {"eval_loss": 1.0})
        places = jax.tree.map(lambda x: x.sharding, changed)
        restored = checkpoints.restore(1, abstract_state(changed, places))
    assert_bitwise(restored, small_state(1))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path / "run", 2) as checkpoints,
        pytest.raises(KavaError, match=r"run/checkpoints holds none; train"),
    ):
        checkpoints.choose("last")
    save_all(tmp_path / "run", {1: None, 2: None})
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        with pytest.raises(KavaError, match=r"none in run/checkpoints was evaluated; use last"):
            checkpoints.choose("best")
        for which in ("3", "-1", "newest"):
            with pytest.raises(KavaError, match=f"'{which}' does not exist; .*one of 1, 2"):
                checkpoints.choose(which)


def restored(directory: Path, step: int) -> TrainState:
    places = jax.tree.map(lambda x: x.sharding, small_state(0))
    with Checkpoints(directory, 2) as checkpoints:
        return checkpoints.restore(step, abstract_state(small_state(0), places))


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flipped bit": (flip_a_bit, "has changed since it was written"),
    "cut short": (cut_short, "has changed since it was written"),
    "lost file": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_said_put_aside_and_the_one_before_is_used(
    tmp_path: Path, kind: str
) -> None:
    spoil, words = DAMAGES[kind]
    save_all(tmp_path, {1: None, 2: None})
    spoil(largest_file(tmp_path / "checkpoints" / "2" / "default"))
    before = contents(tmp_path / "checkpoints" / "2")
    with pytest.raises(KavaError, match=rf"checkpoint=2: .*/2 is damaged \(.* {words}\); use .* 1"):
        restored(tmp_path, 2)
    said: list[str] = []
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.newest_intact(said.append) == 1
        assert checkpoints.steps() == [1]
        checkpoints.save(small_state(2), None)  # its place is free again
    assert_bitwise(restored(tmp_path, 2), small_state(2))
    assert len(said) == 1
    assert re.fullmatch(
        rf"checkpoint 2 is damaged \(.* {words}\); it is in checkpoints_damaged/ now, and the run "
        r"goes on from step 1",
        said[0],
    )
    assert contents(tmp_path / "checkpoints_damaged" / "2") == before  # nothing is deleted


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Orbax alone restores many of them without a word."""
    save_all(tmp_path, {1: None})
    files = [p for p in (tmp_path / "checkpoints" / "1" / "default").rglob("*") if p.is_file()]
    assert len(files) > 3
    for path in files:
        if path.name == "commit_success.txt":  # Orbax's marker: that it is there is all it says
            continue
        whole = path.read_bytes()
        flip_a_bit(path)
        with pytest.raises(KavaError, match=r"checkpoint=1: .* is damaged"):
            restored(tmp_path, 1)
        path.write_bytes(whole)
    assert_bitwise(restored(tmp_path, 1), small_state(1))


def test_where_none_is_intact_nothing_is_moved(tmp_path: Path) -> None:
    save_all(tmp_path, {1: None, 2: None})
    for step in ("1", "2"):
        flip_a_bit(largest_file(tmp_path / "checkpoints" / step / "default"))
    before = contents(tmp_path)
    with (
        Checkpoints(tmp_path, 2) as checkpoints,
        pytest.raises(KavaError, match=r"none of the checkpoints 1, 2 is intact .*2: .*; restore"),
    ):
        checkpoints.newest_intact(print)
    assert contents(tmp_path) == before


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the write of digests fails, in Orbax's own thread."""
    save_all(tmp_path, {1: None})

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(orbax_items, "write_digests", full)
    words = r"no space is left on the disk.*earlier ones are whole"
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(small_state(2), None)
        with pytest.raises(StoppedError, match=words):
            checkpoints.wait()
    monkeypatch.undo()
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.newest_intact(print) == 1
    assert_bitwise(restored(tmp_path, 1), small_state(1))


def test_a_process_that_does_not_take_part_is_named(tmp_path: Path, monkeypatch) -> None:
    """Orbax hides the runtime's words behind a TimeoutError of its own."""

    def write(directory: Path) -> None:
        words = "DEADLINE_EXCEEDED: Barrier timed out. Some timed out task names:\n3\n\nRPC: /x"
        raise TimeoutError("async_write_complete") from RuntimeError(words)

    monkeypatch.setattr(orbax_items, "write_digests", write)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(small_state(1), None)
        with pytest.raises(StoppedError, match=r"checkpoints: process 3 did not take part where"):
            checkpoints.wait()


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    save_all(tmp_path, {1: 2.0, 2: float("nan"), 3: 3.0, 4: float("nan"), 5: None})
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.steps() == [1, 4, 5]
        assert checkpoints.choose("best") == 1


def test_answers_from_a_cache_come_before_the_student_s_own(tmp_path: Path) -> None:
    """A student that does not learn has one loss at every step."""
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step, handed in enumerate((4.0, 3.0, 3.5, 3.2), start=1):
            metrics = {"eval_loss": 2.0, "eval_loss_handed": handed}
            checkpoints.save(small_state(step), metrics)
        assert checkpoints.choose("best") == 2
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 4]
