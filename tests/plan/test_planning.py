"""A plan against the run itself: bytes of live arrays, other batches, other numbers of devices."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
import yaml

from kava_jax.config.file import parse_config
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from kava_jax.plan import planning
from kava_jax.plan.chips import CHIPS, find_chip, topology_name
from kava_jax.plan.compiled import QUICK, compile_step, held, lowered, memory_of
from kava_jax.plan.floor import layer_flops, step_floor
from kava_jax.plan.planning import Plan, make_plan, search
from kava_jax.plan.show import render, render_search
from kava_jax.runs.blueprint import make_blueprint
from kava_jax.runs.prepare import load_dataset, models_without_weights, prepare
from tests.tiny import CONFIG, kava, write_model, write_workspace

H100 = find_chip("H100")
NAMED = Path(__file__).resolve().parents[2] / "configs" / "qwen2.5_14b_to_1.5b_gsm8k.yaml"


def config(*overrides: str, **sections: dict) -> Config:
    return parse_config(CONFIG | sections, [*overrides])


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(write_workspace(tmp_path))
    return tmp_path


def plan(memory: float = 80e9, *overrides: str) -> Plan:
    return make_plan(config("mesh.fsdp=2", "mesh.tensor=2", *overrides), H100, memory, print)


def test_a_mesh_that_several_slices_of_tpus_would_refuse_is_refused(workspace) -> None:
    pair_of_slices = find_chip("v5e")._replace(domain=4)
    with pytest.raises(KavaError, match=r"mesh.data=1 is not divisible by the 2 slices"):
        make_plan(config("mesh.data=1", "mesh.fsdp=-1"), pair_of_slices, 16e9, print)


def test_planned_bytes_are_those_of_the_live_arrays(workspace) -> None:
    wanted = config("mesh.fsdp=2", "mesh.tensor=2", "data.bucket=64")
    run = prepare(wanted)
    batch = put_batch(load_dataset(run).stream.batch(0), run.mesh)
    rows, length = batch.tokens.shape
    state, teachers = run.blueprint.fresh_state(), run.blueprint.load_teachers()
    live = {
        "teachers": teachers,
        "student": state.params["student"],
        "projector": state.params["projector"],
        "optimizer": state.opt_state,
        "statistics": state._replace(params={}, opt_state=()),
        "batch": batch,
    }
    device = jax.devices()[5]
    on_device = {
        name: sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        for name, tree in live.items()
    }
    planned = make_blueprint(wanted, run.mesh, models_without_weights(wanted), {})
    assert held(planned, rows, length) == on_device
    arguments = compile_step(planned, rows, length)[1].arguments
    # What the step does not read (nothing here is large) the compiler leaves out.
    assert arguments == pytest.approx(sum(on_device.values()), rel=0.02)


def test_a_plan_needs_no_weights(workspace) -> None:
    for weights in workspace.rglob("*.safetensors"):
        weights.unlink()
    assert plan().verdict == "fits"


@pytest.mark.long
def test_memory_of_another_batch_is_on_the_line(workspace) -> None:
    """The largest batch that surely fits does, and the one after it may not."""
    whole = plan()
    fixed = whole.peak.most - whole.temporaries.most
    room = 4 * whole.temporaries.most
    surely, at_best = plan(fixed + room).largest_batch
    assert 8 <= surely < at_best
    wide = config("mesh.fsdp=2", "mesh.tensor=2")
    blueprint = make_blueprint(wide, make_mesh(2, 2, 2), models_without_weights(wide), {})
    # Compiled as the estimate is: other options give other temporaries.
    in_need = {
        rows: memory_of(lowered(blueprint, rows, 64).compile(QUICK)).temporaries
        for rows in (surely, 2 * surely)
    }
    assert in_need[surely] <= 1.05 * room
    assert in_need[2 * surely] > room


@pytest.mark.long
def test_where_the_kv_weight_is_measured_the_step_that_does_so_is_planned(workspace) -> None:
    def steps(weight: str) -> list:
        wanted = config(f"loss.kv_weight={weight}")
        blueprint = make_blueprint(wanted, make_mesh(), models_without_weights(wanted), {})
        return [lowered(blueprint, 8, 64, dearest=dearest) for dearest in (False, True)]

    plain, dearest = (memory_of(step.compile(QUICK)).temporaries for step in steps("auto(0.2)"))
    assert dearest > plain
    plain, dearest = (step.as_text() for step in steps("0.2"))
    assert dearest == plain


@pytest.mark.long
def test_the_verdict_follows_the_memory(workspace) -> None:
    peak = plan().peak
    assert plan(peak.most).verdict == "fits"
    assert plan((peak.least + peak.most) / 2).verdict == "may fit"
    assert plan(peak.least - 1).verdict == "does not fit"


def test_the_floor_by_hand(workspace) -> None:
    wanted = config("projector.kind=linear", "projector.direction=student_to_teacher")
    blueprint = make_blueprint(wanted, make_mesh(), models_without_weights(wanted), {})
    # Width 16, 4 query and 2 KV heads of 4, feed-forward 32: q, o, k, v and three of the MLP.
    weights = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32
    layer = 2 * weights + 2 * 2 * 16 * (64 + 1) / 2
    assert layer_flops(blueprint.student_spec, 64) == layer
    floor = step_floor(blueprint, rows=8, length=64, targets=100)
    tokens = 8 * 64
    # The teacher has 3 layers; its last one only writes keys and values.
    assert floor["teachers"] == tokens * (2 * layer + 2 * 16 * 8 * 2)
    assert floor["student"] == 3 * tokens * 2 * layer
    assert floor["heads"] == 3 * 2 * 16 * 512 * 100
    # Keys' and values' maps 8 -> 8 meet both layers; forward, and backward to weights and input.
    assert floor["projector"] == 3 * 2 * tokens * 2 * (8 * 8 + 8 * 8)


def test_the_program_does_little_more_than_the_floor(workspace) -> None:
    found = plan()
    # Attention is computed over the whole square, the floor counts the causal half.
    assert 1.0 <= found.flops_over_floor < 1.25


@pytest.mark.long
def test_search_ranks_what_fits(workspace, monkeypatch) -> None:
    # A step is compiled for every mesh: of one layer each, and without those of other batches, on
    # whose line the memory lies in another test.
    rough = planning.Range(0.0, 1e5)
    monkeypatch.setattr(planning, "_estimate", lambda *_: (rough, (8, 8)))
    for name, seed in (("teacher", 1), ("student", 2)):
        write_model(workspace / name, seed=seed, num_hidden_layers=1)
    said: list[str] = []
    plans = search(config("mesh.data=1", "mesh.fsdp=-1"), H100, 1e8, said.append)
    # Two KV heads and eight rows of a batch: no tensor axis of 4, every other split of 8.
    assert sorted(tuple(one.mesh.values()) for one in plans) == [
        (1, 4, 2), (1, 8, 1), (2, 2, 2), (2, 4, 1), (4, 1, 2), (4, 2, 1), (8, 1, 1)
    ]  # fmt: skip
    slowest = [one.time["most"] for one in plans]
    assert slowest == sorted(slowest)
    assert len(said) == 7
    assert all(line.endswith(": fits") for line in said)
    text = render_search(plans)
    assert text.startswith("meshes that fit, the fastest first")
    assert text.endswith(render(plans[0]))


def test_search_without_room(workspace, capsys, monkeypatch) -> None:
    monkeypatch.setattr(planning, "held", lambda *_: {"student": 2e9})
    ended = kava(capsys, "plan", "tiny.yaml", "--devices", "8", "--search", "--hbm", "1")
    assert ended.code == 2
    assert "no mesh of so many devices with 1 GB fits data.batch_size=8" in ended.err


def test_a_search_tells_a_missing_model_as_such(workspace, capsys) -> None:
    missing = "teachers.0.path=nobody/nothing"
    ended = kava(capsys, "plan", "tiny.yaml", missing, "--devices", "8", "--search")
    assert ended.code == 2
    assert "was not found here; give a directory" in ended.err


def test_the_words_of_a_plan(workspace) -> None:
    text = render(plan(1e9))
    assert text.startswith("tiny on 8 x h100 (data=2, fsdp=2, tensor=2), 8 rows x 64 tokens a step")
    assert "fits in 1 GB" in text
    assert "largest batch in 8 x 1 GB" in text
    for kind in ("all-gather, GB", "all-reduce, GB", "reduce-scatter, GB"):
        assert kind in text
    assert "assumed:" in text


def test_topologies_hold_as_many_chips_as_they_say() -> None:
    for chip in CHIPS.values():
        for devices in (1, 4, 64, 256):
            name = topology_name(chip, devices)
            assert (name is None) == (chip.topology is None)
            if name is not None:
                sizes = name.split(":")[1].split("x")
                assert eval("*".join(sizes)) == devices
    assert topology_name(CHIPS["v5e"], 7) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chip", "h1000"], "--chip='h1000' is unknown; use one of v5e, v5p"),
        (["--devices", "4"], "--devices=4: this process already sees 8 devices"),
        (
            ["--devices", "8", "--mesh", "data=3"],
            "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not",
        ),
        (["--devices", "8", "--mesh", "rows=3"], "mesh.rows is not a known field"),
        (["--devices", "8", "data.batch_size=12"], "data.batch_size=12 is not divisible by 8"),
        (["--devices", "8", "--mesh", "tensor=8"], "or mesh.indivisible=replicate"),
        (
            ["--devices", "8", "teachers.0.path=nobody/nothing"],
            "was not found here; give a directory",
        ),
    ],
)
def test_bad_input_is_told(workspace, capsys, arguments: list[str], words: str) -> None:
    ended = kava(capsys, "plan", "tiny.yaml", *arguments)
    assert ended.code == 2, ended.out
    assert words in ended.err
    assert ended.err.count("\n") == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from kava_jax.cli import main; main()", *arguments]


def test_weights_and_moments_of_the_named_job_shrink_with_the_devices() -> None:
    """From 64 to 256 devices: at least 3.8 of 4 times."""
    program = (
        "import sys, jax\n"
        "from kava_jax.plan.planning import virtual_devices\n"
        "virtual_devices(int(sys.argv[1]))\n"
        "from kava_jax.config.file import load_config\n"
        "from kava_jax.parallel.mesh import make_mesh\n"
        "from kava_jax.plan.compiled import held\n"
        "from kava_jax.runs.prepare import models_without_weights\n"
        "from kava_jax.runs.blueprint import make_blueprint\n"
        f"config = load_config({str(NAMED)!r}, ['data.batch_size=256'])\n"
        "models = models_without_weights(config)\n"
        "found = held(make_blueprint(config, make_mesh(1, -1, 1), models, {}), 256, 512)\n"
        "print(sum(found[name] for name in ('teachers', 'student', 'projector', 'optimizer')))\n"
    )
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", program, str(devices)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for devices in (64, 256)
    )
    assert few / many >= 3.8


@pytest.mark.long
def test_the_named_job_is_planned_in_a_process_of_its_own(tmp_path) -> None:
    done = subprocess.run(
        command("plan", str(NAMED), "--devices", "16", "--mesh", "fsdp=16", "--json"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 1, "fsdp": 16, "tensor": 1}
    # Remat of everything but matrix products repeats attention alone.
    assert 1.0 < found["flops_over_floor"] < 1.1
    # Every device gathers what it lacks of the teacher (bfloat16) once.
    assert found["messages"]["all-gather"] > 15 * found["held"]["teachers"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is in the tpu extra only")
def test_a_tpu_is_asked_for_its_own_layout(workspace) -> None:
    raw = CONFIG | {"mesh": {"fsdp": 4, "data": 1}}
    Path("four.yaml").write_text(yaml.safe_dump(raw))
    done = subprocess.run(
        command("plan", "four.yaml", "--devices", "4", "--chip", "v5e", "--json"),
        capture_output=True,
        text=True,
        # Flags of the tests' own compiler, which this one does not know.
        env=os.environ | {"XLA_FLAGS": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exact"]
    assert found["temporaries"]["least"] == found["temporaries"]["most"] > 0
