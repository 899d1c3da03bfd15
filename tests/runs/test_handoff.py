"""``loss.handoff`` as people use it: training, what it leaves alone, and what it refuses."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from kava_jax.config.file import load_config
from kava_jax.data.batches import collate
from kava_jax.data.dataset import HeldOut
from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError
from kava_jax.evaluation.heldout import make_measure
from kava_jax.hf.handoff_files import dynamic_cache, load_handoff
from kava_jax.journal.checkpoint import Checkpoints
from kava_jax.journal.metrics_file import read_metrics
from kava_jax.models.decoder import Params
from kava_jax.models.generate import generate
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.parallel.sharding import put_batch
from kava_jax.runs.handed import assess_handed
from kava_jax.runs.idle import check_prompts, idle_settings
from kava_jax.runs.prepare import load_dataset, prepare
from kava_jax.runs.reopen import reopen, restore
from kava_jax.runs.student_export import export
from kava_jax.runs.train import train
from kava_jax.training.summary import summarize
from tests.tiny import CONFIG, kava, write_config, write_model, write_rows, write_workspace
from tests.tiny_models import load_decoder
from tests.tolerances import TOL

DATA = CONFIG["data"] | {"eval_path": "held.jsonl"}
HEADS = {"num_key_value_heads": 4, "head_dim": 6, "rope_theta": 500.0}
# The gradients of both are quick to compare; whole runs of the second are long.
READERS = ["teacher", pytest.param("student", marks=pytest.mark.long)]
ROWS = ((14, 5), (9, 3), (11, 8), (6, 1))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    made_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_in(folder) -> None:
    """A teacher of other heads and depth than the student's."""
    write_workspace(folder)
    write_model(folder / "teacher", seed=1, num_hidden_layers=3, **HEADS)
    write_rows(folder / "held.jsonl", 8, seed=5)
    configured(folder)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A run of the workspace, trained and exported once."""
    folder = tmp_path_factory.mktemp("handed")
    made_in(folder)
    trained = load_config(folder / "tiny.yaml", [f"run.dir={folder / 'run'}"])
    with contextlib.chdir(folder):
        run = train(trained, ["kava", "train", "tiny.yaml"])
        export(run.run, run.state.params["student"], 2, folder / "out")
    return folder


@pytest.fixture
def used(once, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(folder, handoff=None, loss=None, **sections) -> None:
    loss = {"kv_weight": 0.0, "handoff": handoff or {}} | (loss or {})
    write_config(folder / "tiny.yaml", **({"data": DATA, "loss": loss} | sections))


def rows_of(count: int = 4):
    rng = np.random.default_rng(1)
    rows = [Encoded(rng.integers(3, 500, n).astype(np.int32), p, False) for n, p in ROWS[:count]]
    return jax.tree.map(jnp.asarray, collate(rows, 14, pad_id=0, sink_tokens=0))


def evaluations(folder, run: str = "run"):
    return list(read_metrics(folder / run / "metrics.jsonl", "eval"))


def projector_of(run) -> Params:
    """Random kernels and biases, large enough that a mistake in either is seen."""
    rng = np.random.default_rng(3)
    shapes = run.blueprint.abstract_state().params["handoff"]
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), shapes)


def rotated(keys, model, sign):
    """Keys [1, K, T, H] of transformers' cache turned by RoPE (sign 1), or back (-1)."""
    import torch

    positions = torch.arange(keys.shape[2])[None]
    cos, sin = (x.double() for x in model.model.rotary_emb(keys, positions))
    half = keys.shape[-1] // 2
    other = torch.cat([-keys[..., half:], keys[..., :half]], -1)
    return keys * cos[:, None] + sign * other * sin[:, None]


