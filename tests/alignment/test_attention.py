"""What queries read from two caches, against numpy in float64 and torch's own attention."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kava_jax.alignment.attention import Attended, attention_kl, attention_output_cosine
from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import put_batch
from tests.tolerances import TOL

CLOSE = TOL["float32"]
P, B, T, N, K, H = 2, 8, 6, 6, 2, 4
# Padding on the left, on the right, nowhere, everywhere; then the same again.
VALID = np.array(
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]] * 2, bool
)
# The first real token is a key like any other, and no query that counts.
COUNTED = VALID & (np.cumsum(VALID, axis=1) > 1)
POSITIONS = token_positions(jnp.asarray(VALID))
VISIBLE = np.asarray(attention_mask(POSITIONS, POSITIONS, jnp.asarray(VALID), (4,)))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = normal(9, B, T)
Q = 2 * normal(0, P, B, T, N, H)
STUDENT, TARGET = (KVCache(*(normal(seed + i, P, B, T, K, H) for i in (0, 1))) for seed in (1, 3))


def kl_of(q, student_k, target_k, mask, counted, mask_of=None, cap=None):
    sides = (KVCache(k, k) for k in (student_k, target_k))
    return attention_kl(Attended(q, *sides, mask, mask_of, cap), counted)


def cosine_of(q, student, target, mask, counted, mask_of=None, cap=None):
    return attention_output_cosine(Attended(q, student, target, mask, mask_of, cap), counted)


def kl_and_gradients(q, student_k, target_k, mask, counted, weights):
    def weighted(*sides):
        values = kl_of(*sides, mask, counted)
        return (values * weights).sum(), values

    gradients, values = jax.grad(weighted, (0, 1, 2), has_aux=True)(q, student_k, target_k)
    return values, *gradients


def cosine_and_gradients(q, student, target, mask, counted):
    def total(*sides):
        mean = cosine_of(*sides, mask, counted)
        return mean.value.sum(), mean

    gradients, mean = jax.grad(total, (0, 1, 2), has_aux=True)(q, student, target)
    return mean, *gradients


by_kl, by_cosine = (jax.jit(of, static_argnums=(5, 6)) for of in (kl_of, cosine_of))
jitted_kl, jitted_cosine = jax.jit(kl_and_gradients), jax.jit(cosine_and_gradients)


def run_kl(q=Q, student_k=STUDENT.k, target_k=TARGET.k, mask=VISIBLE, counted=COUNTED):
    return jitted_kl(q, student_k, target_k, mask, counted, WEIGHTS)


def run_cosine(q=Q, student=STUDENT, target=TARGET, mask=VISIBLE, counted=COUNTED):
    return jitted_cosine(q, student, target, mask, counted)


def attention64(q: np.ndarray, k: np.ndarray, p: int, b: int, i: int, n: int) -> np.ndarray:
    """Weights of query i, head n, over the keys that it sees."""
    seen = VISIBLE[b, 0, i]
    scores = k[p, b, seen, n // (N // K)].astype(np.float64) @ q[p, b, i, n] / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def test_each_layer_is_read_through_its_own_mask() -> None:
    everything = np.asarray(attention_mask(POSITIONS, POSITIONS, jnp.asarray(VALID)))
    masks = np.concatenate([VISIBLE, everything], axis=1)
    kl, mean = (
        of(*sides, masks, COUNTED, (1, 0))
        for of, sides in (
            (by_kl, (Q, STUDENT.k, TARGET.k)),
            (by_cosine, (Q, STUDENT, TARGET)),
        )
    )
    halves = []
    for layer, mask in enumerate((everything, VISIBLE)):
        one = jax.tree.map(lambda x, layer=layer: x[layer : layer + 1], (Q, STUDENT, TARGET))
        halves.append(by_kl(one[0], one[1].k, one[2].k, mask, COUNTED))
        alone = by_cosine(*one, mask, COUNTED)
        np.testing.assert_allclose(mean.value[layer], alone.value[0], atol=CLOSE)
    np.testing.assert_allclose(kl, sum(halves) / 2, atol=CLOSE)
    assert np.abs(halves[0] - halves[1]).max() > 0.01


def test_a_cap_bounds_the_scores_before_the_softmax() -> None:
    cap = 0.5
    found = by_kl(Q, STUDENT.k, TARGET.k, VISIBLE, COUNTED, None, cap)
    want = np.zeros((B, T))
    for (b, i), p, n in itertools.product(np.argwhere(COUNTED), range(P), range(N)):
        logs = []
        for side in (STUDENT, TARGET):
            seen = VISIBLE[b, 0, i]
            raw = side.k[p, b, seen, n // (N // K)].astype(np.float64) @ Q[p, b, i, n] / np.sqrt(H)
            scores = cap * np.tanh(raw / cap)
            logs.append(scores - np.log(np.exp(scores).sum()))
        s, t = logs
        want[b, i] += (np.exp(t) * (t - s)).sum() / (P * N)
    np.testing.assert_allclose(found, want, atol=CLOSE)


def test_divergence_equals_numpy() -> None:
    want = np.zeros((B, T))
    for (b, i), p, n in itertools.product(np.argwhere(COUNTED), range(P), range(N)):
        s, t = (attention64(Q, side.k, p, b, i, n) for side in (STUDENT, TARGET))
        want[b, i] += (t * np.log(t / s)).sum() / (P * N)
    values = run_kl()[0]
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, want, rtol=CLOSE, atol=CLOSE)
    assert (np.asarray(values)[~COUNTED] == 0).all()


def test_gradients_of_the_divergence_equal_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    sides = [
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (Q, STUDENT.k, TARGET.k)
    ]
    q, *keys = sides
    hidden = ~torch.tensor(VISIBLE[:, 0])[None, :, None]
    log_s, log_t = (
        torch.einsum("pbtnh,pbsnh->pbnts", q, k.repeat_interleave(N // K, dim=3))
        .div(H**0.5)
        .masked_fill(hidden, -1e30)
        .log_softmax(-1)
        for k in keys
    )
    divergence = torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none")
    tokens = divergence.sum(-1).mean(dim=(0, 2))
    (tokens * torch.tensor(WEIGHTS * COUNTED)).sum().backward()
    for got, side in zip(run_kl()[1:], sides, strict=True):
        np.testing.assert_allclose(got, side.grad.numpy(), rtol=CLOSE, atol=CLOSE)


def test_outputs_equal_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")

    def read(side: KVCache):
        q, k, v = (torch.tensor(x, dtype=torch.float64).swapaxes(2, 3) for x in (Q, *side))
        mask = torch.tensor(VISIBLE)[None].expand(P, B, 1, T, T)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, enable_gqa=True)

    cosines = torch.nn.functional.cosine_similarity(read(STUDENT), read(TARGET), dim=-1).numpy()
    want = np.moveaxis(cosines, 2, 3)[:, COUNTED].mean(axis=(1, 2))
    mean = run_cosine()[0]
    np.testing.assert_array_equal(mean.count, np.full(P, COUNTED.sum() * N))
    np.testing.assert_allclose(mean.value, want, rtol=CLOSE)
    assert abs(want).max() < 0.9


def test_equal_caches_are_read_alike() -> None:
    values = run_kl(student_k=TARGET.k)[0]
    np.testing.assert_array_equal(values, np.zeros((B, T)))
    np.testing.assert_allclose(run_cosine(student=TARGET)[0].value, 1.0, rtol=CLOSE)
    # One vector added to all keys moves every score of a query by the same amount.
    np.testing.assert_allclose(
        run_kl(student_k=TARGET.k + normal(5, H)[None, None, None, None])[0], 0, atol=CLOSE
    )


@pytest.mark.parametrize("run", [run_kl, run_cosine])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_padding_changes_nothing(run, bad: float) -> None:
    padding = ~VALID[None, :, :, None, None]
    q = np.where(~COUNTED[None, :, :, None, None], np.float32(bad), Q)
    student, target = (
        jax.tree.map(lambda x: np.where(padding, np.float32(bad), x), side)
        for side in (STUDENT, TARGET)
    )
    spoilt = run(q, student.k, target.k) if run is run_kl else run(q, student, target)
    for got, want in zip(jax.tree.leaves(spoilt), jax.tree.leaves(run()), strict=True):
        np.testing.assert_array_equal(got, want)
        assert jnp.isfinite(got).all()


def test_a_token_that_does_not_count_is_a_key_all_the_same() -> None:
    louder = STUDENT._replace(k=STUDENT.k.copy(), v=STUDENT.v.copy())
    louder.k[:, 2, 0] *= 3  # the first token of the row without padding
    louder.v[:, 2, 0] *= 3
    before, after = run_kl()[0], run_kl(student_k=louder.k)[0]
    seeing = COUNTED & VISIBLE[:, 0, :, 0] & (np.arange(B) == 2)[:, None]
    assert seeing.sum() == 3
    np.testing.assert_array_equal(np.asarray(before) != np.asarray(after), seeing)
    assert (run_cosine(student=louder)[0].value != run_cosine()[0].value).all()
    assert np.asarray(run_kl()[2])[:, 2, 0].all()
    # Nor is a NaN there hidden from those who see it; who does not count stays at 0.
    louder.k[:, 2, 0] = np.nan
    spoilt = run_kl(student_k=louder.k)[0]
    np.testing.assert_array_equal(np.isnan(spoilt), seeing)
    assert (np.asarray(spoilt)[~COUNTED] == 0).all()


def test_queries_that_see_nothing_stay_finite() -> None:
    blind, everyone = np.zeros_like(VISIBLE), np.ones_like(COUNTED)
    values, *gradients = run_kl(mask=blind, counted=everyone)
    np.testing.assert_array_equal(values, np.zeros((B, T)))
    mean, *others = run_cosine(mask=blind, counted=everyone)
    np.testing.assert_array_equal(mean.value, np.zeros(P))
    nobody = run_kl(counted=~everyone)
    for found in jax.tree.leaves((gradients, others, nobody)):
        np.testing.assert_array_equal(found, np.zeros_like(found))
    # One blind query among others: the keys are there, and it reads none of them.
    one, others = VISIBLE.copy(), COUNTED.copy()
    one[2, 0, 4], others[2, 4] = False, False
    assert run_kl(mask=one)[0][2, 4] == 0
    among, without = run_cosine(mask=one)[0], run_cosine(mask=one, counted=others)[0]
    np.testing.assert_array_equal(among.count, without.count + N)
    np.testing.assert_allclose(among.sum, without.sum, rtol=TOL["rearranged"])


def test_large_scores_stay_finite() -> None:
    for found in jax.tree.leaves((run_kl(q=1e4 * Q), run_cosine(q=1e4 * Q))):
        assert jnp.isfinite(found).all()


def test_one_layer_of_weights_exists_at_a_time() -> None:
    tokens = 128

    def scratch(layers: int) -> int:
        side = jax.ShapeDtypeStruct((layers, 1, tokens, 1, 2), jnp.float32)
        mask = jax.ShapeDtypeStruct((1, 1, tokens, tokens), jnp.bool_)
        row = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
        lowered = jax.jit(kl_and_gradients).lower(side, side, side, mask, row, row)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = scratch(2), scratch(7)
    assert few > 4 * tokens**2
    assert many < few + 4 * tokens**2  # five layers more, and not one matrix


def test_rows_may_lie_on_eight_devices() -> None:
    def by_row(q, student, target, mask, counted, weights):
        q, *caches = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (q, student, target))
        keys = [cache.k for cache in caches]
        mean, *_ = cosine_and_gradients(q, *caches, mask, counted)
        return *kl_and_gradients(q, *keys, mask, counted, weights), mean.value

    sides = jax.tree.map(lambda x: np.moveaxis(x, 1, 0), (Q, STUDENT, TARGET))
    rows = (*sides, VISIBLE, COUNTED, WEIGHTS)
    found = jax.jit(by_row)(*put_batch(rows, make_mesh()))
    assert len(found[0].sharding.device_set) == 8
    for got, want in zip(found, (*run_kl(), run_cosine()[0].value), strict=True):
        np.testing.assert_allclose(got, want, atol=TOL["across_meshes"])


def test_heads_that_do_not_divide_are_named() -> None:
    q, mask, counted = jnp.asarray(Q[:, :, :, :5]), jnp.asarray(VISIBLE), jnp.asarray(COUNTED)
    student, target = (jax.tree.map(jnp.asarray, side) for side in (STUDENT, TARGET))
    with pytest.raises(KavaError, match="5 query heads do not share 2 KV heads"):
        kl_of(q, student.k, target.k, mask, counted)
    with pytest.raises(KavaError, match="5 query heads do not share 2 KV heads"):
        cosine_of(q, student, target, mask, counted)
