"""The objective against the same loss written out on full logits and hand-gathered layers."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.data.batches import Batch
from kava_jax.training import lm_head
from tests.tolerances import TOL
from tests.training.small import (
    PAIRS,
    SINKS,
    TEACHER,
    Setting,
    batch,
    setting,
    total_loss,
)

BATCH = batch()
STEP = jnp.zeros((), jnp.int32)
WHOLE = (1.0, 1.0)


@cache
def program(direction: str = "student_to_teacher", **options) -> tuple[Setting, Callable]:
    """A setting and its compiled ``(params, batch, share) -> ((loss, metrics), gradients)``."""
    made = setting(direction=direction, **options)
    return made, compiled(made)


def compiled(made: Setting) -> Callable:
    run = jax.jit(jax.value_and_grad(total_loss(made), has_aux=True))
    return lambda data=BATCH, share=WHOLE: run(made.params, made.teachers, data, STEP, share)


BOTH = {"direction": "teacher_to_student", "kl_weight": 0.5, "names": ("big", "other")}


def outputs(graph, params, data: Batch):
    """Full logits and cache; positions and mask written out for right padding."""
    length = data.tokens.shape[1]
    positions = jnp.minimum(jnp.arange(length)[None], data.valid.sum(axis=1)[:, None] - 1)
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & data.valid[:, None, :]
    model = nnx.merge(graph, params)
    hidden, cache = model(data.tokens, positions, mask[:, None])
    logits = model.logits(hidden) if model.final_norm is not None else None
    return logits, cache


def aligned(made: Setting, params, student, teacher, name: str):
    """Per part, the mapped layers of both sides, gathered one by one."""
    projector = nnx.merge(made.objective.projector, params["projector"])
    forward = projector.direction == "teacher_to_student"
    shape = (2, 8) if forward else (4, 4)
    sides = {"k": [], "v": []}
    for t, s in PAIRS:
        source = teacher if forward else student
        layer = t if forward else s
        flat = [x[layer].reshape(*x.shape[1:3], -1) for x in source]
        mapped = [
            x.reshape(*x.shape[:2], *shape) for x in projector.project_teacher_kv(name, *flat)
        ]
        for part, new in zip("kv", mapped, strict=True):
            pair = (getattr(student, part)[s], new) if forward else (new, getattr(teacher, part)[t])
            sides[part].append(pair)
    return sides


def reference(made: Setting, params, data: Batch, np_=jnp):
    """CE + 0.7 * KV + kl_weight * KL, in jax (differentiable) or in numpy's float64."""
    log, sqrt, exp = np_.log, np_.sqrt, np_.exp

    def wide(x):
        return np.asarray(x, np.float64) if np_ is np else x

    def log_softmax(x):
        x = x - x.max(axis=-1, keepdims=True)
        return x - log(exp(x).sum(axis=-1, keepdims=True))

    logits, cache = outputs(made.objective.student, params["student"], data)
    logits = wide(logits)[:, :-1]
    weight = np.asarray(data.loss_mask)[:, 1:].astype(np.float32)
    one_hot = np.eye(48, dtype=np.float32)[np.asarray(data.tokens)[:, 1:]]
    total = -(wide((log_softmax(logits) * one_hot).sum(axis=-1)) * weight).sum() / weight.sum()
    kept = np.asarray(data.valid) & (np.arange(data.tokens.shape[1]) >= SINKS)[None]
    kept = kept[..., None].astype(np.float32)
    for name, link in made.objective.teachers.items():
        part = link.weight
        teacher_logits, teacher = outputs(link.graph, made.teachers[name], data)
        for pairs in aligned(made, params, cache, teacher, name).values():
            terms = []
            for s, t in pairs:
                s, t = wide(s), wide(t)
                length_s, length_t = (sqrt((x**2).sum(axis=-1)) for x in (s, t))
                cos = (s * t).sum(axis=-1) / (length_s * length_t)
                loss = 1 - cos + 0.01 * (log(length_s) - log(length_t)) ** 2
                terms.append((loss * kept).sum() / kept.sum() / loss.shape[-1])
            total = total + part * 0.7 * 0.5 * sum(terms) / len(terms)
        if made.objective.kl_weight:
            q = log_softmax(logits[..., :40] / 2.0)
            p = log_softmax(wide(teacher_logits)[:, :-1] / 2.0)
            kl = 4.0 * (exp(p) * (p - q)).sum(axis=-1)
            scale = part * made.objective.kl_weight(STEP)
            total = total + scale * (kl * weight).sum() / weight.sum()
    return total


