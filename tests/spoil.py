"""Ways to spoil a workspace of ``tests.tiny``, for the table of bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.tiny import GEOMETRY, write_config, write_rows
from tests.tiny_models import write_tokenizer

Arrange = Callable[[Path], object]


def config(text: str) -> Arrange:
    """Replace the config file by this text."""
    return lambda workspace: (workspace / "tiny.yaml").write_text(text)


def append(line: bytes) -> Arrange:
    """One more line in the data file."""

    def arrange(workspace: Path) -> None:
        with (workspace / "data.jsonl").open("ab") as file:
            file.write(line)

    return arrange


def geometry(**keys: object) -> Arrange:
    """Change the teacher's config.json."""

    def arrange(workspace: Path) -> None:
        path = workspace / "teacher" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return arrange


def break_tensors(workspace: Path) -> None:
    """Two tensors missing, one that nobody expects, one of another shape."""
    path = workspace / "teacher" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((7, 16), np.float32)
    save_file(tensors, path)


def only_pickle(workspace: Path) -> None:
    (workspace / "teacher" / "model.safetensors").rename(workspace / "teacher/pytorch_model.bin")


def truncate_weights(workspace: Path) -> None:
    path = workspace / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def larger_tokenizer(workspace: Path) -> None:
    path = workspace / "student" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    extra = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": 512, "content": "<new>", "special": True} | extra)
    path.write_text(json.dumps(tokenizer))


def other_vocabulary(workspace: Path) -> None:
    write_tokenizer(workspace / "teacher")


def other_weights(workspace: Path) -> None:
    path = workspace / "teacher" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_row(workspace: Path) -> None:
    write_rows(workspace / "data.jsonl", 88, seed=1)


def no_checkpoints(workspace: Path) -> None:
    shutil.rmtree(workspace / "run" / "checkpoints")
    (workspace / "run" / "checkpoints").mkdir()


def foreign_folder(workspace: Path) -> None:
    (workspace / "elsewhere").mkdir()
    (workspace / "elsewhere" / "thesis.txt").write_text("years of work")


def fresh_student(workspace: Path) -> None:
    write_config(workspace / "tiny.yaml", teachers=[], student={"geometry": GEOMETRY})


def two_teachers(workspace: Path) -> None:
    both = [{"name": "big", "path": "teacher"}, {"name": "big", "path": "student"}]
    write_config(workspace / "tiny.yaml", teachers=both)
