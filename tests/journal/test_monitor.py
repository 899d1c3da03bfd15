"""The monitor against what a reader of its file, its pipe and its terminal must find."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from kava_jax.errors import KavaError
from kava_jax.journal import monitor as monitor_module
from kava_jax.journal.metrics_file import read_metrics
from kava_jax.journal.monitor import Monitor, shown
from kava_jax.journal.verdict import verdict

METRICS = {
    "loss": 2.5,
    "ce": 2.25,
    "cos_sim": 0.875,
    "cos_shuffled": 0.5,
    "alignment_gap": 0.375,
    "cos_running": 0.75,
    "gap_running": 0.25,
    "mag_ratio": 1.5,
    "mag_loss": 0.25,
    "dir_loss": 0.125,
    "tokens_per_second": 12345.6,
}


def pretend_terminal(monkeypatch, term="xterm-256color"):
    """Called in the test itself: capturing makes a new stderr after the fixtures have run."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(run_dir, steps, *, start_step=0, total_steps=100, metrics=METRICS):
    with Monitor(run_dir, total_steps=total_steps, start_step=start_step) as monitor:
        for step in steps:
            monitor.log(step, metrics)


def test_metrics_are_one_json_object_a_line(tmp_path):
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.log(10, {"loss": 2.5})
        monitor.evaluation(10, {"eval_loss": 2.0, "exact_match_strict": 0.25}, {})
        monitor.log(20, {"loss": 2.25})
    path = tmp_path / "metrics.jsonl"
    assert lines(path) == [
        {"step": 10, "kind": "train", "loss": 2.5},
        {"step": 10, "kind": "eval", "eval_loss": 2.0, "exact_match_strict": 0.25},
        {"step": 20, "kind": "train", "loss": 2.25},
    ]
    assert [record["step"] for record in read_metrics(path, "train")] == [10, 20]
    assert [record["eval_loss"] for record in read_metrics(path, "eval")] == [2.0]


def test_metrics_are_on_disk_before_the_run_ends(tmp_path):
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.log(10, {"loss": 2.5})
        assert lines(tmp_path / "metrics.jsonl")[0]["loss"] == 2.5


def test_what_is_not_finite_is_null_and_said_once(tmp_path, capsys):
    bad = {"loss": float("nan"), "kv": float("inf"), "cos_shuffled": None, "ce": 1.0}
    run(tmp_path, [1, 2], metrics=bad)
    text = capsys.readouterr().err
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    for record in read_metrics(tmp_path / "metrics.jsonl", "train"):
        assert (record["loss"], record["kv"], record["cos_shuffled"]) == (None, None, None)
        assert record["ce"] == 1.0
    assert text.count("warning at step 1: loss is nan") == 1
    assert text.count("warning at step 1: kv is inf") == 1
    assert "warning at step 2" not in text
    assert "cos_shuffled is" not in text


def test_resume_drops_later_steps_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(tmp_path, [10, 20, 30, 40])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 50, "kind": "tr')
    run(tmp_path, [30, 40], start_step=20)
    assert [record["step"] for record in lines(path)] == [10, 20, 30, 40]
    assert path.read_bytes() == whole


def test_resume_drops_diagnostics_that_will_be_taken_again(tmp_path):
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.diagnostics(0, {"kv_gradient_share": 1.0}, {})
        monitor.log(10, {"loss": 2.0})
        monitor.diagnostics(10, {"kv_gradient_share": 0.5}, {})
    with Monitor(tmp_path, total_steps=20, start_step=10) as monitor:
        monitor.diagnostics(10, {"kv_gradient_share": 0.5}, {})
    kinds = [(line["step"], line["kind"]) for line in lines(tmp_path / "metrics.jsonl")]
    assert kinds == [(0, "diagnostics"), (10, "train"), (10, "diagnostics")]


def test_resume_after_the_last_step_drops_only_the_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(tmp_path, [10, 20])
    whole = path.read_bytes()
    # A whole object without its line end: the next line would be glued to it.
    path.write_bytes(whole + b'{"step": 30, "kind": "train"}')
    run(tmp_path, [], start_step=30)
    assert path.read_bytes() == whole


def test_a_start_from_zero_drops_the_earlier_attempt(tmp_path):
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.evaluation(0, {"eval_loss": 3.0}, {})
    run(tmp_path, [10])
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [10]


