"""The loop: what happens when, and a resumed run that is the uninterrupted one, bit for bit."""

import json
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.config.run import TrainConfig
from kava_jax.data.batches import BatchStream
from kava_jax.errors import PreemptedError, StoppedError
from kava_jax.geometry import Mean
from kava_jax.journal import lines as lines_module
from kava_jax.journal.checkpoint import Checkpoints, abstract_state
from kava_jax.journal.lines import Lines
from kava_jax.journal.monitor import Monitor
from kava_jax.journal.skips import SkipLog
from kava_jax.runs.loop import run_steps
from kava_jax.runs.preemption import AskedToEndError, Preemption, listening
from kava_jax.runs.profiling import PROFILE_NAME, Profile
from kava_jax.training.optimizer import learning_rate, make_optimizer
from kava_jax.training.probe import make_probe
from kava_jax.training.step import Skips, make_train_step
from kava_jax.training.summary import Figures
from tests.training.small import jitted, one_device, rows, setting, start

STEPS = 6
RATES = {
    "student": learning_rate(1e-2, STEPS, warmup_steps=2),
    "projector": learning_rate(3e-2, STEPS, warmup_steps=2),
}
OPTIMIZER = make_optimizer(RATES, weight_decay=0.1, clip_norm=1.0, b2=0.95)


@pytest.fixture(scope="module")
def made():
    return setting(dropout=0.3)


@pytest.fixture(scope="module")
def step(made):
    return jitted(
        make_train_step(made.objective, OPTIMIZER, kv_weight=made.kv_weight, microbatches=2)
    )


class Record:
    """The metrics and evaluations of every step, as they came."""

    def __init__(self, step):
        self.metrics, self.evaluated, self._step = {}, [], step

    def step(self, state, teachers, batch, taken=None):
        new, metrics = (taken or self._step)(state, teachers, batch)
        self.metrics[int(state.step)] = jax.device_get(metrics)
        return new, metrics

    def evaluate(self, state, number: int) -> Figures:
        assert int(state.step) == number
        self.evaluated.append(number)
        loss = float(state.params["student"]["final_norm"]["scale"].sum())
        return Figures({"eval_loss": loss}, {"big/cka_k": [loss, 1.0]})


class Silent(Preemption):
    """Hears no signal, so that the tests' own handlers stay."""

    def begin(self) -> None:
        pass


def train(
    directory: Path,
    made,
    step,
    *,
    until: int,
    probe=None,
    measuring_step=None,
    share_every: int | None = None,
    preemption: Preemption | None = None,
    profiled: tuple[int, int] | None = None,
    evaluated: bool = True,
) -> tuple:
    """Start, or continue from the newest checkpoint, as a run does."""
    stream = BatchStream(rows(11), batch_size=4, max_length=12, seed=1, bucket=12, sink_tokens=2)
    state = start(made, OPTIMIZER)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    record = Record(step)
    with Checkpoints(directory, max_to_keep=2) as checkpoints:
        if checkpoints.steps():
            state = checkpoints.restore(checkpoints.steps()[-1], abstract_state(state, places))
        with Monitor(directory, total_steps=STEPS, start_step=int(state.step)) as monitor:
            state, evaluation = run_steps(
                state,
                step=record.step,
                measuring_step=measuring_step and partial(record.step, taken=measuring_step),
                probe=probe,
                teachers=made.teachers,
                stream=stream,
                evaluate=record.evaluate,
                checkpoints=checkpoints,
                monitor=monitor,
                mesh=one_device(),
                rates=RATES,
                settings=TrainConfig(
                    steps=until,
                    log_every=2,
                    eval_every=4,
                    checkpoint_every=3,
                    diagnose_every=None if probe is None else 5,
                    max_consecutive_skips=2,
                ),
                share_every=share_every,
                preemption=preemption or Silent(),
                profile=Profile(directory, profiled),
                evaluated=evaluated,
            )
    with Checkpoints(directory, max_to_keep=2) as checkpoints:
        kept = checkpoints.steps()
    return state, evaluation, record, kept


