"""``kava cut`` as people use it: what it keeps, what it measures, what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kava_jax.hf.cut_record import read_cut_record
from kava_jax.hf.locate import resolve_model
from tests.tiny import contents, kava, write_model, write_rows
from tests.tolerances import TOL

DEPTH, UNITS, ROWS = 6, 384, 16
ON_ROWS = ("--data", "data.jsonl", "--rows", str(ROWS), "data.max_length=64", "data.batch_size=8")
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The built-in teacher with two layers put in, 1 and 2, that add next to nothing; and rows."""
    directory = tmp_path_factory.mktemp("cut")
    source = resolve_model("builtin:demo_teacher")
    shutil.copytree(source, directory / "teacher")
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": DEPTH}
    (directory / "teacher" / "config.json").write_text(json.dumps(config))
    theirs, tensors = load_file(source / "model.safetensors"), {}
    for place, layer in enumerate((0, 3, 3, 1, 2, 3)):
        for name, value in theirs.items():
            if f".layers.{layer}." in name:
                useless = place in (1, 2) and name.endswith(OUTPUTS)
                renamed = name.replace(f".layers.{layer}.", f".layers.{place}.")
                tensors[renamed] = value * np.float32(1e-4) if useless else value
    tensors |= {name: value for name, value in theirs.items() if ".layers." not in name}
    save_file(tensors, directory / "teacher" / "model.safetensors", {"format": "pt"})
    write_rows(directory / "data.jsonl", 40)
    return directory


