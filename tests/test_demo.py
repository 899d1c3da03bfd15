"""The demo's road at three steps: both students, all four rows, export and pictures."""

import json
import struct
from pathlib import Path

import pytest

from kava_jax import demo
from kava_jax.config.file import load_config
from kava_jax.errors import KavaError

SHORT = (
    "train.steps=3",
    "train.eval_every=1",
    "train.log_every=1",
    "optimizer.warmup_steps=1",
    "data.rows=64",
    "data.eval_rows=8",
    "eval.max_new_tokens=8",
    "eval.batch_size=8",
)


def _png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", header[16:24])


@pytest.mark.long
def test_three_steps_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_config", lambda path: load_config(path, SHORT))
    result = demo.run_demo(tmp_path, ["kava", "demo"])
    names = [row["model"] for row in result["models"]]
    assert names == [
        "teacher",
        "student before",
        "student, cross-entropy only",
        "student, distilled (KV)",
    ]
    teacher, before, alone, distilled = result["models"]
    # Same start, data and steps; the teacher knows the task and the students hardly moved yet.
    assert teacher["loss"] < 0.1 < distilled["loss"] < before["loss"]
    assert alone["loss"] < before["loss"]
    sizes = [row["parameters"] for row in (before, alone, distilled)]
    assert sizes[0] == sizes[1] == sizes[2] < teacher["parameters"]
    assert result["reimport_identical"]
    assert (Path(result["export"]) / "model.safetensors").is_file()
    assert all(min(_png_size(Path(picture))) > 300 for picture in result["pictures"])
    assert json.loads(json.dumps(result)) == result
    assert result["questions"] == 8


@pytest.mark.long
def test_three_steps_of_each_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "load_config", lambda path: load_config(path, SHORT))
    command = ["kava", "demo", "--handoff"]
    with pytest.raises(KavaError, match="holds no student yet; run `kava demo --out"):
        demo.run_handoff(tmp_path, command)
    demo_result = demo.run_demo(tmp_path, command)
    found = demo.run_handoff(tmp_path, command)
    assert json.loads(json.dumps(found)) == found
    teacher, alone, handed, same, reverse = found["models"]
    assert teacher["eval_loss"] == pytest.approx(demo_result["models"][0]["loss"], rel=1e-6)
    assert teacher["exact_match_strict"] == demo_result["models"][0]["exact_match"]
    assert handed["model"] == "student, from the teacher's cache"
    assert len({row["eval_loss"] for row in found["models"]}) == 5
    # Hardly trained: a good reader's cache does not make up for a poor answerer yet.
    assert teacher["eval_loss"] < min(row["eval_loss"] for row in (alone, handed, same, reverse))
    assert all(row["seconds_per_answer"] > 0 for row in found["models"])
    assert "student, trained on alone" in str(demo.render_handoff(found).columns[0]._cells)
