"""Losses against numpy in float64 and torch: masks, bf16, extremes, the three-line callables."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.losses import (
    HybridKVLoss,
    MercatorKVLoss,
    alignment_accuracy,
    cross_entropy,
    logit_kl,
    mercator,
    mse,
)
from tests.tolerances import TOL

CLOSE = TOL["float32"]
METRICS = {"loss", "cos_sim", "dir_loss", "mag_loss", "s_magnitude", "t_magnitude", "mag_ratio"}
VECTOR_LOSSES = {
    "mercator": lambda s, t, m=None: mercator(s, t, m, beta=0.01),
    "mse": mse,
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def to_jax(x: np.ndarray, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(x, dtype)


def reference(name: str, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Per-vector losses in float64."""
    ls, lt = np.linalg.norm(s, axis=-1), np.linalg.norm(t, axis=-1)
    direction = 1 - (s * t).sum(-1) / (ls * lt)
    return {
        "mercator": direction + 0.01 * (np.log(ls + 1e-8) - np.log(lt + 1e-8)) ** 2,
        "mse": ((s - t) ** 2).mean(-1),
    }[name]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_vector_losses_equal_numpy(name: str, dtype) -> None:
    s, t = (to_jax(normal(seed, 2, 10, 16), dtype) for seed in (0, 1))
    want = reference(name, *(np.asarray(x, np.float64) for x in (s, t)))
    eager = VECTOR_LOSSES[name](s, t)
    jitted = jax.jit(VECTOR_LOSSES[name])(s, t)
    for mean in (eager, jitted):
        assert mean.sum.dtype == mean.count.dtype == jnp.float32
        np.testing.assert_allclose(mean.sum, want.sum(), rtol=CLOSE)
        assert mean.count == 20


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_masked_vectors_change_neither_value_nor_gradient(name: str, bad: float) -> None:
    s, t = normal(0, 3, 4, 8), normal(1, 3, 4, 8)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    loss = jax.value_and_grad(
        lambda s, t: VECTOR_LOSSES[name](s, t, jnp.asarray(mask)).value, argnums=(0, 1)
    )
    value, gradients = loss(*(to_jax(np.where(mask[..., None], x, bad)) for x in (s, t)))
    clean_value, clean_gradients = loss(to_jax(s), to_jax(t))
    np.testing.assert_array_equal(value, clean_value)
    np.testing.assert_allclose(value, reference(name, s, t)[mask.astype(bool)].mean(), rtol=CLOSE)
    for gradient, clean in zip(gradients, clean_gradients, strict=True):
        np.testing.assert_array_equal(gradient, clean)
        assert (np.asarray(gradient)[mask == 0] == 0).all()


def test_a_token_mask_fits_a_whole_cache_and_all_masks_broadcast() -> None:
    s, t = to_jax(normal(0, 3, 2, 4, 2, 8)), to_jax(normal(1, 3, 2, 4, 2, 8))
    mask = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 0]])
    by_token = mercator(s, t, mask)
    assert by_token.count == 3 * 5 * 2
    written_out = mercator(s, t, mask[None, :, :, None])
    np.testing.assert_array_equal(by_token.value, written_out.value)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 0.25])
def test_mercator_is_blind_to_scale_without_beta(scale: float) -> None:
    s, t = to_jax(normal(0, 20, 16)), to_jax(normal(1, 20, 16))
    np.testing.assert_allclose(mercator(s * scale, t).value, mercator(s, t).value, atol=CLOSE)


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_mercator_is_finite_at_the_extremes(beta: float) -> None:
    both = jax.jit(jax.value_and_grad(MercatorKVLoss(beta=beta), argnums=(0, 1), has_aux=True))
    s, t = to_jax(normal(0, 5, 16)), to_jax(normal(1, 5, 16))
    for s_scale, t_scale in itertools.product((0.0, 1e30, 1e-30, 1.0), repeat=2):
        (loss, metrics), gradients = both(s * s_scale, t * t_scale)
        assert jnp.isfinite(loss)
        assert all(jnp.isfinite(g).all() for g in gradients)
        # 1e30 / 1e-30 is beyond float32, and the ratio says so.
        assert all(jnp.isfinite(m) for name, m in metrics.items() if name != "mag_ratio")


