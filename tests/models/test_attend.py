"""Every attention against the formula in float64, and which one a model uses.

What needs another machine than tests have is run by this file as a program:

    python -m tests.models.test_attend cudnn    on an NVIDIA GPU: the formula again
    python -m tests.models.test_attend tpu      with libtpu: the TPU's compiler takes the kernel
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.cache import KVCache
from kava_jax.config.file import parse_config
from kava_jax.errors import KavaError
from kava_jax.models import attend as attend_module
from kava_jax.models.attend import Choice, attend, choose, in_words
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import layouts
from kava_jax.plan.accelerators import described_devices
from kava_jax.plan.chips import CHIPS
from kava_jax.runs import blueprint
from kava_jax.runs.prepare import models_without_weights
from tests.models.test_decoder import SPEC, build
from tests.tiny import CONFIG, write_workspace
from tests.tolerances import TOL

# Three blocks of splash, four query heads on two key/value heads, rows of different length: one
# full, one that ends inside the second block, one of a single token.
B, T, N, K, H = 4, 384, 4, 2, 8
VALID = np.arange(T) < np.array([[T], [T - 1], [200], [1]])
WINDOWS = [None, 100]


def arrays(seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v and what the loss sends back: nothing to padding."""
    rng = np.random.default_rng(seed)
    q, k, v, back = (rng.normal(size=(B, T, heads, H)) for heads in (N, K, K, N))
    return q, k, v, back * VALID[..., None, None]


