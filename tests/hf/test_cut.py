"""Cut models: slices of the teacher's own tensors, read by transformers with our logits."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import ortho_group

from kava_jax.errors import KavaError
from kava_jax.hf.cut import (
    cut_on_disk,
    cut_spec,
    load_cut_params,
    merging_maps,
    plan_cut,
    stored_dtype,
)
from kava_jax.hf.cut_record import CutRecord, read_cut_record
from kava_jax.hf.export import export_model
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.hf.locate import model_fingerprint
from kava_jax.hf.tensor_files import TensorFiles
from kava_jax.models.decoder import Decoder
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.parallel.mesh import make_mesh
from kava_jax.runs.parts import Part, place_slices
from tests.tiny import write_model
from tests.tiny_models import (
    CONFIGS,
    DENSE,
    QUICK_FILES,
    each,
    flat,
    load_decoder,
    write_directory,
    write_tokenizer,
)
from tests.tolerances import TOL


class Cut(NamedTuple):
    """What is left of any teacher."""

    layers: tuple[int, ...]
    kv_heads: int | None = None
    units: tuple[tuple[int, ...], ...] | None = None


TOKENS = np.random.default_rng(5).integers(3, 97, (2, 12))
ALL = Cut((0, 1, 2))
rng = np.random.default_rng(6)
UNITS = tuple(tuple(sorted(rng.choice(80, 30, replace=False).tolist())) for _ in range(2))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, tokenizer_dir):
    """``teacher(name, dtype)`` as a directory with a tokenizer and, of one file, made once."""
    root, made = tmp_path_factory.mktemp("teachers"), {}

    def teacher(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            directory = write_directory(root / f"{name}-{dtype}", name, jnp.dtype(dtype))
            shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
            made[name, dtype] = directory
        return made[name, dtype]

    return teacher


def of(source: Path, cut: Cut) -> CutRecord:
    named = {"teacher": "the/teacher", "fingerprint": model_fingerprint(source)}
    plan = plan_cut(read_spec(source), cut.layers, "middle", cut.kv_heads, None, **named)
    return plan.model_copy(update={"units": cut.units})


def write(source: Path, out: Path, cut: Cut, **changes) -> Path:
    arguments = {"dtype": "float32", "card": "# card\n"} | changes
    spec, record = read_spec(source), of(source, cut)
    export_model(
        out,
        cut_on_disk(source, spec, record, arguments["dtype"]),
        cut_spec(spec, record),
        tokenizer=None,
        source_dir=source,
        cut=record,
        **arguments,
    )
    return out


def our_logits(directory: Path) -> np.ndarray:
    model = load_decoder(directory)
    valid = jnp.ones(TOKENS.shape, bool)
    positions = token_positions(valid)
    mask = attention_mask(positions, positions, valid, model.spec.windows)
    return np.asarray(model.logits(model(jnp.asarray(TOKENS), positions, mask)[0]))


def their_logits(directory: Path) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return loaded.eval()(torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("name", each(DENSE, QUICK_FILES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_layers_are_the_teacher_bit_for_bit(name, dtype, teachers, tmp_path):
    source = teachers(name, dtype)
    spec = read_spec(source)
    assert stored_dtype(source, spec) == dtype
    out = write(source, tmp_path / "out", ALL, dtype=dtype)
    theirs, ours = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for tensor, value in theirs.items():
        assert (value.dtype, value.tobytes()) == (ours[tensor].dtype, ours[tensor].tobytes())
    assert read_spec(out) == spec
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("name", each(DENSE, QUICK_FILES))
def test_layers_and_units_are_slices_of_the_teachers_tensors(name, teachers, tmp_path):
    source = teachers(name)
    out = write(source, tmp_path / "out", Cut((0, 2), None, UNITS), max_shard_bytes=40_000)
    theirs, ours = load_file(source / "model.safetensors"), {}
    for file in out.glob("*.safetensors"):
        ours |= load_file(file)
    expected = {}
    for tensor, value in theirs.items():
        parts = tensor.split(".")
        if parts[1] == "layers":
            if parts[2] == "1":
                continue
            place = {"0": 0, "2": 1}[parts[2]]
            chosen = list(UNITS[place])
            if parts[-2] in ("gate_proj", "up_proj"):
                value = value[chosen]
            elif parts[-2] == "gate_up_proj":
                value = np.concatenate([half[chosen] for half in np.split(value, 2)])
            elif parts[-2:] == ["down_proj", "weight"]:
                value = value[:, chosen]
            parts[2] = str(place)
        expected[".".join(parts)] = value
    assert expected.keys() == ours.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)


CUTS = {
    "layers": Cut((0, 2)),
    "units": Cut((0, 1, 2), None, (*UNITS, UNITS[0])),
    "heads": Cut((0, 1, 2), 1),
    "everything": Cut((1, 2), 1, UNITS),
}


@pytest.mark.parametrize("name", each(DENSE, QUICK_FILES))
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_every_cut_loads_in_transformers_with_our_logits(name, cut, teachers, tmp_path):
    source = teachers(name)
    if name == "olmo2" and cut.kv_heads:
        with pytest.raises(KavaError, match="norms the keys of all its heads together"):
            write(source, tmp_path / "out", cut)
        return
    out = write(source, tmp_path / "out", cut)
    assert read_spec(out) == cut_spec(read_spec(source), of(source, cut))
    ours = our_logits(out)
    assert np.abs(ours - their_logits(out)).max() < TOL["parity"]
    # Something was cut, if there was more than one head to merge.
    changed = np.abs(ours - our_logits(source)).max() > 0.01
    assert changed or (read_spec(source).num_kv_heads == 1 and cut is CUTS["heads"])


def test_the_record_says_where_everything_came_from(teachers, tmp_path):
    source = teachers("llama_biased")
    out = write(source, tmp_path / "out", Cut((1, 2), 1, UNITS))
    assert read_cut_record(out) == CutRecord(
        teacher="the/teacher",
        fingerprint=model_fingerprint(source),
        teacher_layers=3,
        layers=(1, 2),
        kv_heads=((0, 1),),
        units=UNITS,
    )
    plain = read_cut_record(write(source, tmp_path / "plain", Cut((0, 1))))
    assert plain is not None
    assert (plain.kv_heads, plain.units) == (((0,), (1,)), None)


def test_a_healed_student_keeps_its_record(teachers, tmp_path):
    source = write(teachers("qwen2"), tmp_path / "cut", Cut((0, 2)))
    spec = read_spec(source)
    params = load_decoder_params(source, spec)
    export_model(
        tmp_path / "healed",
        params,
        spec,
        dtype="float32",
        tokenizer=None,
        source_dir=source,
        card="",
    )
    record = "kava_cut.json"
    assert (tmp_path / "healed" / record).read_bytes() == (source / record).read_bytes()
    # It belongs to the export, so the next one may replace it.
    write(teachers("qwen2"), tmp_path / "healed", Cut((0, 1)))


# What a Qwen2 of transformers 4.x and one of 5.x say of a window in some layers, when it is off.
OF_DEPTH = {
    "qwen2": {"max_window_layers": 2, "sliding_window": 4, "use_sliding_window": False},
    "qwen3": {"max_window_layers": 2, "layer_types": ["full_attention"] * 3},
    "mistral": {"layer_types": ["sliding_attention"] * 3},
}


@pytest.mark.parametrize("name", OF_DEPTH)
def test_keys_that_depend_on_the_depth_stay_right(name, teachers, tmp_path):
    source = shutil.copytree(teachers(name), tmp_path / "teacher")
    (source / "config.json").write_text(json.dumps(CONFIGS[name] | OF_DEPTH[name]))
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    out = write(source, tmp_path / "out", Cut((0, 2)))
    assert np.abs(our_logits(out) - their_logits(out)).max() < TOL["parity"]
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert "layer_types" not in config
    assert config["sliding_window"] == (5 if name == "mistral" else None)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}


def hidden_copies(source: Path, tensors: dict[str, np.ndarray], *, turn_keys: bool) -> None:
    """Make head 1 of every layer a copy of head 0 in another basis, in Hugging Face's layout."""
    H = read_spec(source).head_dim
    chance = np.random.default_rng(8)
    for layer in range(3):
        angles = chance.uniform(0, 2 * np.pi, H // 2) if turn_keys else np.zeros(H // 2)
        # A plane rotation of each pair (i, i + H / 2).
        cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
        turns = {
            "k": np.block([[cos, -sin], [sin, cos]]),
            "v": ortho_group.rvs(H, random_state=chance),
        }
        for module, turn in turns.items():
            for leaf in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.{module}_proj.{leaf}"
                if name in tensors:
                    value = tensors[name].astype(np.float64)
                    tensors[name] = np.concatenate([value[:H], turn @ value[:H]]).astype(np.float32)


@pytest.mark.parametrize("turned", [False, True], ids=["equal", "turned"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3", "llama_biased", "mistral"])
def test_merged_copies_are_the_teacher(name, turned, teachers, tmp_path):
    """Equal heads, also in hidden bases, where a plain mean would lose them."""
    source = shutil.copytree(teachers(name), tmp_path / "teacher")
    path = source / "model.safetensors"
    tensors = load_file(path)
    if turned:
        hidden_copies(source, tensors, turn_keys=not read_spec(source).qk_norm)
    else:
        for tensor, value in tensors.items():
            if tensor.split(".")[-2] in ("k_proj", "v_proj"):
                tensors[tensor] = np.concatenate([value[: len(value) // 2]] * 2)
    save_file(tensors, path)
    before = our_logits(source)
    out = write(source, tmp_path / "out", Cut((0, 1, 2), 1))
    after = load_file(out / "model.safetensors")
    assert after["model.layers.0.self_attn.v_proj.weight"].shape[0] == read_spec(source).head_dim
    assert np.abs(our_logits(out) - before).max() < TOL["float32"]


@pytest.mark.parametrize(
    "name", each(["llama3", "llama_biased", "mistral", "phi4_mini"], {"llama_biased"})
)
def test_the_merging_maps_are_what_the_cut_does_to_keys_and_values(name, teachers, tmp_path):
    """Weights and biases of the cut are the teacher's through the maps."""
    source, cut = teachers(name), Cut((0, 2), 1)
    maps = merging_maps(source, read_spec(source), of(source, cut))
    out = write(source, tmp_path / "out", cut)
    before, after = (flat(load_decoder_params(path, read_spec(path))) for path in (source, out))
    for part in ("k", "v"):
        kernel, bias = maps[part]["out"]["kernel"], maps[part]["out"]["bias"]
        assert not bias.any()
        assert bias.shape == kernel[:, 0].shape
        for path in (f"blocks/attention/{part}/{leaf}" for leaf in ("kernel", "bias")):
            if path in before:
                theirs, ours = before[path][[0, 2]], after[path]
                found = theirs.reshape(2, -1, kernel.shape[1]) @ kernel
                np.testing.assert_allclose(found.reshape(ours.shape), ours, atol=TOL["float32"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Qwen2 whose sizes a mesh of 2 x 2 x 2 divides, before and after the cut."""
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    directory = tmp_path_factory.mktemp("wide") / "teacher"
    return write_model(directory, seed=4, num_hidden_layers=4, **sizes)


EVERY_SECOND = tuple(range(0, 32, 2))
ON_MESH = Cut((0, 3), 2, (EVERY_SECOND, tuple(range(16))))


def on_mesh(source: Path, cut: Cut, mesh) -> dict[str, jax.Array]:
    spec, record = read_spec(source), of(source, cut)
    part = Part.of(lambda rngs: Decoder(cut_spec(spec, record), rngs=rngs), mesh)
    put = partial(place_slices, part.shardings)
    return load_cut_params(source, spec, record, put=put)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_a_cut_onto_a_mesh_is_the_written_directory(shape, wide, tmp_path):
    found = on_mesh(wide, ON_MESH, make_mesh(*shape))
    leaf = found["blocks"]["mlp"]["up"]["kernel"]
    assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    out = write(wide, tmp_path / "out", ON_MESH)
    written = flat(load_decoder_params(out, read_spec(out)))
    for path, value in flat(found).items():
        np.testing.assert_array_equal(value, written[path], err_msg=path)


def test_each_device_reads_its_slice_alone(wide, monkeypatch):
    read, sizes = TensorFiles.read, {}

    def counted(self, name, index):
        part = read(self, name, index)
        sizes[name] = max(sizes.get(name, 0), part.size)
        return part

    monkeypatch.setattr(TensorFiles, "read", counted)
    on_mesh(wide, Cut((0, 3), None, (EVERY_SECOND, EVERY_SECOND)), make_mesh(1, 8, 1))
    up = sizes["model.layers.3.mlp.up_proj.weight"]
    assert up == 31 * 32 // 8  # from the first unit to the last
    assert sizes["model.embed_tokens.weight"] == 512 * 32 // 8
    assert not [name for name in sizes if ".layers.1." in name or ".layers.2." in name]


def test_nan_in_what_is_kept_is_named_and_nothing_is_left(teachers, tmp_path):
    source = shutil.copytree(teachers("qwen2"), tmp_path / "teacher")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 3] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(KavaError, match=r"NaN or infinity in model\.layers\.1\..*v_proj"):
        write(source, tmp_path / "out", Cut((0, 1), 1))
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}
    with pytest.raises(KavaError, match=r"NaN or infinity in model\.layers\.1\..*v_proj"):
        load_cut_params(source, read_spec(source), of(source, Cut((0, 1), 1)))
    write(source, tmp_path / "out", Cut((0, 2), 1))


def test_what_float16_cannot_hold_is_named(teachers, tmp_path):
    source = shutil.copytree(teachers("qwen2"), tmp_path / "teacher")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(KavaError, match=r"float16 cannot hold the values of .*o_proj"):
        write(source, tmp_path / "out", Cut((0, 1), 1), dtype="float16")


def test_a_few_wide_tensors_widen_all(teachers, tmp_path):
    """Norms in float32 among bfloat16: nothing is lost."""
    source = shutil.copytree(teachers("qwen3", "bfloat16"), tmp_path / "teacher")
    tensors = load_file(source / "model.safetensors")
    norm = tensors["model.norm.weight"].astype(np.float32)
    save_file(tensors | {"model.norm.weight": norm}, source / "model.safetensors")
    assert stored_dtype(source, read_spec(source)) == "float32"
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    save_file(tensors | frequencies, source / "model.safetensors")
    assert stored_dtype(source, read_spec(source)) == "bfloat16"


def test_a_mixture_of_experts_is_not_cut(tmp_path):
    spec = read_spec(write_directory(tmp_path, "mixtral"))
    with pytest.raises(KavaError, match=r"teacher=t: a mixture of experts \(mixtral\) is not cut"):
        plan_cut(spec, (0, 2), "middle", None, None, teacher="t", fingerprint="")


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (((0, 2, 1), None, None), "layers=0,2,1: the teacher has 3 layers; name some of 0 to 2"),
        (((0, 1, 1), None, None), "each once, in ascending order"),
        (((), None, None), "layers=: the teacher has 3 layers; name some"),
        (((0, 3), None, None), "layers=0,3: the teacher has 3 layers; name some of 0 to 2"),
        (((-1, 0), None, None), "layers=-1,0: the teacher has 3 layers"),
        ((0, None, None), "layers=0: the teacher has 3 layers; keep 1 to 3 of them"),
        ((4, None, None), "layers=4: the teacher has 3 layers"),
        ((2, 3, None), "kv_heads=3 does not divide the teacher's 2 KV heads; use one of 1, 2"),
        ((2, 0, None), "kv_heads=0 does not divide"),
        ((2, None, 81), "intermediate_size=81: the teacher has 80 units in a layer; keep 1 to 80"),
        ((2, None, 0), "intermediate_size=0: the teacher has 80 units"),
    ],
)
def test_what_a_teacher_does_not_have_is_refused(kept, words, teachers):
    layers, kv_heads, units = kept
    spec = read_spec(teachers("qwen2"))
    with pytest.raises(KavaError) as error:
        plan_cut(spec, layers, "middle", kv_heads, units, teacher="t", fingerprint="")
    assert words in str(error.value)