def mercator64(
    s: np.ndarray, t: np.ndarray, beta: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, and gradients of their sum in both sides, in float64; zero vectors get none."""
    ls, lt = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (s, t))
    u, v = (np.divide(x, n, out=np.zeros_like(x), where=n > 0) for x, n in ((s, ls), (t, lt)))
    cos = (u * v).sum(-1, keepdims=True)
    ratio = np.log(ls + 1e-8) - np.log(lt + 1e-8)
    per_length = [np.divide(1.0, n, out=np.zeros_like(n), where=n > 0) for n in (ls, lt)]
    of_s = -(v - cos * u) * per_length[0] + 2 * beta * ratio / (ls + 1e-8) * u
    of_t = -(u - cos * v) * per_length[1] - 2 * beta * ratio / (lt + 1e-8) * v
    return ((1 - cos) + beta * ratio**2)[..., 0], of_s, of_t


@pytest.mark.parametrize("beta", [0, 0.01])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1e30), (1.0, 1e-30), (0.0, 1.0, 1e30, 1e-30)])
def test_mercator_and_its_gradient_equal_numpy_at_any_length(scales, beta: float) -> None:
    """With lengths that need no care alone, and beside all the others."""
    pairs = np.array(list(itertools.product(scales, repeat=2)), np.float32)[:, :, None, None]
    s, t = (to_jax(pairs[:, side] * normal(side, len(pairs), 5, 16)) for side in (0, 1))
    poisoned = jnp.concatenate([s, jnp.full((1, 5, 16), jnp.nan)])
    mask = jnp.arange(len(pairs) + 1)[:, None] < len(pairs)

    def total(s: jax.Array, t: jax.Array) -> jax.Array:
        return mercator(s, t, mask, beta=beta).sum

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, gradients = both(poisoned, jnp.concatenate([t, t[:1]]))
    values, *want = mercator64(np.asarray(s, np.float64), np.asarray(t, np.float64), beta)
    np.testing.assert_allclose(value, values.sum(), rtol=CLOSE)
    for gradient, exact in zip(gradients, want, strict=True):
        assert (gradient[-1] == 0).all()
        largest = np.abs(exact).max(axis=-1, keepdims=True)
        off = np.abs(np.asarray(gradient[:-1], np.float64) - exact)
        assert (off <= CLOSE * largest).all()


def test_a_nan_that_counts_stays_visible_in_value_and_gradient() -> None:
    s, t = to_jax(normal(0, 3, 8)).at[1, 2].set(jnp.nan), to_jax(normal(1, 3, 8))
    value, gradient = jax.value_and_grad(lambda s: mercator(s, t, beta=0.01).value)(s)
    assert jnp.isnan(value)
    assert jnp.isnan(gradient[1]).any()


@pytest.mark.parametrize("beta", [0, 0.01])
def test_the_kv_loss_stores_no_copy_of_the_cache(beta: float) -> None:
    shape = (2, 4, 64, 2, 128)
    student, target = (to_jax(normal(seed, *shape)) for seed in (0, 1))
    mask = jnp.arange(64)[None, :] < jnp.asarray([64, 48, 32, 16])[:, None]
    loss = jax.jit(jax.value_and_grad(lambda s, t: mercator(s, t, mask, beta=beta).value))
    needed = loss.lower(student, target).compile().memory_analysis()
    assert 0 < needed.temp_size_in_bytes <= 0.1 * (student.nbytes + target.nbytes)


def test_cosine_accuracy_of_a_masked_batch() -> None:
    s = jnp.asarray([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [jnp.nan, 0.0]])
    t = jnp.broadcast_to(jnp.asarray([[1.0, 0.0]]), (4, 2))
    mask = jnp.asarray([1, 1, 1, 0])
    np.testing.assert_allclose(alignment_accuracy(s, t, mask), 200 / 3, rtol=CLOSE)
    np.testing.assert_allclose(alignment_accuracy(s, t, mask, threshold=0.999), 100 / 3, rtol=CLOSE)


def test_cross_entropy_equals_torch_with_ignored_labels() -> None:
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    logits, labels = normal(0, 2, 5, 11) * 4, np.random.default_rng(1).integers(0, 11, (2, 5))
    labels[0, :3] = -100
    want_logits = torch.tensor(logits, requires_grad=True)
    want = torch.nn.functional.cross_entropy(
        want_logits.reshape(-1, 11), torch.tensor(labels).reshape(-1), ignore_index=-100
    )
    want.backward()
    mask = labels >= 0
    poisoned = to_jax(np.where(mask[..., None], logits, np.nan))
    value, gradient = jax.value_and_grad(
        lambda x: cross_entropy(x, jnp.asarray(labels), jnp.asarray(mask)).value
    )(poisoned)
    np.testing.assert_allclose(value, want.detach().numpy(), rtol=CLOSE)
    np.testing.assert_allclose(gradient, want_logits.grad.numpy(), atol=CLOSE)


def test_the_gradient_of_cross_entropy_makes_no_array_of_zeros_to_scatter_into() -> None:
    logits, labels = to_jax(normal(0, 2, 5, 11)), jnp.zeros((2, 5), jnp.int32)
    program = jax.make_jaxpr(jax.grad(lambda x: cross_entropy(x, labels).value))(logits)
    assert "exp" in str(program)
    assert "scatter" not in str(program)


def log_softmax64(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("widths", [(13, 17), (17, 13), (13, 13)])
def test_logit_kl_renormalises_over_the_shared_ids(widths: tuple[int, int]) -> None:
    student, teacher = normal(0, 2, 5, widths[0]), normal(1, 2, 5, widths[1]) * 3
    log_s, log_t = (log_softmax64(x[..., :13] / 2.0) for x in (student, teacher))
    want = 4.0 * (np.exp(log_t) * (log_t - log_s)).sum(-1).mean()
    got = logit_kl(to_jax(student), to_jax(teacher), temperature=2.0)
    np.testing.assert_allclose(got.value, want, rtol=CLOSE)
    loud = to_jax(teacher).at[..., 13:].set(1e4)
    np.testing.assert_array_equal(logit_kl(to_jax(student), loud, temperature=2.0).value, got.value)


def test_logit_kl_equals_torch_in_value_and_gradient_under_a_mask() -> None:
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    student, teacher = normal(0, 6, 13), normal(1, 6, 13)
    mask = np.array([1, 1, 0, 1, 0, 1])
    rows = torch.tensor(student, requires_grad=True)
    log_s, log_t = (
        torch.log_softmax(x[torch.tensor(mask).bool()], -1) for x in (rows, torch.tensor(teacher))
    )
    want = torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    want.backward()
    poisoned = to_jax(np.where(mask[:, None], student, np.nan))
    value, gradient = jax.value_and_grad(
        lambda s: logit_kl(s, to_jax(teacher), jnp.asarray(mask)).value
    )(poisoned)
    np.testing.assert_allclose(value, want.detach().numpy(), rtol=CLOSE)
    np.testing.assert_allclose(gradient, rows.grad.numpy(), atol=CLOSE)


def test_logit_kl_takes_the_real_vocabulary_widths_in_bf16() -> None:
    student = jnp.zeros((1, 151936), jnp.bfloat16)
    teacher = jnp.zeros((1, 152064), jnp.bfloat16).at[0, 152000].set(50.0)
    np.testing.assert_allclose(logit_kl(student, teacher).value, 0.0, atol=CLOSE)


def test_the_three_lines_of_the_original() -> None:
    student_kv, teacher_kv = to_jax(normal(0, 2, 10, 128)), to_jax(normal(1, 2, 10, 128))
    loss_fn = MercatorKVLoss(alpha=1.0, beta=0.01)
    loss, metrics = loss_fn(student_kv, teacher_kv)
    assert set(metrics) == METRICS
    assert loss.shape == ()
    assert loss == metrics["loss"]
    s64, t64 = np.asarray(student_kv, np.float64), np.asarray(teacher_kv, np.float64)
    ls, lt = np.linalg.norm(s64, axis=-1), np.linalg.norm(t64, axis=-1)
    want = {
        "loss": reference("mercator", s64, t64).mean(),
        "cos_sim": ((s64 * t64).sum(-1) / ls / lt).mean(),
        "dir_loss": 1 - ((s64 * t64).sum(-1) / ls / lt).mean(),
        "mag_loss": (np.log(ls / lt) ** 2).mean(),
        "s_magnitude": ls.mean(),
        "t_magnitude": lt.mean(),
        "mag_ratio": ls.mean() / lt.mean(),
    }
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=CLOSE, atol=CLOSE, err_msg=name)


@pytest.mark.parametrize("pair", [KVCache, lambda k, v: (k, v)])
@pytest.mark.parametrize("loss_fn", [MercatorKVLoss(beta=0.01), HybridKVLoss()])
def test_a_pair_gives_the_mean_of_keys_and_values(loss_fn, pair) -> None:
    k, v, tk, tv = (to_jax(normal(seed, 2, 3, 4, 2, 8)) for seed in range(4))
    mask = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    loss, metrics = jax.jit(loss_fn)(pair(k, v), pair(tk, tv), mask)
    _, of_k = loss_fn(k, tk, mask)
    _, of_v = loss_fn(v, tv, mask)
    assert set(metrics) >= METRICS
    np.testing.assert_allclose(loss, metrics["loss"])
    for name, value in metrics.items():
        np.testing.assert_allclose(value, 0.5 * (of_k[name] + of_v[name]), rtol=CLOSE)


def test_hybrid_reports_its_terms_and_follows_a_schedule() -> None:
    s, t = to_jax(normal(0, 2, 10, 16)), to_jax(normal(1, 2, 10, 16))
    fixed, metrics = HybridKVLoss()(s, t)
    assert set(metrics) == METRICS | {
        "mercator_loss",
        "mse_loss",
        "mercator_weight",
        "mse_weight",
    }
    sides = [np.asarray(side, np.float64) for side in (s, t)]
    of_mercator, of_mse = (reference(name, *sides).mean() for name in ("mercator", "mse"))
    np.testing.assert_allclose(fixed, 0.8 * of_mercator + 0.2 * of_mse, rtol=CLOSE)
    scheduled = HybridKVLoss(
        mercator_weight=optax.linear_schedule(0.0, 1.0, 10),
        mse_weight=optax.linear_schedule(1.0, 0.0, 10),
    )
    for step, weight in ((0, 0.0), (4, 0.4), (10, 1.0)):
        loss, metrics = jax.jit(scheduled)(s, t, step=jnp.int32(step))
        want = weight * of_mercator + (1 - weight) * of_mse
        np.testing.assert_allclose(loss, want, rtol=CLOSE)
        np.testing.assert_allclose(metrics["mercator_weight"], weight, atol=CLOSE)
    with pytest.raises(KavaError, match=r"HybridKVLoss\.mercator_weight is a schedule"):
        scheduled(s, t)


def test_shapes_that_do_not_match_are_named() -> None:
    s, t = jnp.ones((2, 3, 8)), jnp.ones((2, 3, 16))
    for call in (MercatorKVLoss(), HybridKVLoss(), mercator, mse, alignment_accuracy):
        with pytest.raises(KavaError, match=r"\(2, 3, 8\).*\(2, 3, 16\)"):
            call(s, t)
    with pytest.raises(KavaError, match="tuple and"):
        MercatorKVLoss()((s, s), s)
    for mask in (jnp.ones(3), jnp.ones((3, 2)), jnp.ones((2, 3, 1))):
        with pytest.raises(KavaError, match="mask shape"):
            mercator(s, s, mask)


def test_the_losses_are_plain_static_values() -> None:
    assert MercatorKVLoss() == MercatorKVLoss(1.0, 0.0)
    assert hash(HybridKVLoss()) == hash(HybridKVLoss(0.8, 0.2, 0.01))