@pytest.fixture
def workspace(original, tmp_path, monkeypatch):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cut(capsys, *arguments: str, teacher: str = "teacher") -> dict:
    ended = kava(capsys, "cut", teacher, "--out", "out", *arguments, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def losses_without(found: dict) -> dict[str, float]:
    names = [name for name in found if name.startswith("loss_without/")]
    return {name.removeprefix("loss_without/"): found[name] for name in names}


def loss_of(capsys, model: str) -> float:
    """By ``kava eval``, on the same rows."""
    ended = kava(capsys, "eval", model, *ON_ROWS, "eval.max_new_tokens=0", "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)["eval_loss"]


@pytest.mark.parametrize(
    ("depth", "keep", "rule", "kept"),
    [
        (30, 15, "middle", [*range(8), *range(23, 30)]),
        (30, 20, "middle", [*range(10), *range(20, 30)]),
        (5, 1, "middle", [0]),
        (30, 15, "evenly", [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27, 29]),
        (9, 3, "evenly", [0, 4, 8]),
        (5, 5, "evenly", [0, 1, 2, 3, 4]),
        (5, 1, "evenly", [4]),
    ],
)
def test_rules_by_number(depth, keep, rule, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher", num_hidden_layers=depth)
    found = cut(capsys, "--keep", str(keep), "--rule", rule)
    assert (found["layers"], found["teacher_layers"]) == (kept, depth)
    record = read_cut_record(tmp_path / "out")
    assert record is not None
    assert (list(record.layers), record.teacher_layers) == (kept, depth)


def test_middle_is_the_rule_that_none_names(workspace, capsys):
    assert cut(capsys, "--keep", "2")["layers"] == [0, 5]


def test_measured_layers_are_the_ones_that_count(workspace, capsys):
    """Two layers that were made useless go, and the loss is that of the written directory."""
    found = cut(capsys, "--keep", "4", "--rule", "best_layers", *ON_ROWS)
    assert found["layers"] == [0, 3, 4, 5]
    before, without = found["loss_before"], losses_without(found)
    assert list(without) == ["0", "1", "2", "3", "4", "5"]
    assert [layer for layer, loss in without.items() if abs(loss - before) < 1e-3] == ["1", "2"]
    assert before == pytest.approx(
        loss_of(capsys, "teacher"), rel=TOL["float32"], abs=TOL["float32"]
    )


def test_a_measured_block_is_the_cheapest(workspace, capsys):
    found = cut(capsys, "--keep", "4", "--rule", "best_block", *ON_ROWS)
    assert found["layers"] == [0, 3, 4, 5]
    without = losses_without(found)
    assert list(without) == ["0-1", "1-2", "2-3", "3-4", "4-5"]
    assert min(without, key=without.__getitem__) == "1-2"
    # Skipping a layer by zeros is leaving it out.
    assert without["1-2"] == pytest.approx(
        loss_of(capsys, "out"), rel=TOL["float32"], abs=TOL["float32"]
    )


def test_a_skipped_layer_costs_what_its_absence_costs(workspace, capsys):
    """Also where it counts: the same loss as of a directory written without it."""
    measured = losses_without(cut(capsys, "--keep", "5", "--rule", "best_layers", *ON_ROWS))
    shutil.rmtree(workspace / "out")
    cut(capsys, "--layers", "0,1,2,4,5")
    assert measured["3"] == pytest.approx(
        loss_of(capsys, "out"), rel=TOL["float32"], abs=TOL["float32"]
    )


def rows_as_ids() -> list[list[int]]:
    """The calibration rows as ``kava`` encodes them, written out by hand."""
    from kava_jax.data.tokenizer import builtin_tokenizer

    tokenizer, rows = builtin_tokenizer(), []
    for line in Path("data.jsonl").read_text().splitlines()[:ROWS]:
        row = json.loads(line)
        text = f"Question: {row['question']}\nAnswer: {row['answer']}"
        rows.append([*tokenizer(text).input_ids, tokenizer.eos_token_id][:64])
    return rows


def test_units_with_the_largest_mean_activation_stay(workspace, capsys):
    """Against transformers' own forward pass: what its down projection is given."""
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    found = cut(capsys, "--layers", "0,3,4", "--intermediate-size", "100", *ON_ROWS)
    model = AutoModelForCausalLM.from_pretrained("teacher", dtype=torch.float32)
    sums = np.zeros((DEPTH, UNITS))
    for number, layer in enumerate(model.model.layers):

        def count(module, inputs, number=number):
            sums[number] += inputs[0].abs().double().sum(dim=(0, 1)).numpy()

        layer.mlp.down_proj.register_forward_pre_hook(count)
    with torch.no_grad():
        for ids in rows_as_ids():
            model(torch.tensor([ids]))
    expected = [sorted(np.argsort(-sums[layer])[:100].tolist()) for layer in (0, 3, 4)]
    record = read_cut_record(workspace / "out")
    assert record is not None
    assert record.units is not None
    assert [list(units) for units in record.units] == expected
    assert (found["teacher_intermediate_size"], found["intermediate_size"]) == (UNITS, 100)


def test_figures_for_people(workspace, capsys):
    kept = ("--keep", "3", "--rule", "best_block", "--kv-heads", "1", *ON_ROWS)
    ended = kava(capsys, "cut", "teacher", "--out", "out", *kept)
    assert ended.code == 0, ended.err
    told = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert (len(json.loads(told["layers"])), told["teacher_layers"]) == (3, "6")
    assert (told["kv_heads"], told["teacher_kv_heads"]) == ("1", "2")
    assert told["keys"] == told["values"] == "turned towards one another, then their mean"
    # By hand: D 128, N 4, K 2, H 32, F 384, V 512; biases on q, k and v; a tied head.
    layer = 2 * 128 * 128 + 128 + 2 * (128 * 64 + 64) + 3 * 128 * 384 + 2 * 128
    assert int(told["teacher_parameters"]) == 512 * 128 + 128 + DEPTH * layer
    assert int(told["parameters"]) == 512 * 128 + 128 + 3 * (layer - 2 * (128 * 32 + 32))
    assert {"loss_before", "loss_without/0-2", "tokens"} <= told.keys()
    assert told["rows"] == str(ROWS)
    assert "written to out" in ended.err
    card = (workspace / "out" / "README.md").read_text()
    assert f"| layers | {told['layers']} |" in card
    assert "kava cut teacher --out out --keep 3 --rule best_block" in card


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ({"model_type": "qwen3"}, "mean only: a norm follows"),
        ({"model_type": "qwen2"}, "turned"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, "mean only: they are rotated in"),
    ],
)
def test_what_is_done_to_heads_is_said(family, keys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher", head_dim=4, **family)
    found = cut(capsys, "--layers", "all", "--kv-heads", "1")
    assert found["keys"].startswith(keys)
    assert found["values"].startswith("turned")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_dtype_is_the_teachers_or_the_one_that_is_asked_for(dtype, workspace, capsys):
    found = cut(capsys, "--layers", "all", "--dtype", dtype)
    assert found["dtype"] == ("float32" if dtype == "auto" else dtype)
    theirs = load_file(workspace / "teacher" / "model.safetensors")
    ours = load_file(workspace / "out" / "model.safetensors")
    for name, tensor in theirs.items():
        expected = tensor if dtype == "auto" else tensor.astype(ours[name].dtype)
        assert ours[name].tobytes() == expected.tobytes()


def quantized(workspace: Path) -> None:
    path = workspace / "teacher" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))


