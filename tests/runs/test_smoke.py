"""``--smoke``: the wiring of every shipped config, with tiny models and without its real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from kava_jax.config.file import load_config, parse_config
from kava_jax.config.run import Config
from kava_jax.data.sources import BUILTIN_PROBLEMS
from kava_jax.data.tokenizer import BUILTIN_TOKENIZER
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.known import KNOWN_CONFIGS
from kava_jax.hf.load import read_spec
from kava_jax.runs.smoke import smoke_config
from tests.tiny import CONFIG, contents, kava, write_model, write_rows
from tests.tiny_models import CONFIGS as FAMILIES
from tests.tiny_models import DENSE, each

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Layers and head dims of teacher and student that must be left, worked out by hand.
HUB = {
    "qwen2.5_14b_to_1.5b_gsm8k": ((12, 7), (8, 8)),
    "qwen2.5_14b_to_1.5b_handoff_gsm8k": ((12, 7), (8, 8)),
    "qwen2.5_7b_to_0.5b_gsm8k": ((7, 6), (8, 4)),
    "llama3.2_3b_to_1b_gsm8k": ((7, 4), (8, 4)),
}
# Layers of the tiny teacher, and how many of them the tiny student keeps.
CUT = {
    "qwen2.5_14b_cut_to_24_layers_gsm8k": (2, 1),
    "qwen2.5_7b_cut_to_14_layers_gsm8k": (2, 1),
}
KEPT = (
    "family",
    "num_heads",
    "num_kv_heads",
    "tie_embeddings",
    "qkv_bias",
    "qk_norm",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "vocab_size",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(config: Config) -> list[str]:
    """What the config calls its models: first teacher, then student."""
    return [config.teachers[0].path, str(config.student.path)]


def test_no_config_that_names_hub_models_is_left_out():
    configs = {path.stem: load_config(path) for path in CONFIGS.glob("*.yaml")}
    named = {stem for stem, c in configs.items() if any(t.path.count("/") == 1 for t in c.teachers)}
    assert named == set(HUB) | set(CUT)


@pytest.mark.parametrize("stem", HUB)
def test_structure_is_kept_and_size_is_not(stem, here, capsys):
    config = load_config(CONFIGS / f"{stem}.yaml")
    smoke = smoke_config(config)
    tiny = [read_spec(Path(name)) for name in names(smoke)]
    layers, head_dims = HUB[stem]
    for name, spec in zip(names(config), tiny, strict=True):
        real = spec_from_config(KNOWN_CONFIGS[name], where=name)
        assert {f: getattr(spec, f) for f in KEPT} == {f: getattr(real, f) for f in KEPT}
        assert spec.hidden_size <= 80
    assert tuple(spec.num_layers for spec in tiny) == layers
    assert tuple(spec.head_dim for spec in tiny) == head_dims
    assert smoke.student.tokenizer == BUILTIN_TOKENIZER
    assert smoke.data.path == BUILTIN_PROBLEMS
    assert smoke.loss == config.loss
    assert smoke.projector == config.projector
    said = capsys.readouterr().err
    assert f"using {BUILTIN_TOKENIZER}" in said
    assert f"using {BUILTIN_PROBLEMS}" in said
    assert not config.run.directory.exists()
    assert smoke.run.directory.name == f"{stem}-smoke"


@pytest.mark.parametrize("stem", CUT)
def test_a_student_is_cut_from_the_tiny_teacher(stem, here):
    smoke = smoke_config(load_config(CONFIGS / f"{stem}.yaml"))
    cut = smoke.student.cut
    assert cut is not None
    assert (read_spec(Path(smoke.teachers[0].path)).num_layers, cut.layers) == CUT[stem]
    assert (cut.path, cut.rule) == (None, "middle")


def test_explicit_layer_pairs_shrink_with_the_models(here):
    write_model(here / "deep", num_hidden_layers=24)
    write_model(here / "shallow", num_hidden_layers=12)
    write_rows(here / "data.jsonl", 88)
    pairs = [[2 * layer, layer] for layer in range(12)]
    teacher = {"name": "big", "path": "deep", "layer_map": pairs}
    config = parse_config(CONFIG | {"teachers": [teacher], "student": {"path": "shallow"}})
    smoke = smoke_config(config)
    assert [read_spec(Path(name)).num_layers for name in names(smoke)] == [2, 1]
    assert smoke.teachers[0].layer_map == ((0, 0),)


def test_widths_that_heads_do_not_divide_are_rounded_up(here):
    # 36 // 64 is 0, so 8 is the least width; transformers reads no config of 8 numbers for 9 heads.
    for name in ("deep", "shallow"):
        write_model(here / name, num_attention_heads=9, num_key_value_heads=3, hidden_size=36)
    write_rows(here / "data.jsonl", 88)
    teacher = {"name": "big", "path": "deep"}
    config = parse_config(CONFIG | {"teachers": [teacher], "student": {"path": "shallow"}})
    found = smoke_config(config)
    assert [read_spec(Path(name)).hidden_size % 9 for name in names(found)] == [0, 0]


@pytest.mark.parametrize("family", each(FAMILIES, {"phi4_mini", "qwen3_moe"}))
def test_transformers_reads_what_is_left_of_each_family(family, here):
    """Its configs check themselves: widths over heads, factors of a rope over pairs."""
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(json.dumps(FAMILIES[family]))
    write_rows(here / "data.jsonl", 88)
    student = "model" if family in DENSE else write_model(here / "student")
    raw = CONFIG | {
        "teachers": [{"name": "big", "path": "model"}],
        "student": {"path": str(student), "tokenizer": BUILTIN_TOKENIZER},
    }
    for name in names(smoke_config(parse_config(raw))):
        left, spec = AutoConfig.from_pretrained(name), read_spec(Path(name))
        found = (left.model_type, left.num_attention_heads, left.num_hidden_layers)
        assert found == (spec.family, spec.num_heads, spec.num_layers)


def test_a_named_tokenizer_that_is_missing_is_an_error_and_writes_nothing(here, capsys):
    ended = kava(
        capsys,
        "train",
        str(CONFIGS / "qwen2.5_7b_to_0.5b_gsm8k.yaml"),
        "--smoke",
        "student.tokenizer=./absent",
    )
    assert ended.code == 2
    assert "tokenizer='./absent' does not exist" in ended.err
    assert contents(here) == {}


def smoke(workspace: Path, stem: str, *overrides: str) -> str:
    """The real command in a process of its own, on one device; returns what it said."""
    program = "from kava_jax.cli import main; main()"
    arguments = ["train", str(CONFIGS / f"{stem}.yaml"), "--smoke", *overrides]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=workspace,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def finite_metrics(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(value is not None for line in lines for value in line.values())
    return lines


@pytest.mark.long
def test_one_of_them_end_to_end(tmp_path):
    said = smoke(tmp_path, "llama3.2_3b_to_1b_gsm8k")
    run = tmp_path / "runs" / "llama3.2_3b_to_1b_gsm8k-smoke"
    assert {line["kind"] for line in finite_metrics(run)} == {"train", "eval", "diagnostics"}
    assert {"config.yaml", "manifest.yaml", "checkpoints", "projector.safetensors"} <= set(
        os.listdir(run)
    )
    assert not (tmp_path / "runs" / "llama3.2_3b_to_1b_gsm8k").exists()
    assert "run directory: runs/llama3.2_3b_to_1b_gsm8k-smoke" in said


@pytest.mark.long  # a vocabulary of full size and all rows of the real data
def test_real_text_and_the_real_tokenizer(shared, tmp_path):
    said = smoke(
        tmp_path,
        "qwen2.5_14b_to_1.5b_gsm8k",
        f"data.path={shared / 'data' / 'gsm8k' / 'train.jsonl'}",
        f"student.tokenizer={shared / 'tokenizers' / 'qwen2'}",
    )
    assert "7471 rows, 2 truncated to 512 tokens" in said  # of 7473, two are held out
    finite_metrics(tmp_path / "runs" / "qwen2.5_14b_to_1.5b_gsm8k-smoke")
