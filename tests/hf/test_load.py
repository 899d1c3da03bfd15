"""Weights in: every dtype and file layout, by slice, and every way a directory can be wrong."""

import json
import math
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from kava_jax.errors import KavaError
from kava_jax.hf import tensor_files
from kava_jax.hf.load import TensorFiles, load_decoder_params, read_spec
from tests.tiny_models import CONFIGS, flat, random_tensors, torch_model, write_directory


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / "qwen2", "qwen2")


def rewrite(directory, tensors) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def shard(directory, name: str, count: int = 3) -> None:
    """Turn a single-file directory into a sharded one."""
    (directory / "model.safetensors").unlink()
    tensors = list(random_tensors(name).items())
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(tensors[number::count])
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def load(directory, **options):
    return load_decoder_params(directory, read_spec(directory), **options)


def same(params, want) -> None:
    """Every parameter, bit for bit."""
    found = flat(params)
    assert found.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(found[path], leaf)


def refusal(directory, **options) -> str:
    with pytest.raises(KavaError) as error:
        load(directory, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_layers_are_stacked_and_transposed(name, tmp_path):
    params = load(write_directory(tmp_path / name, name))
    tensors = random_tensors(name)
    for layer in range(3):
        up = params["blocks"]["mlp"]["up"]["kernel"][layer]
        mlp = f"model.layers.{layer}.mlp."
        if (fused := tensors.get(mlp + "gate_up_proj.weight")) is not None:
            stored = np.split(fused, 2)[1]
        else:
            stored = tensors.get(mlp + "up_proj.weight")
        if stored is None:  # of every expert, one by one
            names = ("mlp.experts.{}.up_proj", "block_sparse_moe.experts.{}.w3")
            start = names[name == "mixtral"]
            for expert, own in enumerate(up):
                tensor = f"model.layers.{layer}.{start.format(expert)}.weight"
                np.testing.assert_array_equal(own, tensors[tensor].T)
            continue
        np.testing.assert_array_equal(up, stored.T)
    np.testing.assert_array_equal(
        params["embed"]["embedding"], tensors["model.embed_tokens.weight"]
    )
    assert ("head" in params) == (not CONFIGS[name]["tie_word_embeddings"])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_any_float_dtype_is_read_and_cast(tmp_path, stored, wanted):
    params = load(write_directory(tmp_path, "qwen3", stored), param_dtype=wanted)
    tensors = random_tensors("qwen3", stored)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    expected = tensors["model.layers.2.mlp.down_proj.weight"].T.astype(jnp.dtype(wanted))
    np.testing.assert_array_equal(params["blocks"]["mlp"]["down"]["kernel"][2], expected)


def test_sharded_files_read_the_same_as_one_file(tmp_path):
    single = flat(load(write_directory(tmp_path / "one", "llama_biased")))
    shard(write_directory(tmp_path / "many", "llama_biased"), "llama_biased")
    many = flat(load(tmp_path / "many"))
    assert single.keys() == many.keys()
    for path, leaf in single.items():
        np.testing.assert_array_equal(leaf, many[path])


def test_a_cut_teacher_reads_only_what_it_keeps(directory, monkeypatch):
    read = []
    original = TensorFiles.read

    def watched(self, name, index):
        read.append(name)
        return original(self, name, index)

    monkeypatch.setattr(TensorFiles, "read", watched)
    params = flat(load(directory, layers=1, tail=True, head=False))
    tensors = random_tensors("qwen2")
    assert not {path for path in params if path.startswith(("final_norm", "head", "tail/mlp"))}
    assert params["blocks/mlp/up/kernel"].shape == (1, 48, 80)
    key = tensors["model.layers.1.self_attn.k_proj.bias"].reshape(2, 8)
    np.testing.assert_array_equal(params["tail/attention/k/bias"], key)
    assert not [name for name in read if "layers.2." in name or name == "model.norm.weight"]
    of_tail = {name.split("layers.1.")[1] for name in read if "layers.1." in name}
    assert of_tail == {
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    }


@pytest.mark.parametrize("cut", [{"layers": 4}, {"layers": 3, "tail": True}, {"layers": -1}])
def test_more_layers_than_the_model_has_are_refused(directory, cut):
    assert f"layers={cut['layers']}" in refusal(directory, **cut)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_sharded_devices_read_their_own_slices_and_get_the_same_values(tmp_path, name, monkeypatch):
    directory = write_directory(tmp_path, name)
    whole = flat(load(directory))
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    elements = 0
    original = TensorFiles.read

    def counted(self, key, index):
        nonlocal elements
        part = original(self, key, index)
        elements += part.size
        return part

    monkeypatch.setattr(TensorFiles, "read", counted)

    for axis in range(3):
        elements = 0

        def put(path, shape, dtype, read, axis=axis):
            names = [None] * len(shape)
            of_heads = path.endswith(("o/kernel", "bias")) and axis == 2  # the head dimension
            if len(shape) > axis and shape[axis] % 2 == 0 and not of_heads:
                names[axis] = "x"
            sharding = NamedSharding(mesh, PartitionSpec(*names))
            return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)

        parts = load(directory, put=put)
        expected = 0
        for path, leaf in flat(parts).items():
            np.testing.assert_array_equal(leaf, whole[path])
        for leaf in jax.tree.leaves(parts):
            expected += sum(
                math.prod(piece.data.shape)
                for piece in leaf.addressable_shards
                if piece.replica_id == 0
            )
        assert elements == expected  # nothing was read that no device asked for