def cut_already(workspace: Path) -> None:
    record = {"teacher": "Qwen/x", "fingerprint": "", "teacher_layers": 9, "layers": [0, 1]}
    (workspace / "teacher" / "kava_cut.json").write_text(json.dumps(record | {"kv_heads": [[0]]}))


def with_thesis(workspace: Path) -> None:
    (workspace / "out").mkdir()
    (workspace / "out" / "thesis.tex").write_text("three years of work")


def short_rows(workspace: Path) -> None:
    (workspace / "data.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n' * ROWS)


def long_questions(workspace: Path) -> None:
    row = json.dumps({"question": "word " * 100, "answer": "#### 1"})
    (workspace / "data.jsonl").write_text(f"{row}\n" * ROWS)


BY_LOSS = ("--keep", "2", "--rule", "best_layers")
ONE_OF_TWO = ("layers: give --layers 0,1,2 (or all), or --keep N",)
REFUSED = {
    "nothing to keep": ((), ONE_OF_TWO),
    "both": (("--layers", "all", "--keep", "2"), ONE_OF_TWO),
    "rule of a list": (("--layers", "all", "--rule", "middle"), ONE_OF_TWO),
    "out of range": (("--layers", "0,6"), ("layers=0,6", "6 layers", "of 0 to 5")),
    "out of order": (("--layers", "0,2,1"), ("layers=0,2,1", "in ascending order")),
    "repeated": (("--layers", "0,1,1"), ("layers=0,1,1", "each once")),
    "no list": (("--layers", "0-3"), ("student.cut.layers", "'0-3'")),
    "no numbers": (("--layers", "0,,3"), ("student.cut.layers",)),
    "too many": (("--keep", "7"), ("layers=7", "keep 1 to 6")),
    "none": (("--keep", "0"), ("student.cut.layers", "=0")),
    "unknown rule": (("--keep", "2", "--rule", "best"), ("student.cut.rule='best'", "best_block")),
    "heads": (("--layers", "all", "--kv-heads", "3"), ("kv_heads=3", "2 KV heads", "1, 2")),
    "more units": (
        ("--layers", "all", "--intermediate-size", "385"),
        ("intermediate_size=385", "384 units in a layer", "keep 1 to 384"),
    ),
    "units without data": (
        ("--layers", "all", "--intermediate-size", "8"),
        ("intermediate_size=8 is measured", "--data PATH"),
    ),
    "rule without data": (
        ("--keep", "2", "--rule", "best_block"),
        ("rule=best_block is measured", "--data PATH"),
    ),
    "override without data": (
        ("--keep", "2", "data.max_length=64"),
        ("data.max_length=64 does nothing", "leave it out"),
    ),
    "data for nothing": (("--keep", "2", *ON_ROWS[:2]), ("data=data.jsonl does nothing",)),
    "another override": (("--keep", "2", *ON_ROWS, "train.steps=3"), ("override='train.steps=3'",)),
    "missing file": ((*BY_LOSS, "--data", "no.jsonl"), ("data.path='no.jsonl'", "not exist")),
    "dropped rows": (
        (*BY_LOSS, *ON_ROWS),
        ("data=data.jsonl: 0 rows have 0 tokens to predict", "at least 256"),
        long_questions,
    ),
    "few tokens": (
        (*BY_LOSS, *ON_ROWS),
        ("data=data.jsonl", "tokens to predict", "at least 256"),
        short_rows,
    ),
    "dtype": (("--layers", "all", "--dtype", "fp8"), ("--dtype='fp8'", "bfloat16")),
    "cut already": (
        ("--layers", "all"),
        ("teacher='teacher' was cut from 'Qwen/x' already", "remove kava_cut.json"),
        cut_already,
    ),
    "quantized": (("--layers", "all"), ("quantization_config", "gptq", "convert it"), quantized),
    "not empty": (("--layers", "all"), ("out=out is not empty", "thesis.tex"), with_thesis),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_changes_nothing(name, workspace, capsys):
    arguments, words, *arrange = REFUSED[name]
    for change in arrange:
        change(workspace)
    before = contents(workspace)
    ended = kava(capsys, "cut", "teacher", "--out", "out", *arguments)
    assert (ended.code, ended.out) == (2, "")
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert [word for word in words if word not in line] == [], line
    assert contents(workspace) == before


@pytest.mark.parametrize(("option", "value"), [("--kv-heads", "0"), ("--rows", "0")])
def test_no_heads_and_no_rows(option, value, workspace, capsys):
    ended = kava(capsys, "cut", "teacher", "--out", "out", "--layers", "all", option, value)
    assert ended.code == 2
    assert option in ended.err