def by_transformers(run, params, reader: str):
    """Cross-entropy of every answer, and its gradients, by transformers: row by row, unpadded.

    The reader reads the prompt but for its last token; its cache is turned back, mapped, turned
    for the answerer and handed over as ``past_key_values``.
    """
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(1)
    names = ("teacher", "student") if reader == "teacher" else ("student", "teacher")
    reads, answers = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64, attn_implementation="eager")
        for name in names
    )
    pair = {
        part: {
            leaf: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
            for leaf, value in params["handoff"]["pairs"]["big"][part]["out"].items()
        }
        for part in "kv"
    }
    rows = run.blueprint.objective.handoff.maps["big"].teacher_layers

    total, count = 0.0, 0
    batch = rows_of()
    for b, (length, prompt) in enumerate(ROWS):
        ids = torch.tensor(np.asarray(batch.tokens[b, :length]))[None].long()
        handed = max(0, prompt - 1)
        past = DynamicCache()
        if handed:
            cache = reads(ids[:, :handed], use_cache=True).past_key_values
            heads = answers.config.num_key_value_heads
            for layer, (source,) in enumerate(rows):
                keys = rotated(cache.layers[source].keys, reads, -1)
                mapped = []
                for part, x in (("k", keys), ("v", cache.layers[source].values)):
                    flat = x.transpose(1, 2).flatten(2)
                    flat = flat @ pair[part]["kernel"][layer] + pair[part]["bias"][layer]
                    mapped.append(flat.unflatten(2, (heads, -1)).transpose(1, 2))
                past.update(rotated(mapped[0], answers, 1), mapped[1], layer)
        positions = torch.arange(handed, length)[None]
        out = answers(ids[:, handed:], past_key_values=past, position_ids=positions)
        first = max(prompt, 1)
        logits = out.logits[0, first - 1 - handed : length - 1 - handed]
        total = total + torch.nn.functional.cross_entropy(
            logits, ids[0, first:length], reduction="sum"
        )
        count += length - first
    loss = total / count
    loss.backward()
    return loss.item(), pair, answers if reader == "teacher" else reads


@pytest.mark.parametrize("reader", ["teacher", "student"])
def test_loss_and_gradients_are_those_of_transformers(reader, workspace):
    configured(workspace, {"reader": reader})
    run = prepare(load_config(workspace / "tiny.yaml"))
    state, teachers = run.blueprint.fresh_state(), run.blueprint.load_teachers()
    params = state.params | {"handoff": projector_of(run)}
    objective, batch = run.blueprint.objective, rows_of()
    everyone = jnp.ones(len(ROWS), bool)

    @jax.jit
    def loss(params):
        known = (params, teachers, batch, jnp.int32(0), (1.0, 1.0), state.statistics)
        (alone, _), _ = objective(*known)
        (language, _), (metrics, _) = objective(*known, handed_B=everyone)
        # With the student as the reader, its own reading is counted as well.
        return language - (alone if reader == "student" else 0.0), metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    expected, pair, student = by_transformers(run, params, reader)
    name = "ce_handed" if reader == "teacher" else "big/ce_handed"
    assert float(value) == pytest.approx(expected, rel=TOL["float32"])
    assert float(metrics[name].value) == pytest.approx(expected, rel=TOL["float32"])
    for part, leaves in pair.items():
        for leaf, theirs in leaves.items():
            ours = gradient["handoff"]["pairs"]["big"][part]["out"][leaf]
            np.testing.assert_allclose(ours, theirs.grad, rtol=TOL["parity"], atol=TOL["float32"])
    # The student is where the gradient goes: as the answerer, and as the reader.
    for layer in range(2):
        theirs = student.model.layers[layer].self_attn.v_proj.weight.grad.numpy()
        ours = gradient["student"]["blocks"]["attention"]["v"]["kernel"][layer].reshape(16, -1).T
        np.testing.assert_allclose(ours, theirs, rtol=TOL["parity"], atol=TOL["float32"])