def test_other_processes_write_and_show_nothing(tmp_path, capfd):
    with Monitor(tmp_path / "run", total_steps=20, write=False) as monitor:
        monitor.log(10, METRICS)
        monitor.evaluation(10, METRICS, {})
        monitor.note("hello")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_everything_for_people_goes_to_stderr(tmp_path, capsys):
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.log(10, METRICS)
        monitor.note("truncated 3 of 100 rows")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 10/20" in captured.err
    assert "truncated 3 of 100 rows\n" in captured.err


def test_plain_lines_have_no_control_characters(tmp_path, capsys):
    run(tmp_path, [10, 20])
    text = capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in text)
    first, second = text.splitlines()
    word = verdict(0.75, 0.5)
    assert first == (
        "step  10/100  loss 2.5000  ce 2.2500"
        f"  cos 0.750 ({word})  gap 0.250  magnitude 1.50  tokens/s 12,346"
    )
    assert second.startswith("step  20/100")


def test_time_left_is_the_pace_since_the_first_log(tmp_path, monkeypatch, capsys):
    times = iter([1000.0, 1020.0])  # two steps a second after the first line
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    run(tmp_path, [10, 50], total_steps=200)
    first, second = capsys.readouterr().err.splitlines()
    assert "left" not in first
    assert second.endswith("left 1m15s")  # 150 steps at 2 a second


def test_a_run_without_teacher_shows_no_cosine():
    assert shown({"loss": 2.5, "ce": 2.5, "tokens_per_second": 100.0}) == [
        ("loss", "2.5000"),
        ("ce", "2.5000"),
        ("tokens/s", "100"),
    ]


def test_the_verdict_is_withdrawn_when_the_gap_says_so():
    fields = dict(shown({"cos_sim": 0.99, "cos_shuffled": 0.985, "alignment_gap": 0.005}))
    assert fields == {"cos": "0.990 (collapsed)", "gap": "0.005"}
    # A batch of one has no shuffled pair: the raw word stands.
    assert dict(shown({"cos_sim": 0.99, "cos_shuffled": None})) == {"cos": "0.990 (Excellent)"}


def test_an_evaluation_shows_every_metric(tmp_path, capsys):
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.evaluation(
            20,
            {
                "eval_loss": 2.0,
                "eval_cos_sim": 0.75,
                "eval_cos_shuffled": 0.25,
                "eval_alignment_gap": 0.5,
                "eval_cos_centered": 0.25,
                "eval_student_rank": 3.5,
                "exact_match_strict": 0.125,
            },
            {"big/cka_k": [0.5, math.nan]},
        )
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["layers"] == {"big/cka_k": [0.5, None]}
    assert line["eval_student_rank"] == 3.5
    assert capsys.readouterr().err == (
        "evaluation at step 20  loss 2.0000  cos 0.750 (Acceptable)  gap 0.500"
        "  centred 0.250  exact match 0.1250\n"
    )


def test_a_collapsed_evaluation_says_by_which_signs(tmp_path, capsys):
    figures = {"eval_cos_sim": 0.99, "eval_cos_shuffled": 0.98, "eval_alignment_gap": 0.01}
    more = {"eval_cos_centered": 0.02, "eval_retrieval": 0.5, "eval_sampled_tokens": 100.0}
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.evaluation(20, figures | more, {})
        monitor.evaluation(20, more | {"eval_cos_sim": 0.9, "eval_cos_shuffled": 0.3}, {})
    _, warning, _ = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning at step 20: collapsed: ")
    assert "0.01" in warning
    assert "0.02" in warning
    assert "retrieved" not in warning


def test_nothing_has_collapsed_before_anything_was_learnt(tmp_path, capsys):
    """At step 0; the same figures are a collapse one step later."""
    layers = {"big/cos_sim_k": [0.9], "big/cos_shuffled_k": [0.9]}
    means = ({"eval_cos_sim": 0.9, "eval_cos_shuffled": 0.9, "eval_alignment_gap": 0.0}, {})
    said = []
    for figures in (means, ({"eval_cos_sim": 0.9}, layers)):
        for step in (0, 1):
            with Monitor(tmp_path, total_steps=20) as monitor:
                monitor.evaluation(step, *figures)
            said.append(capsys.readouterr().err)
    at_0, at_1, layers_at_0, layers_at_1 = said
    assert at_0 == "evaluation at step 0  cos 0.900  gap 0.000\n"
    assert "cos 0.900 (collapsed)" in at_1
    assert "warning at step 1: collapsed: " in at_1
    assert layers_at_0 == "evaluation at step 0  cos 0.900\n"
    assert "warning at step 1: collapsed by layer: big keys of mapped layers 0" in layers_at_1


