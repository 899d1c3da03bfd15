"""One, two and four real processes are one: whatever axis the mesh splits over them.

Each group of processes starts once and trains, evaluates, calibrates and exports for several
configs, one after the other. What one process does by itself is the answer they are held to.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny import CONFIG, JOINED, write_config, write_workspace
from tests.tolerances import TOL

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
MESHES = {
    "one": {"data": 1},
    "tensor2": {"data": 1, "tensor": 2},
    "fsdp2": {"data": 1, "fsdp": 2},
    "fsdp2-tensor2": {"data": 1, "fsdp": 2, "tensor": 2},
    "data2-tensor2": {"data": 2, "tensor": 2},
}
BATCHINGS = ("shuffled", "bucketed")
TIMED = ("seconds", "per_second", "share_of_time")
# What the loss is made of; everything else that is logged is a diagnostic.
EXACT = ("loss", "ce", "kv", "cos", "grad_norm", "tokens")

# The commands themselves, for several configs in one start of the processes.
DRIVER = """
import sys
from unittest import mock
from kava_jax.cli import main
from kava_jax.parallel.cluster import Cluster
from kava_jax.parallel.hosts import start
address, processes, process, *commands = sys.argv[1:]
if int(processes) > 1:
    start(Cluster(address, int(processes), int(process)))
for command in commands:
    if command == "check slices":  # that the runtime really sees several
        import jax
        assert len({device.slice_index for device in jax.devices()}) == 2
        continue
    with mock.patch.object(sys, "argv", ["kava", *command.split()]):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
"""


def run_group(
    workspace: Path, processes: int, devices: int, commands: list[str], prefix: tuple[str, ...] = ()
) -> None:
    """The commands by so many processes that share the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(workspace / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment |= JOINED if processes > 1 else {}
    started = [
        subprocess.Popen(
            [
                *(part.format(process=number) for part in prefix),
                *(sys.executable, "-c", DRIVER, address, str(processes), str(number), *commands),
            ],
            cwd=workspace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    for process, (_, words) in [(one, one.communicate()) for one in started]:
        assert process.returncode == 0, words


def commands_for(mesh: str, batching: str, run: str) -> list[str]:
    """Train on a mesh, and from bucketed rows calibrate and export, too."""
    config = f"{batching}.yaml " + " ".join(f"mesh.{k}={v}" for k, v in MESHES[mesh].items())
    training = f"train {config} run.dir={run}"
    if batching == "shuffled":
        return [training]
    calibration = f"calibrate {config} recipe=calibrated data.rows=16 run.dir={run}-fit"
    return [training, calibration, f"export {run} --out {run}-exported"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for each batching, and their runs by one process with one device."""
    place = write_workspace(tmp_path_factory.mktemp("processes"))
    for batching in BATCHINGS:
        write_config(
            place / f"{batching}.yaml",
            data=CONFIG["data"] | {"batching": batching, "bucket": 16},
            train={"steps": 6, "log_every": 1, "checkpoint_every": 6, "diagnose_every": 3},
            eval=CONFIG["eval"] | ({} if batching == "shuffled" else {"max_new_tokens": 0}),
        )
    alone = [
        command
        for batching in BATCHINGS
        for command in commands_for("one", batching, f"one-{batching}")
    ]
    run_group(place, 1, 1, alone)
    return place


def logged(run: Path) -> list[dict[str, Any]]:
    """All lines with their numbers flat by name; times and rates left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        flat = dict(numbers(json.loads(line)))
        lines.append({k: x for k, x in flat.items() if not any(word in k for word in TIMED)})
    return lines


def numbers(value: Any, name: str = "") -> Any:
    """``name -> number or text`` of a JSON document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{name}/{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, f"{name}.{index}")
    else:
        yield name, value


def is_exact(name: str) -> bool:
    return name.rpartition("/")[2].removeprefix("eval_").startswith(EXACT)


def assert_same_numbers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        if isinstance(b, float):
            close = TOL["across_processes"] if is_exact(name) else TOL["diagnostics"]
            assert abs(ours[name] - b) <= close * max(1.0, abs(b)), name
        else:
            assert ours[name] == b, name


@pytest.mark.parametrize(
    ("processes", "devices", "meshes"),
    [
        (2, 1, ["tensor2", "fsdp2"]),
        (2, 2, ["fsdp2-tensor2", "data2-tensor2"]),
        (4, 1, ["fsdp2-tensor2", "data2-tensor2"]),
    ],
)
def test_so_many_processes_are_one(
    workspace: Path, processes: int, devices: int, meshes: list[str]
) -> None:
    runs = {
        f"{processes}x{devices}-{mesh}-{batching}": (mesh, batching)
        for mesh in meshes
        for batching in BATCHINGS
    }
    commands = [c for run, chosen in runs.items() for c in commands_for(*chosen, run)]
    run_group(workspace, processes, devices, commands)
    for run, (_, batching) in runs.items():
        ours, theirs = logged(workspace / run), logged(workspace / f"one-{batching}")
        assert len(ours) == len(theirs) > 8
        for left, right in zip(ours, theirs, strict=True):
            assert_same_numbers(left, right)
        if batching == "bucketed":
            assert_same_calibration(workspace / f"{run}-fit", workspace / "one-bucketed-fit")
            assert_same_weights(workspace / f"{run}-exported", workspace / "one-bucketed-exported")


def assert_same_calibration(ours: Path, theirs: Path) -> None:
    found, expected = (
        dict(numbers(json.loads((run / "calibration" / "calibration.json").read_text())))
        for run in (ours, theirs)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=TOL["parity"], abs=TOL["parity"]), name
        else:
            assert found[name] == value, name


def assert_same_weights(ours: Path, theirs: Path) -> None:
    found, expected = (load_file(model / "model.safetensors") for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=TOL["after_one_step"])


def test_axes_cross_hosts_that_are_no_slices(workspace: Path) -> None:
    """JAX numbers "slices" by boot id, so here each process is given another one to read."""
    for number in range(2):
        (workspace / f"boot_id_{number}").write_text(f"{number:08d}-2222-3333-4444-555555555555\n")
    place = "/proc/sys/kernel/random/boot_id"
    script = f'mount --bind "$1" {place} && shift && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, "sh", "boot_id_{process}")
    trial = [part.format(process=0) for part in prefix]
    if subprocess.run([*trial, "true"], cwd=workspace, capture_output=True).returncode:
        pytest.skip("this user may not mount another boot_id over the machine's own")
    named = sorted(path for path in (ROOT / "configs").glob("*_gsm8k.yaml"))
    assert len(named) == 6
    smokes = [f"train {path} --smoke" for path in named]
    across = "train shuffled.yaml mesh.data=1 mesh.fsdp=-1 run.dir=two-hosts"
    run_group(workspace, 2, 1, ["check slices", across, *smokes], prefix)
    ours, theirs = logged(workspace / "two-hosts"), logged(workspace / "one-shuffled")
    for left, right in zip(ours, theirs, strict=True):
        assert_same_numbers(left, right)
    for path in named:
        assert logged(workspace / "runs" / f"{path.stem}-smoke")[-1]["kind"] == "eval"
