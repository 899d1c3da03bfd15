"""A quantized checkpoint is refused with the command that converts it, and the command does so."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kava_jax.errors import KavaError
from kava_jax.hf.load import load_decoder_params, read_spec
from tests.tiny_models import CONFIGS, flat, random_tensors, write_directory, write_tokenizer

BLOCK = 16
# AutoAWQ's: the first of eight places of a word holds number 0, the second number 2.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_fp8(directory) -> dict[str, np.ndarray]:
    """A block-wise fp8 checkpoint as Qwen publishes them, and what its weights stand for."""
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from safetensors.torch import save_file

    config = CONFIGS["qwen3"] | {
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    stored, meant = {}, {}
    for name, array in random_tensors("qwen3").items():
        weight = torch.from_numpy(array)
        if "proj" not in name:
            stored[name], meant[name] = weight, array
            continue
        rows, columns = weight.shape
        padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
        padded[:rows, :columns] = weight
        blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        eighth = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = eighth.reshape(padded.shape)[:rows, :columns].contiguous()
        stored[f"{name}_scale_inv"] = scale
        whole = (eighth.float() * scale[:, None, :, None]).reshape(padded.shape)
        meant[name] = whole[:rows, :columns].numpy()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return meant


def packed(values: np.ndarray, order) -> np.ndarray:
    """Eight numbers of 4 bits in a word of the last axis: place ``i`` holds number ``order[i]``."""
    eights = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint32)
    return sum(eights[..., one] << np.uint32(4 * i) for i, one in enumerate(order)).view(np.int32)


def write_4_bits(directory, method: str) -> dict[str, np.ndarray]:
    """A GPTQ or AWQ checkpoint as Qwen publishes them, and what its weights stand for.

    Layouts: AutoAWQ 0.2.9 ``packing_utils`` and AutoGPTQ's first format, whose zeros are stored
    less one.
    """
    from safetensors.numpy import save_file

    rng, group = np.random.default_rng(0), 8
    directory.mkdir()
    stored, meant = {}, {}
    for name, array in random_tensors("qwen2").items():
        if not name.endswith("proj.weight"):
            stored[name], meant[name] = array, array
            continue
        columns, rows = array.shape
        numbers = rng.integers(0, 16, (rows, columns))
        zeros = rng.integers(1, 16, (rows // group, columns))
        scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
        whole = (numbers - zeros.repeat(group, 0)) * scales.repeat(group, 0).astype(np.float32)
        meant[name] = np.ascontiguousarray(whole.T, np.float32)
        base = name.removesuffix("weight")
        stored[f"{base}scales"] = scales
        if method == "awq":
            stored[f"{base}qweight"] = packed(numbers, AWQ_ORDER)
            stored[f"{base}qzeros"] = packed(zeros, AWQ_ORDER)
        else:
            stored[f"{base}qweight"] = np.ascontiguousarray(packed(numbers.T, range(8)).T)
            stored[f"{base}qzeros"] = packed(zeros - 1, range(8))
            stored[f"{base}g_idx"] = np.arange(rows, dtype=np.int32) // group
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": method, "bits": 4, "group_size": group}
    said |= {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": False}
    config = CONFIGS["qwen2"] | {"quantization_config": said}
    (directory / "config.json").write_text(json.dumps(config))
    return meant


def assert_the_command_gives(meant, tmp_path, family: str) -> None:
    """The command that the refusal of ``quantized`` names, held against weights known by hand."""
    write_tokenizer(tmp_path / "quantized")
    with pytest.raises(KavaError) as error:
        read_spec(tmp_path / "quantized")
    program = str(error.value).split('python -c "')[1].split('"')[0]
    program = program.replace("DIR", "quantized").replace("NEW", "plain")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    ours = flat(load_decoder_params(tmp_path / "plain", read_spec(tmp_path / "plain")))
    # Independently: the same weights, dequantized by hand, in a plain directory of our own.
    from safetensors.numpy import save_file

    write_directory(tmp_path / "hand", family)
    save_file(meant, tmp_path / "hand" / "model.safetensors", metadata={"format": "pt"})
    hand = flat(load_decoder_params(tmp_path / "hand", read_spec(tmp_path / "hand")))
    assert ours.keys() == hand.keys()
    for path, leaf in hand.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=2**-8)  # bfloat16 keeps 8 bits
    assert (tmp_path / "plain" / "tokenizer.json").is_file()


def test_the_command_for_fp8_gives_what_the_numbers_stand_for(tmp_path):
    pytest.importorskip("accelerate", reason="transformers reads fp8 with accelerate alone")
    assert_the_command_gives(write_fp8(tmp_path / "quantized"), tmp_path, "qwen3")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_command_for_4_bits_gives_what_the_numbers_stand_for(tmp_path, method):
    pytest.importorskip("torch", reason="torch, which the command needs, is not installed")
    if method == "gptq":
        pytest.importorskip("gptqmodel", reason="gptqmodel, which converts GPTQ, is not installed")
    assert_the_command_gives(write_4_bits(tmp_path / "quantized", method), tmp_path, "qwen2")


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "awq", "bits": 8},
        {"quant_method": "bitsandbytes", "bits": 4},
        {"bits": 4},
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path, said):
    directory = write_directory(tmp_path, "qwen2")
    config = CONFIGS["qwen2"] | {"quantization_config": said}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(KavaError) as error:
        read_spec(directory)
    method = said.get("quant_method")
    assert str(error.value).endswith(
        f"quant_method={method!r} is not read; use the checkpoint that this one was quantized from"
    )