def lines(directory: Path) -> list[dict]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        for timed in ("step_seconds", "tokens_per_second", "probe_seconds", "probe_share_of_time"):
            assert line.pop(timed, 1.0) > 0
    return found


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, made, step) -> None:
    whole, evaluation, record, kept = train(tmp_path / "whole", made, step, until=STEPS)
    assert sorted(record.metrics) == list(range(STEPS))
    assert record.evaluated == [0, 4, 6]
    assert kept == [3, 6]
    assert int(whole.step) == STEPS
    train(tmp_path / "parts", made, step, until=3)
    again, second, resumed, kept = train(tmp_path / "parts", made, step, until=STEPS)
    assert sorted(resumed.metrics) == [3, 4, 5]
    assert resumed.evaluated == [4, 6]  # a resumed run does not evaluate its beginning again
    assert kept[-2:] == [3, 6]
    assert second == evaluation
    for number, metrics in resumed.metrics.items():
        jax.tree.map(np.testing.assert_array_equal, metrics, record.metrics[number])
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(left, right)
    logged = lines(tmp_path / "whole")
    assert [(line["step"], line["kind"]) for line in logged] == [
        (0, "eval"),
        (2, "train"),
        (4, "train"),
        (4, "eval"),
        (6, "train"),
        (6, "eval"),
    ]
    assert [line for line in lines(tmp_path / "parts") if line["step"] > 3] == [
        line for line in logged if line["step"] > 3
    ]
    by_step = {line["step"]: line for line in logged if line["kind"] == "train"}
    # The rates are those of the step just taken: the second step has number 1.
    assert by_step[2]["lr_student"] == pytest.approx(1e-2 * 2 / 3)
    assert by_step[6]["lr_projector"] == pytest.approx(float(RATES["projector"](5)))


@pytest.mark.long
def test_what_is_measured_along_the_way_resumes_exactly(tmp_path: Path) -> None:
    """Running means and a measured share: all of them in the state and its file."""
    made = setting(center="running", kv_weight=1.0)
    known = {"kv_weight": made.kv_weight, "microbatches": 2}
    step = jitted(make_train_step(made.objective, OPTIMIZER, **known))
    measuring = jitted(make_train_step(made.objective, OPTIMIZER, **known, share=0.2))
    probe = jitted(make_probe(made.objective, **known))
    measured = {"probe": probe, "measuring_step": measuring, "share_every": 3}
    whole, _, record, _ = train(tmp_path / "whole", made, step, until=STEPS, **measured)
    train(tmp_path / "parts", made, step, until=3, **measured)
    again, _, resumed, _ = train(tmp_path / "parts", made, step, until=STEPS, **measured)
    assert sorted(resumed.metrics) == [3, 4, 5]
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(left, right)
    assert whole.statistics
    assert float(whole.kv_scale.value) not in (0.0, 1.0)
    # Looked at before steps 0 and 5; measured in 0, 3 and, being early, 1 and 2.
    for directory in ("whole", "parts"):
        probes = [line for line in lines(tmp_path / directory) if line["kind"] == "diagnostics"]
        assert [line["step"] for line in probes] == [0, 5]
    weights = [float(metrics["kv_weight"].value) for metrics in record.metrics.values()]
    assert len(set(weights)) == 4
    assert weights[3] == weights[4] == weights[5]  # only looking changes nothing


def test_a_finished_run_only_evaluates(tmp_path: Path, made, step) -> None:
    _, first, _, _ = train(tmp_path, made, step, until=2)
    state, evaluation, record, kept = train(tmp_path, made, step, until=2)
    assert record.metrics == {}
    assert record.evaluated == [2]
    assert evaluation == first
    assert kept == [2]
    assert int(state.step) == 2


def test_steps_really_differ(tmp_path: Path, made, step) -> None:
    _, _, record, _ = train(tmp_path, made, step, until=3)
    values = [float(metrics["loss"].value) for metrics in record.metrics.values()]
    assert len(set(values)) == 3
    assert optax.tree.norm(made.params) > 0


