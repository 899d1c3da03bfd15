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


def test_the_command_for_fp8_gives_what_the_numbers_stand_for(tmp_path):
    pytest.importorskip("accelerate", reason="transformers reads fp8 with accelerate alone")
    meant = write_fp8(tmp_path / "fp8")
    write_tokenizer(tmp_path / "fp8")
    with pytest.raises(KavaError) as error:
        read_spec(tmp_path / "fp8")
    program = str(error.value).split('python -c "')[1].split('"')[0]
    program = program.replace("DIR", "fp8").replace("NEW", "plain")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    ours = flat(load_decoder_params(tmp_path / "plain", read_spec(tmp_path / "plain")))
    # Independently: the same weights, dequantized by hand, in a plain directory of our own.
    from safetensors.numpy import save_file

    write_directory(tmp_path / "hand", "qwen3")
    save_file(meant, tmp_path / "hand" / "model.safetensors", metadata={"format": "pt"})
    hand = flat(load_decoder_params(tmp_path / "hand", read_spec(tmp_path / "hand")))
    assert ours.keys() == hand.keys()
    for path, leaf in hand.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=2**-8)  # bfloat16 keeps 8 bits
    assert (tmp_path / "plain" / "tokenizer.json").is_file()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", None])
def test_other_quantizations_are_refused_by_name(tmp_path, method):
    directory = write_directory(tmp_path, "qwen2")
    config = CONFIGS["qwen2"] | {"quantization_config": {"quant_method": method, "bits": 4}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(KavaError) as error:
        read_spec(directory)
    assert f"quant_method={method!r} is not read; use the checkpoint that this one was" in str(
        error.value
    )
