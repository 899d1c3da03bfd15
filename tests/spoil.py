"""Ways to spoil a workspace of ``tests.tiny``, for the table of bad input."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from kava_jax.journal.checkpoint import Checkpoints
from kava_jax.journal.lock import LOCK_NAME
from kava_jax.runs.reopen import reopen, restore
from tests.tiny import GEOMETRY, write_config, write_rows
from tests.tiny_models import write_tokenizer

Arrange = Callable[[Path], object]


def config(text: str) -> Arrange:
    """Replace the config file by this text."""
    return lambda workspace: (workspace / "tiny.yaml").write_text(text)


def hold(directory: str) -> Arrange:
    """Lock a directory as a command at work there does, until this process ends."""

    def arrange(workspace: Path) -> None:
        place = workspace / directory
        place.mkdir(exist_ok=True)
        descriptor = os.open(place / LOCK_NAME, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    return arrange


def grid_in_use(workspace: Path) -> None:
    """A grid of one run whose directory another command holds."""
    grid = {
        "name": "small",
        "config": "tiny.yaml",
        "seeds": [0],
        "score": "eval_loss",
        "baseline": "ce",
        "contrast": "kv",
        "arms": {"ce": {"teachers": []}, "kv": {"loss.kv_weight": 2}},
    }
    (workspace / "grid.yaml").write_text(yaml.safe_dump(grid))
    hold("grid")(workspace)


def short_eighth_row(workspace: Path) -> None:
    """The only one of eight rows that a calibration is scored on."""
    lines = (workspace / "data.jsonl").read_text().splitlines()
    lines[7] = json.dumps({"question": "1?", "answer": "#### 1"})
    (workspace / "data.jsonl").write_text("\n".join(lines) + "\n")


def long_questions(workspace: Path) -> None:
    """Two rows with questions longer than a row may be."""
    row = {"question": "how many? " * 100, "answer": "#### 1"}
    (workspace / "long.jsonl").write_text(f"{json.dumps(row)}\n" * 2)


def spoil_weight(model: str, value: float) -> Arrange:
    """One number of one tensor of a model's file."""

    def arrange(workspace: Path) -> None:
        path = workspace / model / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, path)

    return arrange


def checkpoint_of_nan(workspace: Path) -> None:
    """A third, whole checkpoint of the run, with one weight that is NaN; its config may go on."""
    run = reopen(workspace / "run")
    state = restore(run)
    norm = state.params["student"]["final_norm"]
    norm["scale"] = norm["scale"].at[2].set(np.nan)
    with Checkpoints(workspace / "run", 9) as checkpoints:
        checkpoints.save(state._replace(step=state.step + 1), None)


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


def cut_record(**changed: object) -> Arrange:
    """The student holds the record of a cut from 3 layers to 2, but for what is changed."""
    record: dict[str, object] = {"teacher": "teacher", "fingerprint": "", "teacher_layers": 3}
    record |= {"layers": [0, 2], "kv_heads": [[0], [1]], **changed}
    return lambda workspace: (
        (workspace / "student" / "kava_cut.json").write_text(json.dumps(record)) and None
    )


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


def other_vocabulary_in_two_files(workspace: Path) -> None:
    """As GPT-2 and the first Qwen kept it; two tokens exchanged."""
    teacher = workspace / "teacher"
    model = json.loads((teacher / "tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / file).unlink()
    (teacher / "vocab.json").write_text(json.dumps(vocabulary))
    (teacher / "merges.txt").write_text("\n".join(merges))


def student_tokenizer_of_another(workspace: Path) -> None:
    write_tokenizer(workspace / "other")


def generation(**keys: object) -> Arrange:
    """Write the student's generation_config.json."""
    return lambda w: (w / "student" / "generation_config.json").write_text(json.dumps(keys))


def differing_head(workspace: Path) -> None:
    path = workspace / "teacher" / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors | {"lm_head.weight": head}, path)


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


def foreign_export(workspace: Path) -> None:
    foreign_folder(workspace)
    (workspace / "elsewhere").rename(workspace / "export")


def dangling_link(workspace: Path) -> None:
    (workspace / "link").symlink_to("nowhere")


def home(workspace: Path) -> None:
    (workspace / "home").mkdir()


def without(name: str) -> Arrange:
    """Take a model's directory away."""
    return lambda workspace: shutil.rmtree(workspace / name)


def grid(workspace: Path) -> None:
    arms = {"kv": {}, "ce": {"teachers": []}}
    content = {"name": "g", "config": "tiny.yaml", "seeds": [0], "baseline": "ce", "arms": arms}
    (workspace / "grid.yaml").write_text(json.dumps(content))


def foreign_tokenizer(workspace: Path) -> None:
    """Words, where transformers reads every qwen2 tokenizer as bytes."""
    write_tokenizer(workspace / "words", words=True)
    student = {"geometry": GEOMETRY, "tokenizer": "words"}
    write_config(workspace / "tiny.yaml", student=student, teachers=[])


def fresh_student(workspace: Path) -> None:
    write_config(workspace / "tiny.yaml", teachers=[], student={"geometry": GEOMETRY})


def misspelt_geometry(workspace: Path) -> None:
    student = {"geometry": GEOMETRY | {"rope_thetta": 1e6}, "tokenizer": "builtin:tokenizer"}
    write_config(workspace / "tiny.yaml", student=student)


def two_teachers(workspace: Path) -> None:
    both = [{"name": "big", "path": "teacher"}, {"name": "big", "path": "student"}]
    write_config(workspace / "tiny.yaml", teachers=both)