def poisoned(step, numbers):
    """The step, with teachers of NaN at some steps."""

    def run(state, teachers, batch):
        bad = int(state.step) in numbers
        return step(state, jax.tree.map(lambda x: x * np.nan, teachers) if bad else teachers, batch)

    return run


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(tmp_path, made, step, capsys):
    state, _, record, _ = train(tmp_path, made, poisoned(step, {1, 4}), until=STEPS)
    assert [int(metrics["skipped"].sum) for metrics in record.metrics.values()] == [
        0,
        1,
        1,
        1,
        2,
        2,
    ]
    assert (int(state.step), int(state.skips.total), int(state.skips.in_a_row)) == (6, 2, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    skipped = [line for line in lines(tmp_path) if line["kind"] == "skipped"]
    stream = BatchStream(rows(11), batch_size=4, max_length=12, seed=1, bucket=12, sink_tokens=2)
    assert skipped == [
        {"step": number + 1, "kind": "skipped", "rows": stream.row_indices(number).tolist()}
        for number in (1, 4)
    ]
    assert "warning at step 2: loss or gradient is not finite" in capsys.readouterr().err
    # A skipped step is none to the optimizer: the sixth step is its fourth.
    logged = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert logged[-1]["lr_student"] == pytest.approx(float(RATES["student"](3)))
    assert logged[0]["step"] == 2  # itself skipped: it would have been the second
    assert logged[0]["lr_student"] == pytest.approx(float(RATES["student"](1)))


def test_too_many_in_a_row_stop_the_run_with_its_checkpoint_whole(tmp_path, made, step):
    words = r"not finite for 2 steps in a row, up to step 5 \(train.max_consecutive_skips\)"
    with pytest.raises(StoppedError, match=words):
        train(tmp_path, made, poisoned(step, {3, 4, 5}), until=STEPS)
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.newest_intact(print) == 3
    train(tmp_path, made, step, until=STEPS)  # the cause is gone: it goes on
    train(tmp_path / "whole", made, step, until=STEPS)
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_run_that_is_asked_to_end_saves_and_goes_on_exactly(tmp_path, made, step):
    class Asked(Silent):
        moments = 0

        def asked(self) -> bool:
            self.moments += 1
            return self.moments == 2

    with pytest.raises(PreemptedError, match="saved at step 2; the same command goes on"):
        train(tmp_path / "parts", made, step, until=STEPS, preemption=Asked())
    train(tmp_path / "parts", made, step, until=STEPS)
    train(tmp_path / "whole", made, step, until=STEPS)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_an_evaluation_can_be_cut_short_and_is_made_up_for(tmp_path, made, step, monkeypatch):
    """Asked to end between two batches of the evaluation at step 4."""
    evaluate = Record.evaluate

    def cut_short(self, state, number: int) -> Figures:
        if number == 4:
            raise AskedToEndError
        return evaluate(self, state, number)

    monkeypatch.setattr(Record, "evaluate", cut_short)
    with pytest.raises(PreemptedError, match="saved at step 4; the same command goes on"):
        train(tmp_path / "parts", made, step, until=STEPS)
    monkeypatch.undo()
    assert lines(tmp_path / "parts")[-1]["step"] == 4
    _, _, record, _ = train(tmp_path / "parts", made, step, until=STEPS, evaluated=False)
    assert record.evaluated == [4, STEPS]
    train(tmp_path / "whole", made, step, until=STEPS)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_asked_again_before_another_step_the_checkpoint_is_named(tmp_path, made, step):
    class AtOnce(Silent):
        def asked(self) -> bool:
            return True

    def evaluate(self, state, number: int) -> Figures:
        raise AskedToEndError

    with pytest.raises(PreemptedError, match="saved at step 1; "):
        train(tmp_path, made, step, until=STEPS, preemption=AtOnce())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "evaluate", evaluate)
        words = "nothing done since the checkpoint at step 1; the same command goes on there"
        with pytest.raises(PreemptedError, match=words):
            train(tmp_path, made, step, until=STEPS, evaluated=False)


