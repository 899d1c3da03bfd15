"""What a handoff's projector starts from: numpy's ridge regression on transformers' caches."""

import jax
import numpy as np
import pytest

from kava_jax.config.file import load_config
from kava_jax.data.tokenizer import builtin_tokenizer
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.export import export_model
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.parallel.mesh import make_mesh
from kava_jax.runs import prepare as preparation
from kava_jax.runs.calibrate import fitted_handoff
from kava_jax.runs.evaluate import evaluator
from kava_jax.runs.prepare import fingerprints_of, load_dataset, prepare
from kava_jax.runs.train import begun
from tests.runs.test_handoff import configured, rotated
from tests.tiny import GEOMETRY, write_model, write_rows, write_workspace
from tests.tolerances import TOL

RIDGE = 1e-4


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Two teachers of other heads than the student's, one of them deeper, too."""
    write_workspace(tmp_path)
    other = {"hidden_size": 32, "num_key_value_heads": 4, "head_dim": 6, "rope_theta": 500.0}
    write_model(tmp_path / "teacher", seed=1, num_hidden_layers=3, **other)
    write_model(tmp_path / "second", seed=4, **other)
    write_rows(tmp_path / "held.jsonl", 8, seed=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TWO = [{"name": "big", "path": "teacher"}, {"name": "more", "path": "second", "weight": 2.0}]


def fitted(folder, *overrides):
    """The projectors of all teachers, the training rows, and the layer maps."""
    run = prepare(load_config(folder / "tiny.yaml", list(overrides)))
    dataset = load_dataset(run)
    found = fitted_handoff(run, dataset)
    assert found is not None
    maps = run.blueprint.objective.handoff.maps
    return jax.device_get(found["pairs"]), dataset.stream.rows, maps


def caches(name, rows):
    """Keys before RoPE and values of the prompts but for their last tokens: [L, tokens, width].

    In float64, by transformers: row by row, unpadded, the keys turned back.
    """
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float64, attn_implementation="eager"
    )
    found = {"k": [], "v": []}
    for row in rows:
        ids = torch.tensor(np.asarray(row.ids[: row.prompt_length - 1]))[None].long()
        with torch.no_grad():
            layers = model(ids, use_cache=True).past_key_values.layers
        for part, vectors in (
            ("k", [rotated(layer.keys, model, -1) for layer in layers]),
            ("v", [layer.values for layer in layers]),
        ):
            found[part].append(np.stack([x[0].transpose(0, 1).flatten(1) for x in vectors]))
    return {part: np.concatenate(x, axis=1) for part, x in found.items()}


@pytest.mark.parametrize("reader", ["teacher", "student"])
def test_it_is_the_ridge_regression_of_the_answerers_cache_on_the_readers(reader, workspace):
    configured(workspace, {"reader": reader}, teachers=TWO)
    pairs, rows, maps = fitted(workspace)
    student = caches("student", rows)
    for name, directory in (("big", "teacher"), ("more", "second")):
        theirs = caches(directory, rows)
        reads, answers = (theirs, student) if reader == "teacher" else (student, theirs)
        for part in "kv":
            out = pairs[name][part]["out"]
            assert len(out["kernel"]) == len(answers[part]) == len(maps[name])
            for layer, (source,) in enumerate(maps[name].teacher_layers):
                x, y = reads[part][source], answers[part][layer]
                mean_x, mean_y = x.mean(0), y.mean(0)
                cov = (x - mean_x).T @ (x - mean_x) / len(x)
                penalty = RIDGE * np.diag(cov).mean() * np.eye(len(cov))
                cross = (x - mean_x).T @ (y - mean_y) / len(x)
                kernel = np.linalg.solve(cov + penalty, cross)
                bias = mean_y - mean_x @ kernel
                np.testing.assert_allclose(out["kernel"][layer], kernel, rtol=0, atol=TOL["ridge"])
                np.testing.assert_allclose(out["bias"][layer], bias, rtol=0, atol=TOL["ridge"])


@pytest.mark.parametrize("reader", ["teacher", "student"])
def test_it_is_the_same_on_one_device_and_on_eight(reader, workspace, monkeypatch):
    configured(workspace, {"reader": reader})
    found, *_ = fitted(workspace, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    monkeypatch.setattr(preparation, "make_mesh", lambda *_: make_mesh(1, 1, 1, jax.devices()[:1]))
    one, *_ = fitted(workspace)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOL["ridge"])


def write_doubled(folder, scale: float) -> None:
    """A student, and as its teacher the same model with every KV head twice."""
    params = load_decoder_params(folder / "student", read_spec(folder / "student"))
    params = jax.tree.map(lambda x: scale * np.asarray(x), params)
    known = {"dtype": "float32", "tokenizer": builtin_tokenizer(), "card": "doubled"}
    student = spec_from_config(GEOMETRY, where="tiny")
    export_model(folder / "known", params, student, **known)
    attention = params["blocks"]["attention"]
    for part in "kv":
        # [L, D, K, H] and [L, K, H]: each head is read by half of the query heads that read it.
        attention[part] = {name: np.repeat(x, 2, axis=-2) for name, x in attention[part].items()}
    doubled = spec_from_config(GEOMETRY | {"num_key_value_heads": 4}, where="tiny")
    export_model(folder / "doubled", params, doubled, **known)


def test_a_run_begins_from_it(workspace):
    """A teacher of the same function hands over what is at once as good as the student's own."""
    write_doubled(workspace, scale=3.0)
    sections = {"teachers": [{"name": "big", "path": "doubled"}], "student": {"path": "known"}}
    configured(workspace, **sections, eval={"max_new_tokens": 0, "batch_size": 8})
    config = load_config(workspace / "tiny.yaml")
    run = prepare(config)
    dataset = load_dataset(run)
    run, state = begun(config, run, dataset, fingerprints_of(run, dataset))
    evaluate = evaluator(run, dataset, run.blueprint.load_teachers(), lambda: None)
    fit = evaluate(state, 0).values
    random = state.params | {"handoff": run.blueprint.handoff.fresh(seed=2)}
    before = evaluate(state._replace(params=random), 0).values
    assert fit["eval_loss_handed"] == pytest.approx(fit["eval_loss"], rel=TOL["float32"])
    assert fit["eval_loss_handed"] < before["eval_loss_handed"] - 0.01
    # A run that goes on has the fit in its checkpoint, so it is kept nowhere else.
    assert not (workspace / "run").exists()
