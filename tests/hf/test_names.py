"""The name table against tensor names, shapes and layouts written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.names import (
    compact,
    expected_tensors,
    parameter_shapes,
    rows_of,
    stored_rows,
)
from kava_jax.models.decoder import Decoder
from tests.tiny_models import CONFIGS, random_tensors, tensor_shapes


def spec_of(name: str):
    return spec_from_config(CONFIGS[name], where=name)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_expected_tensors_are_those_of_the_family(name):
    assert expected_tensors(spec_of(name)) == tensor_shapes(CONFIGS[name])


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize(
    ("layers", "tail", "head"), [(None, False, True), (1, True, False), (0, True, False)]
)
def test_parameter_shapes_are_those_the_decoder_builds(name, layers, tail, head):
    spec = spec_of(name)
    model = nnx.eval_shape(
        lambda: Decoder(spec, rngs=nnx.Rngs(0), blocks=layers, tail=tail, head=head)
    )
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    built = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in state}
    assert parameter_shapes(spec, layers=layers, tail=tail, head=head) == built


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_row_there_and_back_is_the_same_tensor(name):
    spec = spec_of(name)
    tensors = random_tensors(name)
    for row in stored_rows(spec):
        outer, _ = row.slice_of_theirs(tuple(map(slice, row.our_shape(spec))), spec)
        theirs = tensors[row.name(1)][outer]
        ours = row.to_ours(theirs, spec)
        assert ours.shape == row.our_shape(spec)
        np.testing.assert_array_equal(row.to_theirs(ours, spec), theirs)


def test_layouts_are_those_of_torch_linear():
    spec = spec_of("qwen2")
    tensors = random_tensors("qwen2")
    rows = {row.ours: row for row in rows_of(spec)}
    x_D = np.random.default_rng(0).standard_normal(spec.hidden_size).astype(np.float32)

    key_KH = (tensors["model.layers.1.self_attn.k_proj.weight"] @ x_D).reshape(2, 8)
    row = rows["blocks/attention/k/kernel"]
    kernel = row.to_ours(tensors[row.name(1)], spec)
    np.testing.assert_allclose(np.einsum("DKH,D->KH", kernel, x_D), key_KH, atol=1e-5)

    y_NH = np.arange(48, dtype=np.float32).reshape(6, 8)
    out_D = tensors["model.layers.1.self_attn.o_proj.weight"] @ y_NH.reshape(-1)
    row = rows["blocks/attention/o/kernel"]
    kernel = row.to_ours(tensors[row.name(1)], spec)
    np.testing.assert_allclose(np.einsum("NHD,NH->D", kernel, y_NH), out_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 48), slice(0, 2), slice(0, 8)),
        (slice(12, 24), slice(1, 2), slice(None)),
        (slice(None), slice(0, 1), slice(2, 6)),
        (slice(3, 3), slice(None), slice(None)),
    ],
)
def test_a_slice_reads_only_whole_heads_of_what_was_asked(index):
    spec = spec_of("qwen2")
    theirs = random_tensors("qwen2")["model.layers.0.self_attn.k_proj.weight"]
    row = next(row for row in rows_of(spec) if row.ours == "blocks/attention/k/kernel")
    outer, inner = row.slice_of_theirs(index, spec)
    part = theirs[outer]
    heads = len(range(*index[1].indices(2)))
    assert part.shape == (heads * 8, len(range(*index[0].indices(48))))
    np.testing.assert_array_equal(row.to_ours(part, spec)[inner], row.to_ours(theirs, spec)[index])


def test_compact_folds_runs_of_layers_and_loses_no_name():
    names = [f"model.layers.{i}.a" for i in (0, 1, 2, 5)] + ["model.norm.weight", "b.layers.7.c"]
    assert compact(names) == [
        "model.layers.{0..2}.a",
        "model.layers.5.a",
        "model.norm.weight",
        "b.layers.7.c",
    ]


def test_importing_the_table_starts_no_backend():
    import subprocess
    import sys

    code = (
        "import kava_jax.hf.names, kava_jax.hf.load, kava_jax.hf.export, kava_jax.hf.card, sys\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert jnp.zeros(1).device.platform == jax.default_backend()
