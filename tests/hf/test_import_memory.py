"""Sharded checkpoints onto eight devices, and cut: what the host holds meanwhile."""

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
# The teacher of a cut, of 227 MB.
TEACHER = {
    "hidden_size": 768,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 4096,
}
TEACHER_SHARD = 50 * 10**6
# In a process of its own: the peak is that of the whole process since it was last reset.
START = """
import json, re, sys
from functools import partial
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from kava_jax.hf.cut import cut_on_disk, cut_spec, load_cut_params, plan_cut
from kava_jax.hf.export import export_model
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.decoder import Decoder
from kava_jax.parallel.mesh import make_mesh
from kava_jax.runs.parts import Part, place_slices

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def peak(work):
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = jax.block_until_ready(work())
    return 1024 * (kilobytes("VmHWM") - before), result

def size(params):
    leaves = jax.tree.leaves(params)
    return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)

directory = Path(sys.argv[1])
spec = read_spec(directory)
jax.block_until_ready(jax.numpy.zeros(8))
"""
IMPORT = """
part = Part.of(lambda rngs: Decoder(spec, rngs=rngs), make_mesh(1, 8, 1))
put = partial(place_slices, part.shardings)
most, params = peak(lambda: load_decoder_params(directory, spec, put=put))
print(json.dumps({"peak": most, "result": size(params)}))
"""
# Of 12 layers 8, of 12 heads 6 pairs, of the units every second.
CUT = """
import scipy.linalg  # 30 MB of code are none of the cut's data
layers = (0, 1, 2, 3, 8, 9, 10, 11)
cut = plan_cut(spec, layers, "middle", 6, None, teacher="t", fingerprint="")
units = tuple(tuple(range(layer % 2, 1024, 2)) for layer in layers)
cut = cut.model_copy(update={"units": units})
part = Part.of(lambda rngs: Decoder(cut_spec(spec, cut), rngs=rngs), make_mesh(1, 8, 1))
put = partial(place_slices, part.shardings)
options = {"dtype": "float32", "card": "", "max_shard_bytes": int(sys.argv[3])}
options |= {"tokenizer": None, "source_dir": directory, "cut": cut}
on_disk = cut_on_disk(directory, spec, cut, "float32")
ours = cut_spec(spec, cut)
written, _ = peak(lambda: export_model(Path(sys.argv[2]), on_disk, ours, **options))
loaded, params = peak(lambda: load_cut_params(directory, spec, cut, put=put))
print(json.dumps({"written": written, "loaded": loaded, "result": size(params)}))
"""


NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


def checkpoint(directory: Path, geometry: dict[str, int], shard: int) -> list[int]:
    """A model of these sizes in shards; their sizes."""
    spec = spec_from_config(GEOMETRY | geometry, where="checkpoint")
    shapes = parameter_shapes(spec)
    flat = {path: np.full(shape, 0.5, np.float32) for path, shape in shapes.items()}
    export_model(
        directory,
        unflatten_dict(flat, sep="/"),
        spec,
        dtype="float32",
        tokenizer=builtin_tokenizer(),
        card="checkpoint",
        max_shard_bytes=shard,
    )
    return [file.stat().st_size for file in directory.glob("*.safetensors")]


def told(program: str, *arguments: object) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", START + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
@NEEDS_PROC
def test_a_gigabyte_is_imported_within_two_and_a_half_shards(tmp_path: Path) -> None:
    shards = checkpoint(tmp_path / "gigabyte", GIGABYTE, SHARD)
    assert len(shards) == 5
    assert sum(shards) > 1e9
    found = told(IMPORT, tmp_path / "gigabyte")
    assert found["result"] >= 1e9
    assert found["peak"] < 2.5 * max(shards) + found["result"]


@pytest.mark.long
@NEEDS_PROC
def test_a_cut_holds_one_shard_and_the_result(tmp_path: Path) -> None:
    """Onto a mesh; into a directory it holds a shard and some tensors of it alone."""
    shards = checkpoint(tmp_path / "teacher", TEACHER, TEACHER_SHARD)
    assert len(shards) > 4
    assert sum(shards) > 2e8
    found = told(CUT, tmp_path / "teacher", tmp_path / "out", TEACHER_SHARD)
    assert found["result"] > 1e8
    assert found["loaded"] < 1.3 * (max(shards) + found["result"])
    assert found["written"] < 2.5 * max(shards)
