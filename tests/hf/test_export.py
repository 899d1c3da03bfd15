"""Weights out: bit-identical round trips, transformers as reader, nothing lost or half written."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from kava_jax.errors import KavaError
from kava_jax.hf.export import export_model
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.masks import attention_mask, token_positions
from tests.tiny_models import (
    CONFIGS,
    QUICK_FILES,
    each,
    flat,
    load_decoder,
    random_tensors,
    torch_model,
    write_directory,
    write_tokenizer,
)
from tests.tolerances import TOL

TOKENS = np.random.default_rng(5).integers(3, 97, (2, 12))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def export(source, out, tokenizer, **changes):
    """Load ``source`` and export it to ``out`` with plain arguments."""
    spec = read_spec(source)
    arguments = {
        "dtype": "float32",
        "tokenizer": tokenizer,
        "source_dir": source,
        "card": "# card\n",
    } | changes
    params = load_decoder_params(source, spec, param_dtype=arguments["dtype"])
    export_model(out, params, spec, **arguments)
    return out


def same_files(first, second) -> None:
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.tobytes() == theirs[name].tobytes()


@pytest.mark.parametrize("name", each(CONFIGS, QUICK_FILES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_import_export_import_is_bit_identical(name, dtype, tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", name, jnp.dtype(dtype))
    out = export(source, tmp_path / "out", tokenizer_dir, dtype=dtype)
    same_files(out / "model.safetensors", source / "model.safetensors")
    assert read_spec(out) == read_spec(source)
    first = flat(load_decoder_params(source, read_spec(source), param_dtype=dtype))
    second = flat(load_decoder_params(out, read_spec(out), param_dtype=dtype))
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert leaf.tobytes() == second[path].tobytes()


def test_stories260k_comes_back_bit_identical(shared, tmp_path):
    source = shared / "models" / "stories260k"
    out = export(source, tmp_path / "out", None)
    same_files(out / "model.safetensors", source / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 1]


def our_logits(directory) -> np.ndarray:
    model = load_decoder(directory)
    valid = jnp.ones(TOKENS.shape, bool)
    positions = token_positions(valid)
    mask = attention_mask(positions, positions, valid, model.spec.windows)
    return np.asarray(model.logits(model(jnp.asarray(TOKENS), positions, mask)[0]))


def their_logits(model) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("name", each(CONFIGS, QUICK_FILES))
def test_the_export_loads_in_transformers_with_equal_logits(name, tmp_path, tokenizer_dir):
    pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    source = write_directory(tmp_path / "source", name)
    out = export(source, tmp_path / "out", tokenizer_dir, source_dir=None)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    head, embedding = loaded.lm_head.weight, loaded.model.embed_tokens.weight
    assert (head.data_ptr() == embedding.data_ptr()) == CONFIGS[name]["tie_word_embeddings"]
    theirs = their_logits(loaded.eval())
    assert np.abs(theirs - their_logits(torch_model(name))).max() < TOL["parity"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_reads_the_dtype_from_our_config(dtype, tmp_path, tokenizer_dir):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    source = write_directory(tmp_path / "source", "llama3")
    out = export(source, tmp_path / "out", tokenizer_dir, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == getattr(torch, dtype)
    expected = torch.from_numpy(random_tensors("llama3")["lm_head.weight"])
    assert torch.equal(loaded.lm_head.weight, expected.to(loaded.dtype))


@pytest.mark.parametrize("size", ["20KB", "200KB"])
def test_what_transformers_shards_we_read(tmp_path, size):
    pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    source = write_directory(tmp_path / "source", "qwen3")
    torch_model("qwen3").save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    spec = read_spec(tmp_path / "saved")
    assert spec == read_spec(source)
    saved = flat(load_decoder_params(tmp_path / "saved", spec))
    for path, leaf in flat(load_decoder_params(source, spec)).items():
        np.testing.assert_array_equal(leaf, saved[path])


def test_what_we_shard_reads_back_and_loads_in_transformers(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen3")
    out = export(source, tmp_path / "out", tokenizer_dir, max_shard_bytes=60_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert not (out / "model.safetensors").exists()
    assert all(file.stat().st_size < 70_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = random_tensors("qwen3")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name
            np.testing.assert_array_equal(tensor, tensors[name])
    pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    theirs = their_logits(AutoModelForCausalLM.from_pretrained(out).eval())
    assert np.abs(theirs - our_logits(source)).max() < TOL["parity"]


def test_parameters_sharded_over_devices_are_exported(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen2")
    spec = read_spec(source)
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def put(path, shape, dtype, read):
        names = [None] * len(shape)
        names[-1] = "x"
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)

    params = load_decoder_params(source, spec, put=put)
    out = tmp_path / "out"
    export_model(out, params, spec, dtype="float32", tokenizer=tokenizer_dir, card="")
    same_files(out / "model.safetensors", source / "model.safetensors")


def test_what_the_source_config_says_is_kept_and_machine_paths_are_not(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen2")
    config = CONFIGS["qwen2"] | {
        "_name_or_path": str(tmp_path),
        "auto_map": {"AutoModel": "modeling.Qwen"},
        "attention_dropout": 0.1,
        "transformers_version": "4.40.0",
        "layer_types": ["full_attention"] * 3,
        "eos_token_id": [2, 5],
    }
    (source / "config.json").write_text(json.dumps(config))
    kept = {"do_sample": True, "top_p": 0.8, "eos_token_id": [2, 5]}
    (source / "generation_config.json").write_text(json.dumps(kept))
    out = export(source, tmp_path / "out", tokenizer_dir, dtype="bfloat16")
    written = json.loads((out / "config.json").read_text())
    assert (written["attention_dropout"], written["eos_token_id"]) == (0.1, [2, 5])
    assert written["transformers_version"] == "4.40.0"
    assert (written["torch_dtype"], written["dtype"]) == ("bfloat16", "bfloat16")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert written["bos_token_id"] == 1
    assert "auto_map" not in written
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == kept
    text = "".join(p.read_text() for p in out.iterdir() if p.suffix in (".json", ".md"))
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "unused",
    [
        {"do_sample": False, "temperature": 0.6},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "typical_p": 0.5},
        {"do_sample": None, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_h": 0.5},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
        {"pad_token_id": -1},
    ],
)
def test_what_a_generation_config_does_not_use_does_not_stop_the_next_save(
    unused, tmp_path, tokenizer_dir
):
    """Transformers saves nothing that it warns of, and the export has to be saved again."""
    from transformers import GenerationConfig

    used = {"eos_token_id": [2, 5], "max_new_tokens": 7, "repetition_penalty": 1.1}
    source = write_directory(tmp_path / "source", "qwen2")
    (source / "generation_config.json").write_text(json.dumps(used | unused))
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        GenerationConfig.from_pretrained(source).validate(strict=True)
    out = export(source, tmp_path / "out", tokenizer_dir)
    read = GenerationConfig.from_pretrained(out)
    read.validate(strict=True)
    assert {key: getattr(read, key) for key in used} == used


def test_without_a_source_the_special_ids_come_from_the_tokenizer(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen2")
    out = export(source, tmp_path / "out", tokenizer_dir, source_dir=None)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert json.loads((out / "generation_config.json").read_text()) == ids
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in ids} == ids


def test_a_tokenizer_object_is_saved_in_a_spelling_old_transformers_reads(tmp_path, tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    source = write_directory(tmp_path / "source", "qwen2")
    out = export(source, tmp_path / "out", tokenizer)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(out)
    text = "the answer <tool> 12345\n\nOne</s>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert "<tool>" in again.all_special_tokens


def test_a_tokenizer_that_transformers_would_replace_is_refused(tmp_path):
    """From 5.0 AutoTokenizer reads any tokenizer beside a qwen2 config as Qwen2Tokenizer."""
    words = write_tokenizer(tmp_path / "words", words=True)
    source = write_directory(tmp_path / "source", "qwen2")
    with pytest.raises(KavaError, match="Qwen2Tokenizer"):
        export(source, tmp_path / "out", words)
    assert not (tmp_path / "out").exists()
    export(write_directory(tmp_path / "llama", "llama3"), tmp_path / "out", words)


def test_a_directory_with_other_files_is_never_touched(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen2")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("three years of work")
    with pytest.raises(KavaError, match=r"thesis\.tex"):
        export(source, out, tokenizer_dir)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(KavaError, match="is a file"):
        export(source, out / "thesis.tex", tokenizer_dir)


def test_a_previous_export_is_replaced_unless_something_was_added(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen3")
    out = tmp_path / "out"
    out.mkdir()  # an empty directory is fine
    export(source, out, tokenizer_dir, max_shard_bytes=60_000)
    export(source, out, tokenizer_dir, card="second")
    assert (out / "README.md").read_text() == "second"
    assert not list(out.glob("model-*"))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    (out / "notes.txt").write_text("mine")
    with pytest.raises(KavaError, match=r"notes\.txt"):
        export(source, out, tokenizer_dir)
    assert (out / "notes.txt").exists()


def test_a_directory_that_is_there_stays_the_same_one(tmp_path, tokenizer_dir, monkeypatch):
    """It may be another disk, where somebody stands, or behind a link: it is never renamed."""
    source = write_directory(tmp_path / "source", "qwen2")
    there = tmp_path / "large_disk"
    there.mkdir()
    (tmp_path / "link").symlink_to("large_disk")
    before = there.stat().st_ino
    export(source, tmp_path / "new", tokenizer_dir)
    export(source, tmp_path / "link", tokenizer_dir, max_shard_bytes=60_000)
    monkeypatch.chdir(there)
    export(source, Path("."), tokenizer_dir)
    assert there.stat().st_ino == before
    assert (tmp_path / "link").is_symlink()
    assert Path.cwd() == there
    new = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == new
    assert {path.name for path in tmp_path.iterdir()} == {"source", "new", "large_disk", "link"}


def test_a_failed_export_leaves_the_old_one_and_nothing_else(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen2")
    out = export(source, tmp_path / "out", tokenizer_dir)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    spec = read_spec(source)
    params = load_decoder_params(source, spec)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(1e6)
    with pytest.raises(KavaError, match=r"model\.norm\.weight"):
        export_model(out, params, spec, dtype="float16", tokenizer=tokenizer_dir, card="")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_parameters_that_do_not_fit_are_all_listed(tmp_path, tokenizer_dir):
    source = write_directory(tmp_path / "source", "qwen2")
    spec = read_spec(source)
    params = load_decoder_params(source, spec, layers=1, tail=True, head=False)
    with pytest.raises(KavaError) as error:
        export_model(
            tmp_path / "out", params, spec, dtype="float32", tokenizer=tokenizer_dir, card=""
        )
    message = str(error.value)
    assert "missing: final_norm/scale" in message
    assert "tail/attention/k/kernel" in message.partition("unexpected: ")[2].partition(";")[0]
    assert "blocks/mlp/up/kernel is [1, 48, 80], expected [3, 48, 80]" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokenizer", [None, "empty"])
def test_a_missing_tokenizer_is_refused(tmp_path, tokenizer):
    source = write_directory(tmp_path / "source", "qwen2")
    if tokenizer == "empty":
        tokenizer = tmp_path / "empty"
        tokenizer.mkdir()
    with pytest.raises(KavaError, match="tokenizer="):
        export(source, tmp_path / "out", tokenizer, source_dir=None)
    assert not (tmp_path / "out").exists()