def test_a_model_that_is_handed_its_own_cache_loses_nothing(workspace, capsys):
    """Equal models, identity: no parameters, and the loss is the same either way."""
    configured(workspace, teachers=[{"name": "big", "path": "student"}])
    ended = kava(capsys, "train", "tiny.yaml", "optimizer.student_lr=0")
    assert ended.code == 0, ended.err
    for figures in evaluations(workspace):
        assert figures["eval_loss_handed"] == pytest.approx(
            figures["eval_loss"], rel=TOL["float32"]
        )
    assert "handed over" in ended.out + ended.err


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_only_the_projector_learns_where_that_is_asked(reader, workspace, capsys):
    configured(workspace, {"train": "projector", "reader": reader})
    changes = ("optimizer.projector_lr=3e-3", "train.steps=6", "train.eval_every=2")
    ended = kava(capsys, "train", "tiny.yaml", *changes)
    assert ended.code == 0, ended.err
    first, *between, last = evaluations(workspace)
    assert last["eval_loss_handed"] < first["eval_loss_handed"]
    best = min([*between, last], key=lambda one: one["eval_loss_handed"])
    with Checkpoints(Path("run"), 1, read_only=True) as kept:
        assert kept.choose("best") == best["step"]
    assert last["eval_loss"] == first["eval_loss"]
    assert kava(capsys, "export", "run", "--out", "out").code == 0
    before, after = (load_file(f"{name}/model.safetensors") for name in ("student", "out"))
    assert {name: x.tobytes() for name, x in before.items()} == {
        name: x.tobytes() for name, x in after.items()
    }


@pytest.mark.long
def test_both_learn_and_a_resumed_run_is_an_uninterrupted_one(workspace, capsys):
    configured(workspace, {"weight": {"start": 0.5, "end": 2.0}})
    assert kava(capsys, "train", "tiny.yaml", "train.steps=4", "run.dir=whole").code == 0
    parts = ("train", "tiny.yaml", "train.steps=4", "run.dir=parts")
    assert kava(capsys, *parts, "train.stop_after=2").code in (0, 2)
    assert kava(capsys, *parts).code == 0
    whole, in_parts = evaluations(workspace, "whole"), evaluations(workspace, "parts")
    assert whole[-1]["eval_loss_handed"] == in_parts[-1]["eval_loss_handed"]
    assert whole[-1]["eval_loss_handed"] < whole[0]["eval_loss_handed"]