def assert_trees_close(left, right, tolerance: float) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    "options", [{}, BOTH], ids=["student_to_teacher", "teachers_to_student_with_kl"]
)
def test_value_and_gradients_equal_the_loss_written_out(options) -> None:
    made, run = program(**options)
    (loss, metrics), grads = run()
    want = reference(made, made.params, BATCH, np)
    assert float(loss) == pytest.approx(want, rel=TOL["float32"])
    expected = jax.jit(jax.grad(lambda params: reference(made, params, BATCH)))(made.params)
    assert_trees_close(grads, expected, TOL["float32"])
    targets = int(np.asarray(BATCH.loss_mask)[:, 1:].sum())
    tokens = int(np.maximum(np.asarray(BATCH.valid).sum(axis=1) - SINKS, 0).sum())
    assert int(metrics["ce"].count) == targets
    heads = 2 if options else 4
    for name in made.teachers:
        assert int(metrics[f"{name}/kv_k"].count) == tokens
        assert int(metrics[f"{name}/cos_k"].count) == 2 * heads * tokens
        assert (f"{name}/kl" in metrics) == bool(options)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch) -> None:
    made = setting(kl_weight=0.5)
    whole = compiled(made)()
    for tokens in (4, 1):  # 11 predictions in 3 chunks of 4, the last one padded, or 11 of 1
        monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 8 * 48 * tokens)
        assert_trees_close(compiled(made)(), whole, TOL["float32"])
    jaxpr = jax.make_jaxpr(lambda p: total_loss(made)(p, made.teachers, BATCH, STEP, WHOLE))
    shapes = [out.aval.shape for eqn in jaxpr(made.params).eqns for out in eqn.outvars]
    logits = [shape for shape in shapes if shape[-1:] in ((40,), (48,))]
    assert all(np.prod(shape) < 8 * 11 * 40 for shape in logits)  # no [B, T, V]


def test_what_stands_in_padding_is_never_seen() -> None:
    _, run = program(**BOTH)
    other = BATCH._replace(
        tokens=jnp.where(BATCH.valid, BATCH.tokens, (BATCH.tokens + 17) % TEACHER.vocab_size)
    )
    for left, right in zip(jax.tree.leaves(run()), jax.tree.leaves(run(other)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_prompts_do_not_count_for_ce_nor_sinks_for_kv() -> None:
    made, run = program()
    _, metrics = run()[0]
    fewer = BATCH._replace(
        loss_mask=BATCH.loss_mask.at[:, :6].set(False), kv_mask=BATCH.kv_mask.at[:, :5].set(False)
    )
    _, masked = run(fewer)[0]
    student = outputs(made.objective.student, made.params["student"], BATCH)
    teacher = outputs(made.objective.teachers["big"].graph, made.teachers["big"], BATCH)[1]
    logits = np.asarray(student[0], np.float64)
    by_token, by_vector = [], []
    pairs = aligned(made, made.params, student[1], teacher, "big")["k"]
    for b, t in np.argwhere(np.asarray(BATCH.valid)):
        if t >= 6:
            row = logits[b, t - 1]
            by_token.append(np.log(np.exp(row).sum()) - row[BATCH.tokens[b, t]])
        if t >= 5:
            for s, aim in pairs:
                for head in range(4):
                    x, y = (np.asarray(v[b, t, head], np.float64) for v in (s, aim))
                    by_vector.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert float(masked["ce"].count) == len(by_token)
    assert float(masked["ce"].value) == pytest.approx(np.mean(by_token), rel=TOL["float32"])
    assert float(masked["big/cos_k"].count) == len(by_vector)
    assert float(masked["big/cos_k"].value) == pytest.approx(
        np.mean(by_vector), rel=TOL["float32"], abs=TOL["float32"]
    )
    assert float(masked["ce"].value) != float(metrics["ce"].value)


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_where_the_kv_gradient_goes(direction) -> None:
    made = setting(direction=direction, ce_weight=0.0)
    _, grads = compiled(made)()
    assert jax.tree.structure(grads) == jax.tree.structure(made.params)  # and not the teachers
    sizes = {
        group: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[group]))
        for group in ("student", "projector")
    }
    assert sizes["student"] > 0
    assert sizes["projector"] > 0
    # The student's last mapped layer writes keys and values only: what follows gets no gradient.
    attention = grads["student"]["blocks"]["attention"]
    assert float(jnp.abs(attention["q"]["kernel"][2]).max()) == 0
    assert float(jnp.abs(attention["k"]["kernel"][2]).max()) > 0
    assert float(jnp.abs(grads["student"]["final_norm"]["scale"]).max()) == 0
    frozen = setting(direction=direction, ce_weight=0.0, trainable=False)
    _, grads = compiled(frozen)()
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(grads["projector"]))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads["student"])) > 0


def test_shares_scale_the_loss_and_not_the_metrics() -> None:
    _, run = program()
    (whole, metrics), _ = run()
    quarter = (jnp.asarray(0.25), jnp.asarray(0.5))
    (part, same), _ = run(share=quarter)
    kv = 0.7 * float(metrics["big/kv_k"].value + metrics["big/kv_v"].value) / 2
    ce = float(metrics["ce"].value)
    assert float(whole) == pytest.approx(ce + kv, rel=TOL["float32"])
    assert float(part) == pytest.approx(0.25 * ce + 0.5 * kv, rel=TOL["float32"])
    assert_trees_close(metrics, same, TOL["float32"])
