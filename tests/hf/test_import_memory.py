"""A sharded checkpoint of a gigabyte onto eight devices: what the host holds meanwhile."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.export import export_model
from kava_jax.hf.names import parameter_shapes
from tests.tiny import GEOMETRY

GIGABYTE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
}
SHARD = 256 * 10**6
# In a process of its own: the peak is that of the whole process since it was last reset.
PROGRAM = """
import json, re, sys
from functools import partial
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.decoder import Decoder
from kava_jax.parallel.mesh import make_mesh
from kava_jax.runs.parts import Part, place_slices

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

directory = Path(sys.argv[1])
spec = read_spec(directory)
part = Part.of(lambda rngs: Decoder(spec, rngs=rngs), make_mesh(1, 8, 1))
jax.block_until_ready(jax.numpy.zeros(8))
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
params = load_decoder_params(directory, spec, put=partial(place_slices, part.shardings))
jax.block_until_ready(params)
leaves = jax.tree.leaves(params)
print(json.dumps({
    "peak": 1024 * (kilobytes("VmHWM") - before),
    "result": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = spec_from_config(GEOMETRY | GIGABYTE, where="gigabyte")
    shapes = parameter_shapes(spec)
    flat = {path: np.full(shape, 0.5, np.float32) for path, shape in shapes.items()}
    directory = tmp_path_factory.mktemp("import") / "gigabyte"
    export_model(
        directory,
        unflatten_dict(flat, sep="/"),
        spec,
        dtype="float32",
        tokenizer=builtin_tokenizer(),
        card="gigabyte",
        max_shard_bytes=SHARD,
    )
    return directory


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)
def test_a_gigabyte_is_imported_within_two_and_a_half_shards(checkpoint: Path) -> None:
    shards = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(shards) == 5
    assert sum(shards) > 1e9
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["result"] >= 1e9
    assert found["peak"] < 2.5 * max(shards) + found["result"]
