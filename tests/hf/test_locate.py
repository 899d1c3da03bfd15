"""Where a model comes from: directory, built-in, hub; and what is refused, in one line."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from kava_jax.errors import KavaError
from kava_jax.hf import locate
from kava_jax.hf.locate import model_fingerprint, resolve_model
from tests.tiny_models import write_directory


def one_line(call) -> str:
    with pytest.raises(KavaError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_local_directory_is_taken_as_it_is(tmp_path):
    directory = write_directory(tmp_path / "model", "qwen2")
    assert resolve_model(directory) == directory
    assert resolve_model(str(directory)) == directory


def test_a_built_in_name_finds_the_packaged_directory(tmp_path, monkeypatch):
    write_directory(tmp_path / "assets" / "demo_teacher", "qwen2")
    monkeypatch.setattr(locate.resources, "files", lambda package: tmp_path)
    assert resolve_model("builtin:demo_teacher") == tmp_path / "assets" / "demo_teacher"
    message = one_line(lambda: resolve_model("builtin:nothing"))
    assert "builtin:demo_teacher" in message
    assert "'builtin:nothing'" in message


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "a/b/c", "has space/x"])
def test_a_missing_directory_is_not_sent_to_the_hub(name, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    assert repr(name) in one_line(lambda: resolve_model(name))


def test_a_hub_id_downloads_safetensors_json_and_tokenizer_only(tmp_path, monkeypatch):
    directory = write_directory(tmp_path / "snapshot", "qwen2")
    asked = {}

    def download(repo_id, *, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen2.5-0.5B@abc") == directory
    assert (asked["repo_id"], asked["revision"]) == ("Qwen/Qwen2.5-0.5B", "abc")
    files = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "merges.txt"]
    files.append("kava_cut.json")
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["patterns"]))
    assert kept == files
    refused = ["pytorch_model.bin", "modeling.py", "original/consolidated.00.pth", "model.gguf"]
    left = huggingface_hub.utils.filter_repo_objects(refused, allow_patterns=asked["patterns"])
    assert list(left) == []


def test_shards_in_subfolders_are_downloaded_and_fingerprinted(tmp_path, monkeypatch):
    directory = write_directory(tmp_path / "snapshot", "qwen2")
    (directory / "model.safetensors").rename(directory / "kept")
    index = {"weight_map": {"model.norm.weight": "weights/part.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    def download(repo_id, *, revision, allow_patterns):
        if "weights/part.safetensors" in allow_patterns:
            (directory / "weights").mkdir()
            (directory / "kept").rename(directory / "weights" / "part.safetensors")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen2.5-0.5B") == directory
    part = directory / "weights" / "part.safetensors"
    before = model_fingerprint(directory)
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert model_fingerprint(directory) != before


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "merge_and_unload" in one_line(lambda: resolve_model(tmp_path))


def http_error(kind: type[Exception]) -> Exception:
    """Made without its constructor, which wants the response object of one HTTP library."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(errors.GatedRepoError), ["gated", "accept its licence", "hf auth login"]),
        (http_error(errors.RepositoryNotFoundError), ["check the name", "hf auth login"]),
        (http_error(errors.RevisionNotFoundError), ["'v9'", "branch, tag or commit"]),
        (errors.LocalEntryNotFoundError("no net"), ["hf download meta-llama/Llama-3.2-1B"]),
        (errors.OfflineModeIsEnabled("offline"), ["hf download meta-llama/Llama-3.2-1B"]),
        (errors.HFValidationError("bad id"), ["check the name"]),
    ],
)
def test_what_the_hub_refuses_names_the_model_and_the_remedy(error, words, monkeypatch):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = one_line(lambda: resolve_model("meta-llama/Llama-3.2-1B@v9"))
    for word in ["meta-llama/Llama-3.2-1B", *words]:
        assert word in message


def test_offline_mode_says_to_download_first(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = one_line(lambda: resolve_model("Qwen/Qwen2.5-0.5B-not-cached-here"))
    assert "download it first" in message


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(tmp_path, pickle):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / pickle).write_bytes(b"\x80\x04never opened")
    message = one_line(lambda: resolve_model(tmp_path))
    assert pickle in message
    assert "safetensors" in message


def test_a_directory_without_config_or_weights_is_refused(tmp_path):
    assert "config.json" in one_line(lambda: resolve_model(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors" in one_line(lambda: resolve_model(tmp_path))


def big_directory(directory: Path) -> Path:
    """One file of 3 MiB beside a config, read by samples when the limits are made small."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"a": 1}))
    data = np.random.default_rng(0).integers(0, 255, 3 << 20, np.uint8)
    save_file({"x": data}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("sampled", [False, True])
def test_fingerprint_changes_with_weights_config_and_names(tmp_path, monkeypatch, sampled):
    if sampled:
        monkeypatch.setattr(locate, "_WHOLE_UP_TO", 1 << 20)
        monkeypatch.setattr(locate, "_SAMPLE_EVERY", 1 << 20)
    directory = big_directory(tmp_path / "m")
    first = model_fingerprint(directory)
    assert first == model_fingerprint(directory)
    (directory / "README.md").write_text("not part of the model")
    assert model_fingerprint(directory) == first

    seen = {first}
    weights = directory / "model.safetensors"
    original = weights.read_bytes()
    for place in (200, len(original) // 2, len(original) - 1):
        changed = bytearray(original)
        changed[place] ^= 1
        weights.write_bytes(bytes(changed))
        seen.add(model_fingerprint(directory))
    weights.write_bytes(original)
    (directory / "config.json").write_text(json.dumps({"a": 2}))
    seen.add(model_fingerprint(directory))
    weights.rename(directory / "other.safetensors")
    seen.add(model_fingerprint(directory))
    for record in ("{}", "{ }"):  # a layer map may come from it
        (directory / "kava_cut.json").write_text(record)
        seen.add(model_fingerprint(directory))
    assert len(seen) == 8


def test_fingerprint_of_a_large_file_reads_samples_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "_WHOLE_UP_TO", 1 << 20)
    monkeypatch.setattr(locate, "_SAMPLE_EVERY", 2 << 20)
    directory = big_directory(tmp_path / "m")
    first = model_fingerprint(directory)
    weights = directory / "model.safetensors"
    original = weights.read_bytes()
    changed = bytearray(original)
    changed[(1 << 20) + 200] ^= 1  # between two samples: documented as not seen
    weights.write_bytes(bytes(changed))
    assert model_fingerprint(directory) == first


def test_fingerprint_of_nothing_is_bad_input(tmp_path):
    assert "config.json" in one_line(lambda: model_fingerprint(tmp_path))