REFUSED = {
    "no teacher": ({}, {"teachers": []}, "loss.handoff without teachers"),
    "outputs": ({}, {"loss": {"match": "block_outputs"}}, "match=block_outputs with handoff"),
    "attention": ({}, {"loss": {"match": "attention"}}, "match=attention with handoff"),
    "all alone": ({"alone_share": 1.0}, {}, "loss.handoff.alone_share=1"),
    "a share that is no row": (
        {"alone_share": 0.01},
        {},
        "loss.handoff.alone_share=0.01 leaves 0 of data.batch_size=8 rows to be read alone",
    ),
    "a share that is all rows": (
        {"alone_share": 0.99},
        {},
        "loss.handoff.alone_share=0.99 leaves 8 of data.batch_size=8 rows to be read alone",
    ),
    "a layer without a source": (
        {"layer_map": [[0, 1]]},
        {},
        "loss.handoff.layer_map: layers [0] of the answerer have no source",
    ),
    "a source that is not there": (
        {"layer_map": [[0, 0], [3, 1]]},
        {},
        "loss.handoff.layer_map: pairs [[3, 1]] are outside",
    ),
    "origins that are not known": ({"layer_map": "origin"}, {}, "loss.handoff.layer_map='origin'"),
    "nothing to learn": (
        {"train": "projector"},
        {"teachers": [{"name": "big", "path": "student"}]},
        "loss.handoff.train=projector: the heads of all models are equal",
    ),
    "too few rows": (
        {},
        {"data": DATA | {"rows": 7}},
        "data.path=data.jsonl: 7 training rows are too few to fit loss.handoff's projector with; "
        "give at least 8",
    ),
    "plain text": (
        {},
        {"data": DATA | {"fields": [None, "answer"]}},
        "loss.handoff: 88 of 88 training rows have no prompt",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name, workspace, capsys):
    handoff, sections, words = REFUSED[name]
    configured(workspace, handoff, **sections)
    ended = kava(capsys, "train", "tiny.yaml")
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (workspace / "run").exists()


def test_a_share_that_no_one_reads_is_told(workspace):
    share = "loss.handoff.alone_share=0.2"
    for field in ("reader=student", "train=projector"):
        config = load_config(workspace / "tiny.yaml", [f"loss.handoff.{field}", share])
        told = [note for note in idle_settings(config) if note.startswith(f"{share} does nothing")]
        assert len(told) == 1
        assert config.loss.handoff is not None
        assert config.loss.handoff.read_alone == 0
    config = load_config(workspace / "tiny.yaml", [share])
    assert config.loss.handoff is not None
    assert config.loss.handoff.read_alone == 0.2
    assert not any("handed over" in note or "alone_share" in note for note in idle_settings(config))


def test_a_weight_of_what_is_not_compared_is_told(workspace):
    idle = "loss.kv_weight does nothing: every row is handed over, none is compared"
    for change in ("train=projector", "alone_share=0"):
        for weight, told in ((1, [idle]), (0, [])):
            changes = [f"loss.handoff.{change}", f"loss.kv_weight={weight}"]
            notes = idle_settings(load_config(workspace / "tiny.yaml", changes))
            assert [note for note in notes if note.startswith("loss.kv_weight")] == told


def test_rows_with_several_replies_are_refused():
    ids, trained = np.arange(9, dtype=np.int32), np.arange(9) % 4 > 1
    whole, several = Encoded(ids, 3, False), Encoded(ids, 2, False, trained)
    check_prompts({"training": [whole]})
    with pytest.raises(
        KavaError, match=r"1 of 2 held-out rows have several replies.*train_on=last"
    ):
        check_prompts({"training": [whole], "held-out": [whole, several]})


def transformers_answers(student, cache, prompts, count: int):
    """Greedy tokens of a torch model that goes on from a cache, row by row, ends not minded."""
    import torch

    found = []
    for b, prompt in enumerate(prompts):
        own = slice(1 - len(prompt), None)
        one = jax.tree.map(lambda x, b=b, own=own: x[:, b : b + 1, own], cache)
        ids = torch.from_numpy(np.asarray(prompt)).long()[None]
        out = student.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=dynamic_cache(one),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def test_the_exported_handoff_gives_transformers_our_answers(used):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    handoff = load_handoff(used / "out", {"big": used / "teacher"})
    state = restore(reopen(used / "run"))
    trained = state.params["handoff"]["pairs"]["big"]["v"]["out"]["kernel"]
    np.testing.assert_array_equal(handoff.projector.pairs["big"]["v"].out.kernel[...], trained)

    rng = np.random.default_rng(9)
    prompts = [rng.integers(3, 500, n).astype(np.int32) for n in (9, 4, 7)]
    tokens, valid = np.zeros((3, 9), np.int32), np.zeros((3, 9), bool)
    for b, prompt in enumerate(prompts):
        tokens[b, 9 - len(prompt) :], valid[b, 9 - len(prompt) :] = prompt, True
    teacher, student = (load_decoder(used / name) for name in ("teacher", "out"))
    positions = token_positions(jnp.asarray(valid))
    before = (x[:, :-1] for x in (jnp.asarray(tokens), positions, jnp.asarray(valid)))
    ids, places, real = before
    mask = attention_mask(places, places, real)
    _, cache = teacher(ids, places, mask, key_space="pre_rope")
    past = handoff({"big": cache}, student.rotation(places))
    graph, params = nnx.split(student)
    ours = generate(
        graph,
        nnx.to_pure_dict(params),
        tokens,
        valid,
        max_new_tokens=8,
        eos_ids=(),
        pad_id=0,
        past=past,
    )
    torch.set_num_threads(1)
    theirs = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    assert np.asarray(ours).tolist() == transformers_answers(theirs, past, prompts, 8)
    alone = generate(
        graph, nnx.to_pure_dict(params), tokens, valid, max_new_tokens=8, eos_ids=(), pad_id=0
    )
    assert np.asarray(alone).tolist() != np.asarray(ours).tolist()

    with pytest.raises(
        KavaError, match="past: a cache of 3 rows of 8 tokens for a prompt of 3 rows"
    ):
        generate(
            graph,
            nnx.to_pure_dict(params),
            tokens[:, 1:],
            valid[:, 1:],
            max_new_tokens=2,
            eos_ids=(),
            pad_id=0,
            past=past,
        )
    long = jnp.zeros((1, 257), jnp.int32)
    with pytest.raises(
        KavaError, match="past: a prompt of 257 tokens for a model of max_position_"
    ):
        generate(
            graph,
            nnx.to_pure_dict(params),
            long,
            long == 0,
            max_new_tokens=2,
            eos_ids=(),
            pad_id=0,
            past=jax.tree.map(lambda x: jnp.zeros((2, 1, 256, *x.shape[3:])), past),
        )
    with pytest.raises(KavaError, match="caches: those of big are missing"):
        handoff({"small": cache}, student.rotation(places))
    fewer = jax.tree.map(lambda x: x[:1], cache)
    with pytest.raises(KavaError, match="the cache ends with layer 0"):
        handoff({"big": fewer}, student.rotation(places))


def test_the_example_of_the_page(used):
    """As it is printed, but for the teacher's name and the length of an answer."""
    page = (Path(__file__).parents[2] / "docs" / "handoff.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code.strip().splitlines()) <= 12
    tokens, valid = jnp.full((2, 6), 5), jnp.asarray([[False] * 2 + [True] * 4, [True] * 6])
    known = {"tokens": tokens, "valid": valid}
    for said, here in (("tokens=64", "tokens=3"), ('"teacher":', '"big":')):
        code = code.replace(said, here)
    exec(code, known)
    assert known["new"].shape == (2, 3)


def test_an_exported_handoff_is_for_its_own_teacher(used, capsys):
    workspace, out = used, used / "out"
    # The export needs no teacher.
    (workspace / "teacher").rename(workspace / "moved")
    assert kava(capsys, "export", "run", "--out", "again").code == 0
    for file in ("handoff.json", "handoff.safetensors"):
        assert (workspace / "again" / file).read_bytes() == (out / file).read_bytes()
    assert "answer from its teacher's prompt cache" in (out / "README.md").read_text()
    load_handoff(out, {"big": workspace / "moved"})
    with pytest.raises(
        KavaError, match=r"teachers\.big='.*student' is another model than 'teacher'"
    ):
        load_handoff(out, {"big": workspace / "student"})
    with pytest.raises(KavaError, match="teachers=other: out was trained with big"):
        load_handoff(out, {"other": workspace / "moved"})
    record = json.loads((out / "handoff.json").read_text())
    record["teachers"]["big"]["layer_map"]["student_layers"] = [1, 0]
    (out / "handoff.json").write_text(json.dumps(record))
    with pytest.raises(KavaError, match=r"out/handoff\.json is no record of a handoff .*increase"):
        load_handoff(out, {"big": workspace / "moved"})
    (out / "handoff.json").unlink()
    with pytest.raises(KavaError, match=r"out/handoff\.json is unreadable"):
        load_handoff(out, {"big": workspace / "moved"})


@pytest.mark.parametrize("reader", READERS)
def test_eval_scores_all_three(reader, used, capsys):
    workspace = used
    if reader == "student":
        shutil.rmtree(workspace / "run")
        configured(workspace, {"reader": reader})
        assert kava(capsys, "train", "tiny.yaml").code == 0
    asked = ("eval", "run", "--data", "held.jsonl", "--handoff", "--json")
    ended = kava(capsys, *asked)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    expected = evaluations(workspace)[-1]
    for name in ("eval_loss", "eval_loss_handed"):
        assert found[name] == pytest.approx(expected[name], rel=TOL["float32"])
    teacher = kava(
        capsys, "eval", "teacher", "--data", "held.jsonl", "--json", "data.max_length=64"
    )
    alone = json.loads(teacher.out)
    assert found["big/eval_loss"] == pytest.approx(alone["eval_loss"], rel=TOL["float32"])
    for prefix in ("", "handed/", "big/"):
        assert found[f"{prefix}exact_match_rows"] == 8
        assert found[f"{prefix}seconds_per_answer"] > 0
    assert kava(capsys, "eval", "student", "--data", "held.jsonl", "--handoff").code == 2
    write_model(workspace / "teacher", seed=7, num_hidden_layers=3, **HEADS)
    refused = kava(capsys, *asked)
    assert refused.code == 2
    assert "teachers.big='teacher' is another model" in refused.err


def test_a_run_without_a_handoff_hands_nothing_over(workspace):
    config = load_config(workspace / "tiny.yaml", ["loss.handoff=null"])
    with pytest.raises(KavaError, match=r"run was trained without loss\.handoff"):
        assess_handed(prepare(config), HeldOut([], ()), {}, {})


def stepped(folder, *overrides: str, steps: int = 2):
    """Losses and parameters after a few steps, without a run directory."""
    run = prepare(load_config(folder / "tiny.yaml", list(overrides)))
    state, teachers = run.blueprint.fresh_state(), run.blueprint.load_teachers()
    step, stream = run.blueprint.jitted_step(), load_dataset(run).stream
    found = []
    for number in range(steps):
        batch = put_batch(stream.batch(number), run.mesh)
        state, metrics = step(state, teachers, batch)
        found.append(summarize(metrics))
    return found, jax.device_get(state.params)


PLAIN = ("optimizer.student_lr=1e-3", "optimizer.warmup_steps=0", "data.batch_size=16")


@pytest.mark.long
@pytest.mark.parametrize("reader", ["teacher", "student"])
def test_meshes_and_microbatches_change_nothing(reader, workspace):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    write_model(workspace / "student", seed=2, **heads)
    write_model(workspace / "teacher", seed=1, num_hidden_layers=3, **heads | {"head_dim": 16})
    # All rows alike: which are read alone differs by microbatch.
    configured(workspace, {"reader": reader, "alone_share": 0.0})
    one, _ = stepped(workspace, *PLAIN)
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    for others in (mesh, ("train.grad_accumulation=2",)):
        found, _ = stepped(workspace, *PLAIN, *others)
        for ours, theirs in zip(found, one, strict=True):
            for name in ("loss", "ce_handed"):
                assert ours[name] == pytest.approx(theirs[name], rel=TOL["across_meshes"])


def handed_loss(folder, *overrides: str) -> float:
    """Of the fresh run's first batch, all of it handed over."""
    run = prepare(load_config(folder / "tiny.yaml", list(overrides)))
    state, teachers = run.blueprint.fresh_state(), run.blueprint.load_teachers()
    batch = put_batch(load_dataset(run).stream.batch(0), run.mesh)
    measure = make_measure(run.blueprint.objective, run.mesh)
    found = measure(state.params, teachers, state.statistics, batch)
    return float(found["ce_handed"].value)


def test_in_bfloat16_it_is_the_same_but_for_rounding(workspace):
    narrow, wide = (handed_loss(workspace, f"train.dtype={d}") for d in ("bfloat16", "float32"))
    assert narrow == pytest.approx(wide, rel=TOL["bf16_loss"])
    assert narrow != wide


@pytest.mark.long
def test_several_teachers_share_by_weight(workspace):
    """One that counts nothing is as one that is not there."""
    teachers = [{"name": "big", "path": "teacher"}, {"name": "idle", "path": "student"}]
    configured(workspace, teachers=teachers)
    both, mean = handed_loss(workspace, "teachers.1.weight=0"), handed_loss(workspace)
    configured(workspace, teachers=teachers[:1])
    alone = handed_loss(workspace)
    assert both == pytest.approx(alone, rel=TOL["float32"])
    assert abs(mean - alone) > 1e-4