def test_layers_that_collapsed_are_told_where_the_mean_looks_well(tmp_path, capsys):
    figures = {"eval_cos_sim": 0.9, "eval_cos_shuffled": 0.5, "eval_alignment_gap": 0.4}
    layers = {
        "big/cos_sim_k": [0.98, 0.9, 0.97],
        "big/cos_shuffled_k": [0.97, 0.2, 0.96],
        "big/cos_sim_v": [0.8, 0.9, 0.9],
        "big/cos_shuffled_v": [0.1, 0.1, 0.1],
    }
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.evaluation(20, figures, layers)
        monitor.evaluation(20, figures, {name: row[1:2] for name, row in layers.items()})
    _, warning, _ = capsys.readouterr().err.splitlines()
    assert warning == ("warning at step 20: collapsed by layer: big keys of mapped layers 0, 2")


def test_diagnostics_are_written_and_not_shown(tmp_path, capsys):
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.diagnostics(10, {"kv_gradient_share": 0.25}, {"big/cka_v": [0.5]})
    assert read_metrics(tmp_path / "metrics.jsonl", "diagnostics") == [
        {
            "step": 10,
            "kind": "diagnostics",
            "kv_gradient_share": 0.25,
            "layers": {"big/cka_v": [0.5]},
        }
    ]
    assert capsys.readouterr().err == ""


def test_an_alarm_is_said_when_it_begins_and_not_on_every_line(tmp_path, capsys):
    with Monitor(tmp_path, total_steps=50) as monitor:
        for step, ratio in [(10, 1.0), (20, 3.0), (30, 3.25), (40, 1.0), (50, 2.5)]:
            monitor.log(step, {"mag_ratio": ratio})
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [line.split(":")[0] for line in warnings] == ["warning at step 20", "warning at step 50"]


def test_an_oscillating_direction_loss_is_an_alarm(tmp_path, capsys):
    with Monitor(tmp_path, total_steps=50) as monitor:
        for step in range(1, 11):
            monitor.log(step, {"dir_loss": 0.5 if step % 2 else 0.1})
    assert capsys.readouterr().err.count("oscillates") == 1


def test_a_terminal_gets_a_display_and_notes_above_it(tmp_path, monkeypatch, capsys):
    pretend_terminal(monkeypatch)
    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.log(10, METRICS)
        monitor.note("a note with [brackets]")
        monitor.log(20, METRICS | {"mag_ratio": 3.0})
    text = capsys.readouterr().err
    for expected in ("20/20", "0.750 (Acceptable)", "12,346", "a note with [brackets]", "warning"):
        assert expected in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch, capsys):
    pretend_terminal(monkeypatch, term="dumb")
    run(tmp_path, [10])
    assert "\x1b" not in capsys.readouterr().err


def train_and_fail(run_dir):
    with Monitor(run_dir, total_steps=20) as monitor:
        monitor.log(10, METRICS)
        raise ZeroDivisionError


def test_files_are_closed_and_the_terminal_restored_when_training_fails(
    tmp_path, monkeypatch, capsys
):
    pretend_terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        train_and_fail(tmp_path)
    assert capsys.readouterr().err.rstrip().endswith("\x1b[?25h")
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_tensorboard_gets_every_finite_number(tmp_path):
    from tensorboardX.proto import event_pb2

    with Monitor(tmp_path, total_steps=20) as monitor:
        monitor.log(10, {"loss": 2.5, "kv": float("nan")})
        monitor.evaluation(10, {"eval_loss": 2.0}, {})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, values = path.read_bytes(), {}
    while data:  # TFRecord: length (8 bytes), its checksum (4), record, checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        values |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        data = data[16 + size :]
    assert values == {"train/loss": (10, 2.5), "eval/loss": (10, 2.0)}


def test_reading_metrics_of_a_running_and_of_a_broken_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(KavaError, match="is missing; name"):
        read_metrics(path, "train")
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    assert len(read_metrics(path, "train")) == 1
    path.write_text(
        '{"step": 2, "kind": "train", "loss": 1}\n{"step": 1, "kind": "train"}\n'
        '{"step": 2, "kind": "train", "loss": 3}\n'
    )
    assert [line.get("loss") for line in read_metrics(path, "train")] == [None, 3]
    path.write_text('{"step": 1, "kind": "train"}\n[]\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(KavaError, match="line 2 is not a metrics line"):
        read_metrics(path, "train")