def formula(q, k, v, back, window) -> tuple[np.ndarray, ...]:
    """Output and the gradients for q, k and v, in float64 and with nothing left out."""
    q, k, v, back = (x.swapaxes(1, 2) for x in (q, k, v, back))
    k, v = (np.repeat(x, N // K, axis=1) for x in (k, v))
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < (window or T)) & VALID[:, None, None, :]
    score = np.where(seen, q @ k.swapaxes(2, 3) / np.sqrt(H), -1e30)
    p = np.exp(score - score.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = back @ v.swapaxes(2, 3)
    d_score = p * (d_p - (p * d_p).sum(-1, keepdims=True)) / np.sqrt(H)
    shared = [d_score.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ back]
    d_k, d_v = (x.reshape(B, K, N // K, T, H).sum(2) for x in shared)
    return tuple(x.swapaxes(1, 2) for x in (p @ v, d_score @ k, d_k, d_v))


def computed(q, k, v, back, window, dtype=jnp.float32, **options):
    """The same by ``attend``."""
    valid = jnp.asarray(VALID)
    positions = token_positions(valid)
    mask = attention_mask(positions, positions, valid, (window,))

    @jax.jit
    def run(q, k, v, back):
        def out(q, k, v):
            return attend(q, k, v, mask, valid_BT=valid, window=window, **options)

        y, pull = jax.vjp(out, q, k, v)
        return y, *pull(back)

    return run(*(jnp.asarray(x, dtype) for x in (q, k, v, back)))


def assert_as_the_formula(found, expected, tolerance: str) -> None:
    """At real tokens; what is at padding is finite, and no gradient goes there."""
    y, *gradients = (np.asarray(x, np.float64) for x in found)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[VALID], expected[0][VALID], atol=TOL[tolerance])
    for ours, theirs in zip(gradients, expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOL[tolerance])
        assert not ours[~VALID].any()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("implementation", ["xla", "splash_interpreted"])
def test_forward_and_gradients_are_the_formulas(implementation, window) -> None:
    found = computed(*arrays(), window, implementation=implementation)
    assert_as_the_formula(found, formula(*arrays(), window), "float32")


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_padded_on_the_left_are_the_formula_in_every_block(window, monkeypatch) -> None:
    """As prompts are: there the first blocks of short rows hold nothing but padding."""
    monkeypatch.setitem(globals(), "VALID", VALID[:, ::-1])
    found = computed(*arrays(), window)
    assert_as_the_formula(found, formula(*arrays(), window), "float32")


def test_long_rows_are_cut_into_few_blocks(monkeypatch) -> None:
    real, keys = jax.nn.dot_product_attention, []

    def counting(q, k, v, **options):
        keys.append(k.shape[1])
        return real(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", counting)
    for length, ends in ((100, [100]), (300, [128, 256, 300]), (2049, list(range(256, 2049, 256)))):
        keys.clear()
        q = jnp.zeros((1, length, 1, 2))
        attend(q, q, q, jnp.ones((1, 1, length, length), bool))
        assert keys == ends + [length] * (length not in ends)


@pytest.mark.parametrize("window", WINDOWS)
def test_what_cudnn_is_asked_for_is_the_formula(window, monkeypatch) -> None:
    real, asked = jax.nn.dot_product_attention, []

    def instead(*given, implementation, **options):
        asked.append(implementation)
        return real(*given, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    found = computed(*arrays(), window, implementation="cudnn")
    assert asked == ["cudnn"]
    assert_as_the_formula(found, formula(*arrays(), window), "float32")


def test_a_bfloat16_kernel_is_as_near_as_bfloat16_can_be() -> None:
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays()]
    found = computed(*rounded, None, jnp.bfloat16, implementation="splash_interpreted")
    assert_as_the_formula(found, formula(*rounded, None), "bf16_attention")


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_splash_on_a_mesh_is_the_formula(shape) -> None:
    """Heads over tensor=2; whole on each of tensor=4, which does not divide the two of keys."""
    rows = layouts(make_mesh(*shape)).rows
    found = computed(*arrays(), None, implementation="splash_interpreted", rows=rows)
    assert_as_the_formula(found, formula(*arrays(), None), "float32")


@pytest.mark.parametrize("length", [130, 383])
def test_splash_reads_rows_of_any_length(length, monkeypatch) -> None:
    """Its blocks are filled with padding that is never seen and never comes back."""
    monkeypatch.setitem(globals(), "T", length)
    monkeypatch.setitem(globals(), "VALID", VALID[:, :length])
    found = computed(*arrays(), None, implementation="splash_interpreted")
    assert_as_the_formula(found, formula(*arrays(), None), "float32")


@partial(jax.jit, static_argnames="graph")
def learnt(graph, params, tokens, valid):
    """A loss on real tokens, its gradients, and what was computed on the way."""

    def loss(params):
        model = nnx.merge(graph, params)
        positions = token_positions(valid)
        mask = attention_mask(positions, positions, valid, model.spec.windows)
        hidden, cache = model(tokens, positions, mask)
        kept = jax.tree.map(lambda x: jnp.where(valid[None, ..., None, None], x, 0), cache)
        hidden = jnp.where(valid[..., None], hidden, 0)
        return (hidden @ jnp.linspace(0, 0.3, SPEC.hidden_size)).mean() + kept.v.mean(), (
            hidden,
            kept,
        )

    return jax.value_and_grad(loss, has_aux=True)(params)


# Some layers of all of these see everything; scores are scaled and capped, and two bases rotate.
MIXED = {
    "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    "num_layers": 3,
    "sliding_rope_theta": 10.0,
    "attention_scale": 0.3,
    "attention_cap": 2.0,
}


@pytest.mark.parametrize(("shape", "mixed"), [(None, {}), ((2, 2, 2), {}), ((2, 2, 2), MIXED)])
def test_a_decoder_learns_the_same_by_the_kernel(shape, mixed) -> None:
    spec = replace(SPEC, **{"sliding_window": 50, "num_layers": 2, **mixed})
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 40, (4, 128)), jnp.int32)
    valid = jnp.asarray(np.arange(128) < np.array([[128], [127], [60], [0]]))
    layout = None if shape is None else layouts(make_mesh(*shape))
    options: dict[str, Any] = {"spec": spec, "layouts": layout, "remat": "dots"}
    plain, kernel = (
        learnt(*nnx.split(build(**options, attention=attention)), tokens, valid)
        for attention in ("xla", "splash_interpreted")
    )
    for ours, theirs in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOL["by_kernel"])


def test_queries_and_a_past_are_read_without_the_kernel(monkeypatch) -> None:
    def kernel_is_used(*_):
        raise AssertionError("the kernel is used")

    plain, kernel = (build(attention=name) for name in ("xla", "splash_interpreted"))
    tokens, positions = jnp.arange(20).reshape(2, 10), jnp.tile(jnp.arange(10), (2, 1))
    mask = attention_mask(positions, positions, jnp.ones((2, 10), bool))
    monkeypatch.setattr(attend_module, "_splash", kernel_is_used)
    with pytest.raises(AssertionError, match="the kernel is used"):
        kernel(tokens, positions, mask)
    _, cache = plain(tokens, positions, mask, key_space="post_rope")
    jax.tree.map(
        np.testing.assert_array_equal,
        *(
            model.keeping(tokens, positions, mask, attrgetter("pre_rope", "v", "q"), by_mask=True)
            for model in (kernel, plain)
        ),
    )
    last = (tokens[:, 9:], positions[:, 9:], mask[:, :, 9:])
    past = KVCache(*(x[:, :, :9] for x in cache))
    jax.tree.map(np.testing.assert_array_equal, kernel(*last, past=past), plain(*last, past=past))


CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H100, T4, MI300 = (
    SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    for kind, capability in (("H100", "9.0"), ("Tesla T4", "7.5"), ("MI300X", "gfx942"))
)


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "head_dim", "expected"),
    [
        ("auto", CPU, "float32", 64, Choice("xla", "the device is a CPU")),
        ("auto", H100, "bfloat16", 128, Choice("cudnn", "the device is a GPU")),
        ("auto", H100, "float32", 64, "it computes in float32"),
        ("auto", H100, "bfloat16", 256, "head_dim=256"),
        ("auto", H100, "bfloat16", 60, "head_dim=60"),
        ("auto", T4, "bfloat16", 64, "not on Tesla T4"),
        ("auto", MI300, "bfloat16", 64, "not on MI300X"),
        ("auto", TPU, "bfloat16", 64, Choice("splash", "the device is a TPU")),
        ("auto", TPU, "float32", 128, Choice("splash", "the device is a TPU")),
        ("xla", H100, "bfloat16", 128, Choice("xla", "train.attention=xla")),
        ("cudnn", H100, "bfloat16", 128, Choice("cudnn", "train.attention=cudnn")),
        ("splash", TPU, "bfloat16", 64, Choice("splash", "train.attention=splash")),
    ],
)
def test_the_choice(asked, device, dtype, head_dim, expected) -> None:
    found = choose(asked, device, "student", jnp.dtype(dtype), replace(SPEC, head_dim=head_dim))
    if isinstance(expected, Choice):
        assert found == expected
    else:
        assert found.implementation == "xla"
        assert expected in found.reason


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "message"),
    [
        ("cudnn", CPU, "bfloat16", "student: the device is a CPU; use auto or xla"),
        ("splash", H100, "bfloat16", "student: the device is a GPU; use auto or xla"),
        ("cudnn", H100, "float32", "student: it computes in float32"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(asked, device, dtype, message) -> None:
    with pytest.raises(KavaError, match=f"train.attention={asked} does not work for {message}"):
        choose(asked, device, "student", jnp.dtype(dtype), replace(SPEC, head_dim=64))


def test_the_note_names_models_only_where_they_differ() -> None:
    fast, slow = Choice("cudnn", "the device is a GPU"), Choice("xla", "it computes in float32")
    assert in_words([("student", fast), ("big", fast)]) == (
        "attention: cudnn, because the device is a GPU"
    )
    assert in_words([("student", fast), ("big", slow), ("old", slow)]) == (
        "attention: cudnn for student, because the device is a GPU; "
        "xla for big, old, because it computes in float32"
    )


def test_a_run_reads_batches_by_the_kernel_and_prompts_without(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(write_workspace(tmp_path))
    config = parse_config(CONFIG)
    made = partial(blueprint.make_blueprint, mesh=make_mesh(), measured_maps={})
    models = models_without_weights(config)
    assert made(config, models=models).attending == "attention: xla, because the device is a CPU"
    refused = parse_config(CONFIG, ["train.attention=cudnn"])
    with pytest.raises(KavaError, match="attention=cudnn does not work for student"):
        made(refused, models=models)
    chosen = Choice("splash_interpreted", "this is a test")
    monkeypatch.setattr(blueprint, "choose", lambda *_: chosen)
    found = made(config, models=models)

    def attention(graph, abstract) -> str:
        return nnx.merge(graph, abstract).attention

    student, teacher = found.student, found.teachers["big"].part
    assert attention(found.objective.student, student.abstract) == "splash_interpreted"
    assert attention(found.objective.teachers["big"].graph, teacher.abstract) == (
        "splash_interpreted"
    )
    assert attention(student.graph, student.abstract) == "xla"


def run_here(what: str) -> None:
    """This file as a program, on whatever devices the machine has."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.test_attend", what],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        # Flags of the tests' own compiler, which others do not know.
        env=os.environ | {"XLA_FLAGS": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="no NVIDIA GPU on this machine")
def test_cudnn_is_the_formula_on_a_gpu() -> None:
    run_here("cudnn")


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is in the tpu extra only")
def test_the_compiler_for_tpus_takes_splash() -> None:
    run_here("tpu")


def by_cudnn() -> None:
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays()]
    for window in WINDOWS:
        found = computed(*rounded, window, jnp.bfloat16, implementation="cudnn")
        assert_as_the_formula(found, formula(*rounded, window), "bf16_attention")


def for_tpus() -> None:
    """Forward and backward, heads over two chips, for the widths that models have."""
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(2, 1, 2, described_devices(CHIPS["v5e"], 4))
    rows = layouts(mesh).rows
    for width, length, window in ((64, 1024, None), (80, 1000, None), (128, 1024, 100)):
        q, kv = (jnp.zeros((B, length, heads, width), jnp.bfloat16) for heads in (N, K))
        mask, valid = jnp.zeros((B, 1, length, length), bool), jnp.ones((B, length), bool)
        how = partial(attend, implementation="splash", window=window, rows=rows)

        def loss(q, k, v, mask, valid, how=how):
            return how(q, k, v, mask, valid_BT=valid).astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=rows)
        lowered = step.lower(*(jax.typeof(x) for x in (q, kv, kv, mask, valid)))
        assert "tpu_custom_call" in lowered.as_text()
        lowered.compile()


if __name__ == "__main__":
    {"cudnn": by_cudnn, "tpu": for_tpus}[sys.argv[1]]()