def test_asked_before_the_first_step_nothing_is_saved(tmp_path, made, step, monkeypatch):
    def cut_short(self, state, number: int) -> Figures:
        raise AskedToEndError

    monkeypatch.setattr(Record, "evaluate", cut_short)
    with pytest.raises(PreemptedError, match="before the first step, nothing to save"):
        train(tmp_path, made, step, until=STEPS)
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.steps() == []


@pytest.mark.parametrize(("ready", "written"), [(False, [0, 0, 2, 2]), (True, [0, 2, 2, 4])])
def test_the_host_does_not_wait_for_a_line(monkeypatch, tmp_path, ready: bool, written: list[int]):
    """A line is written when its numbers are there, at the latest when the next one is due."""
    monkeypatch.setattr(lines_module, "_ready", lambda metrics: ready)
    stream = BatchStream(rows(11), batch_size=4, max_length=12, bucket=12, sink_tokens=2)
    zero = jnp.zeros((), jnp.int32)
    metrics = {name: Mean(jnp.zeros(()), jnp.ones(())) for name in ("loss", "skipped")}
    with Monitor(tmp_path, total_steps=STEPS) as monitor:
        skips = SkipLog(Skips(zero, zero), max_consecutive_skips=2, stream=stream, monitor=monitor)
        late = Lines(0, monitor, skips, RATES, STEPS)
        seen = []
        for done in range(1, 6):
            late.step(done, metrics, tokens=10)
            if done % 2 == 0:
                late.add(done, metrics)
            if done > 1:
                seen.append(max([line["step"] for line in lines(tmp_path)], default=0))
        assert seen == written
        late.settle()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_a_first_step_that_is_skipped_has_the_first_rate(tmp_path):
    stream = BatchStream(rows(11), batch_size=4, max_length=12, bucket=12, sink_tokens=2)
    zero, one = jnp.zeros((), jnp.int32), jnp.ones(())
    with Monitor(tmp_path, total_steps=STEPS) as monitor:
        skips = SkipLog(Skips(zero, zero), max_consecutive_skips=2, stream=stream, monitor=monitor)
        late = Lines(0, monitor, skips, RATES, STEPS)
        metrics = {"loss": Mean(jnp.nan * one, one), "skipped": Mean(one, one)}
        late.step(1, metrics, tokens=10)
        late.add(1, metrics)
        late.settle()
    (line,) = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert line["lr_student"] == pytest.approx(float(RATES["student"](0)))


@pytest.fixture
def heard(request):
    """A signal that is not ignored, as SIGHUP is where the tests run under nohup."""
    found = signal.getsignal(request.param)
    if found is signal.SIG_IGN:
        signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, found)


@pytest.mark.parametrize("heard", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], indirect=True)
def test_from_the_first_step_on_a_signal_asks_and_a_second_one_ends(heard):
    before = signal.getsignal(heard)
    with listening() as preemption:
        assert signal.getsignal(heard) is before
        preemption.begin()
        assert not preemption.asked()
        signal.raise_signal(heard)
        assert preemption.asked()
        assert signal.getsignal(heard) is signal.SIG_DFL
    assert signal.getsignal(heard) is before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as preemption:
            preemption.begin()
            signal.raise_signal(signal.SIGHUP)
            assert not preemption.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_few_steps_are_traced_and_nothing_else_changes(tmp_path, made, step):
    traced, _, _, _ = train(tmp_path / "traced", made, step, until=3, profiled=(2, 9))
    plain, _, _, _ = train(tmp_path / "plain", made, step, until=3)
    assert list((tmp_path / "traced" / PROFILE_NAME).rglob("*.xplane.pb"))
    assert not (tmp_path / "plain" / PROFILE_NAME).exists()
    jax.tree.map(np.testing.assert_array_equal, traced, plain)
