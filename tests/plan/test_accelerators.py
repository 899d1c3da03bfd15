"""Plans by the chips' own compilers: their answers made up, and, where installed, their own."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kava_jax.config.file import parse_config
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.plan import accelerators, planning
from kava_jax.plan.accelerators import CUDA_PLUGINS, described_devices
from kava_jax.plan.chips import CHIPS, find_chip
from kava_jax.plan.compiled import Memory
from kava_jax.plan.gpus import GPUS, target_config
from kava_jax.plan.show import render
from tests.tiny import CONFIG, kava, write_workspace

HAS_CUDA = any(map(accelerators.installed, CUDA_PLUGINS))


def tiny_config(*overrides: str) -> Config:
    return parse_config(CONFIG, [*overrides])


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(write_workspace(tmp_path))
    return tmp_path


@pytest.fixture
def answers(monkeypatch) -> None:
    """A compiler for every chip, which says 20 GB and 1 GB a row; CPU devices stand in."""
    monkeypatch.setattr(planning, "described_devices", lambda chip, count: jax.devices())
    monkeypatch.setattr(
        planning, "own_memory", lambda blueprint, rows, _: Memory(20 * 10**9, 0, rows * 10**9)
    )


MESH = ["--devices", "8", "--mesh", "data=2,fsdp=2,tensor=2"]


@pytest.mark.long
def test_a_gpu_is_asked_for_the_step_and_the_largest_batches(capsys, answers) -> None:
    ended = kava(capsys, "plan", "tiny.yaml", *MESH, "--chip", "h100", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["exact"]
    assert found["temporaries"] == {"least": 8e9, "most": 8e9}
    # Rows are split over 4 devices: 20 + 40 of 63.7 GB, and 20 + 56 of 78.1 GB.
    for one, fraction, rows in zip(found["boundaries"], (0.75, 0.92), (40, 56), strict=True):
        assert one["fraction"] == fraction
        assert one["limit"] == fraction * 84_942_979_072
        assert one["fits"] == {
            "rows": rows, "arguments": 20 * 10**9, "temporaries": rows * 10**9
        }  # fmt: skip
        assert one["beyond"]["rows"] == rows + 4
    assert "8 rows, compiled for h100: 28.00 GB of a device" in ended.err


@pytest.mark.long
def test_a_gpu_s_plan_in_words(capsys, answers) -> None:
    ended = kava(capsys, "plan", "tiny.yaml", *MESH, "--chip", "h100")
    assert "most rows of 64 tokens: 40 (60.00 GB) in 63.71 GB, 0.75 of a device's" in ended.out
    assert "most rows of 64 tokens: 56 (76.00 GB) in 78.15 GB" in ended.out
    assert "with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in ended.out
    assert "8.00   compiled" in ended.out
    assert "without autotuning, for which it needs the chip" in ended.out
    assert "largest batch in" not in ended.out


@pytest.mark.long
def test_a_gpu_that_is_too_small_for_one_row_is_told(monkeypatch, answers) -> None:
    monkeypatch.setattr(
        planning, "own_memory", lambda blueprint, rows, _: Memory(70 * 10**9, 0, rows * 10**9)
    )
    wanted = tiny_config("mesh.fsdp=2", "mesh.tensor=2")
    found = planning.make_plan(wanted, find_chip("h100"), 80e9, print)
    assert found.boundaries[0].fits is None
    assert "not even 4 rows of 64 tokens fit (74.00 GB) in 63.71 GB" in render(found)


def test_a_tpu_is_asked_for_the_step_alone(capsys, answers) -> None:
    ended = kava(capsys, "plan", "tiny.yaml", *MESH, "--chip", "v5p", "--json")
    found = json.loads(ended.out)
    assert found["temporaries"] == {"least": 8e9, "most": 8e9}
    assert found["boundaries"] == []


def test_without_a_compiler_nothing_is_described(monkeypatch) -> None:
    monkeypatch.setattr(accelerators, "CUDA_PLUGINS", ("jax_plugins.absent", "absent.plugin"))
    assert described_devices(CHIPS["h100"], 8) is None
    with pytest.raises(KavaError, match="--chip=h100 --devices=8: no compiler for it is installed"):
        planning.compile_for(tiny_config(), CHIPS["h100"])


@pytest.mark.long
def test_a_program_for_described_chips_is_not_kept(tmp_path, answers) -> None:
    """Out of JAX's cache it could not be read again."""
    kept = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in kept}
    try:
        for name, value in kept.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        planning.compile_for(tiny_config("mesh.fsdp=2", "mesh.tensor=2"), find_chip("h100"))
        jax.jit(lambda x: x * 3).lower(jnp.zeros(())).compile()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    names = {path.name for path in tmp_path.glob("*-cache")}
    assert any("lambda" in name for name in names)
    assert not any("train_step" in name for name in names)


def test_every_gpu_among_the_chips_has_its_figures() -> None:
    assert set(GPUS) == {chip.name for chip in CHIPS.values() if chip.topology is None}
    for name, gpu in GPUS.items():
        # The maker's round figure is a little less than what the driver finds.
        assert 1.0 < gpu.memory / CHIPS[name].memory < 1.08
        assert gpu.bandwidth == pytest.approx(CHIPS[name].memory_bandwidth, rel=0.05)
        assert f"device_memory_size: {gpu.memory}" in target_config(gpu)


@pytest.mark.skipif(not HAS_CUDA, reason="JAX's CUDA plugin is in the cuda extra only")
@pytest.mark.parametrize("chip", sorted(GPUS))
def test_a_gpu_s_compiler_lays_the_step_out(chip: str) -> None:
    program = (
        "import sys\n"
        "from kava_jax.plan.planning import compile_for, virtual_devices\n"
        "virtual_devices(16)\n"
        "from kava_jax.config.file import load_config\n"
        "from kava_jax.plan.chips import find_chip\n"
        "from kava_jax.plan.compiled import memory_of\n"
        "from kava_jax.plan.program import work_of\n"
        "sizes = ['mesh.data=1', 'mesh.fsdp=8', 'mesh.tensor=2']\n"
        "program = compile_for(load_config('tiny.yaml', sizes), find_chip(sys.argv[1]))\n"
        "products = work_of(program.as_text()).products\n"
        "print(memory_of(program).temporaries, set(products))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, chip], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    temporaries, dtypes = done.stdout.split(" ", 1)
    assert int(temporaries) > 0
    assert dtypes.strip() == "{'bf16'}"