def test_every_wrong_tensor_is_listed(directory):
    tensors = random_tensors("qwen2")
    for layer in range(3):
        del tensors[f"model.layers.{layer}.self_attn.q_proj.bias"]
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((80, 47), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((98, 48), np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((80, 48), np.float32)
    tensors["visual.patch_embed"] = np.zeros((1,), np.float32)
    rewrite(directory, tensors)
    message = refusal(directory, layers=0, tail=True, head=False)  # even for what is not read
    assert "missing: model.norm.weight, model.layers.{0..2}.self_attn.q_proj.bias;" in message
    assert "unexpected: model.layers.3.mlp.up_proj.weight, visual.patch_embed;" in message
    assert "model.layers.1.mlp.up_proj.weight is [80, 47], expected [80, 48]" in message
    assert "model.embed_tokens.weight is [98, 48], expected [97, 48]" in message


def test_quantized_or_integer_tensors_are_listed(directory):
    tensors = random_tensors("qwen2")
    tensors["model.norm.weight"] = np.ones((48,), np.int8)
    rewrite(directory, tensors)
    message = refusal(directory)
    assert "model.norm.weight is I8" in message
    assert "F32" in message


def test_rotary_tables_and_a_repeated_tied_head_are_ignored(directory, monkeypatch):
    monkeypatch.setattr(tensor_files, "_PIECE", 10 * 48)  # ten rows: the copy is read in pieces
    tensors = random_tensors("qwen2")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones((4,), np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    rewrite(directory, tensors)
    assert "head" not in load(directory)
    tensors["lm_head.weight"][96, 47] += 1  # the last number of the last piece
    rewrite(directory, tensors)
    assert "hold different values; set tie_word_embeddings to false" in refusal(directory)
    tensors["lm_head.weight"] = np.zeros((3, 3), np.float32)
    rewrite(directory, tensors)
    assert "lm_head.weight is [3, 3], expected [97, 48]" in refusal(directory)


def test_a_tied_head_in_place_of_the_embedding_is_the_embedding(directory):
    want = flat(load(directory))
    tensors = random_tensors("qwen2")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    rewrite(directory, tensors)
    same(load(directory), want)


def test_an_untied_model_without_its_head_can_only_be_a_teacher(tmp_path):
    directory = write_directory(tmp_path, "qwen3")
    want = flat(load(directory, layers=2, tail=True, head=False))
    tensors = random_tensors("qwen3")
    del tensors["lm_head.weight"]
    rewrite(directory, tensors)
    message = refusal(directory)
    assert "missing: lm_head.weight" in message
    assert "set tie_word_embeddings to true" in message
    same(load(directory, layers=2, tail=True, head=False), want)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama_biased", "mistral"])
def test_what_transformers_saves_of_a_base_model_is_read(tmp_path, name):
    """Without the prefix of a causal model, and with the base class as architecture."""
    pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    torch_model(name).model.save_pretrained(tmp_path / "base")
    (key,) = load_file(tmp_path / "base" / "model.safetensors").keys() & {"embed_tokens.weight"}
    assert key
    how = {"layers": 2, "tail": True, "head": False}
    whole = write_directory(tmp_path / "whole", name)
    same(load(tmp_path / "base", **how), flat(load(whole, **how)))


def test_the_index_says_which_of_two_copies_counts(directory):
    want = flat(load(directory))
    shard(directory, "qwen2")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    first, last = (directory / f"model-0000{n}-of-00003.safetensors" for n in (1, 3))
    name = next(name for name, file in index["weight_map"].items() if file == first.name)
    stale = load_file(last) | {name: np.zeros_like(load_file(first)[name])}
    save_file(stale, last)
    same(load(directory), want)
    del index["weight_map"][name]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(directory)
    assert f"{name} is stored twice" in message
    assert f"in {first.name} and as {name} in {last.name}" in message


def test_a_shard_in_a_subfolder_is_read(directory):
    want = flat(load(directory))
    shard(directory, "qwen2")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    (directory / "weights").mkdir()
    for file in set(index.values()):
        (directory / file).rename(directory / "weights" / file)
    moved = {name: f"weights/{file}" for name, file in index.items()}
    path.write_text(json.dumps({"weight_map": moved}))
    same(load(directory), want)
    path.write_text(json.dumps({"weight_map": moved | {"model.norm.weight": "../other"}}))
    assert "places model.norm.weight in '../other'" in refusal(directory)


def test_a_single_file_beside_an_index_of_others_is_refused(directory):
    whole = (directory / "model.safetensors").read_bytes()
    shard(directory, "qwen2")
    (directory / "model.safetensors").write_bytes(whole)
    assert "out of date" in refusal(directory)


@pytest.mark.parametrize("keep", [4, 60, -1000])
def test_a_truncated_file_is_named(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(directory)
    assert "qwen2/model.safetensors is truncated or damaged" in message


def test_a_damaged_header_is_named(directory):
    file = directory / "model.safetensors"
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(data[:8] + b"?" * size + data[8 + size :])
    assert "model.safetensors is truncated or damaged" in refusal(directory)


def test_missing_shards_and_broken_indexes_are_named(directory):
    shard(directory, "qwen2")
    (directory / "model-00001-of-00003.safetensors").unlink()
    (directory / "model-00003-of-00003.safetensors").unlink()
    message = refusal(directory)
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message
    index = directory / "model.safetensors.index.json"
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        assert "model.safetensors.index.json" in refusal(directory)


def test_a_broken_config_is_named(directory):
    (directory / "config.json").write_text('{"model_type": ')
    assert "qwen2/config.json is unreadable JSON" in refusal(directory)
    twice = json.dumps(CONFIGS["qwen2"])[:-1] + ', "rope_theta": 1e4}'
    (directory / "config.json").write_text(twice)
    assert "unreadable JSON ('rope_theta' is given twice)" in refusal(directory)


def test_overflow_to_half_precision_is_refused_by_name(directory):
    tensors = random_tensors("qwen2")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = 1e6
    rewrite(directory, tensors)
    message = refusal(directory, param_dtype="float16")
    assert "model.layers.2.mlp.up_proj.weight" in message
    load(directory, param_dtype="bfloat16")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_one_number_that_is_not_finite_is_found_in_the_files_own_dtype(tmp_path, dtype, value):
    largest = float(ml_dtypes.finfo(dtype).max)
    finite = np.array([0.0, -0.0, largest, -largest, 1e-40], np.float64).astype(dtype)
    rows = np.tile(finite, (2, 1 << 16))  # more than is looked at in one piece
    spoilt = rows.copy()
    spoilt[1, -1] = value
    save_file({"whole": rows, "spoilt": spoilt}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    everything = (slice(0, 2), slice(0, rows.shape[1]))
    assert files.read_weight("whole", everything).dtype == dtype
    files.read_weight("spoilt", (slice(0, 1), everything[1]))  # only what is read counts
    assert files.not_finite == set()
    files.read_weight("spoilt", everything)
    assert files.not_finite == {"spoilt"}
