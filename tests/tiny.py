"""A whole workspace small enough for tests: teacher, student, data and config, and `kava` itself.

Paths inside are relative, so that a workspace can be copied and everything in it still fits.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import yaml
from flax.traverse_util import unflatten_dict

from kava_jax.cli import main
from kava_jax.data.problems import word_problems
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.export import export_model
from kava_jax.hf.names import parameter_shapes

# For several processes: Gloo, which joins them, mixes up the collectives of the depth-first order
# that conftest sets for the virtual devices of one process.
JOINED = {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(
        "--xla_cpu_enable_concurrency_optimized_scheduler=false", ""
    )
}
GEOMETRY: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
CONFIG: dict[str, Any] = {
    "run": {"name": "tiny", "dir": "run"},
    "teachers": [{"name": "big", "path": "teacher"}],
    "student": {"path": "student"},
    "data": {"path": "data.jsonl", "eval_rows": 8, "max_length": 64, "batch_size": 8},
    "train": {"steps": 2, "log_every": 1, "checkpoint_every": 1},
    "eval": {"max_new_tokens": 4, "batch_size": 8},
}


class Ended(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def kava(capsys, *arguments: str) -> Ended:
    """The real command line in this process."""
    capsys.readouterr()
    with mock.patch.object(sys, "argv", ["kava", *arguments]):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ended(code, *capsys.readouterr())


def write_model(directory: Path, *, seed: int = 0, tokenizer: Any = None, **geometry: Any) -> Path:
    """A random model as a Hugging Face directory with the built-in (or another) tokenizer."""
    spec = spec_from_config(GEOMETRY | geometry, where="tiny")
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(spec)
    flat = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in shapes.items()}
    export_model(
        directory,
        unflatten_dict(flat, sep="/"),
        spec,
        dtype="float32",
        tokenizer=tokenizer or builtin_tokenizer(),
        card="tiny",
    )
    return directory


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    """Generated problems as a JSONL file in GSM8K's format."""
    problems = word_problems("train", seed, rows)
    lines = [json.dumps({"question": row.prompt, "answer": row.answer}) for row in problems]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_config(path: Path, **sections: Any) -> Path:
    """``CONFIG`` with whole sections replaced, as YAML."""
    path.write_text(yaml.safe_dump(CONFIG | sections))
    return path


def write_workspace(directory: Path) -> Path:
    """``teacher`` of 3 layers, ``student`` of 2, ``data.jsonl`` and ``tiny.yaml``."""
    write_model(directory / "teacher", seed=1, num_hidden_layers=3)
    write_model(directory / "student", seed=2)
    write_rows(directory / "data.jsonl", 88)
    write_config(directory / "tiny.yaml")
    return directory


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every file below ``directory`` with its bytes, every folder with None."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }
