"""The projector over several teachers: its public face, its gradients and its file."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.errors import KavaError
from tests.tolerances import TOL

TEACHERS = {
    "Qwen2-70B": {"d_model": 24, "num_heads": 4, "num_layers": 3},
    "b/small.one": {"d_model": 16, "num_heads": 2, "num_layers": 3},
}
FORWARD, BACKWARD = "teacher_to_student", "student_to_teacher"
VARIANTS = [
    {"kind": kind, "direction": direction, "per_layer": per_layer}
    for kind, direction, per_layer in (
        ("elastic", FORWARD, False),
        ("elastic", BACKWARD, True),
        ("linear", BACKWARD, False),
        ("linear", FORWARD, True),
    )
]


def make(**options) -> KVDimensionProjector:
    return KVDimensionProjector(TEACHERS, 10, student_heads=2, **options)


def weights(projector: KVDimensionProjector) -> dict:
    return nnx.to_pure_dict(nnx.state(projector, nnx.Param))


def _flat(projector: KVDimensionProjector) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(weights(projector))
    return {"/".join(part.key for part in where): np.asarray(leaf) for where, leaf in leaves}


def vectors(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_three_public_lines() -> None:
    projector = KVDimensionProjector({"Qwen2-70B": {"d_model": 64}}, student_d_model=32)
    k, v = vectors(2, 5, 64), vectors(2, 5, 64, seed=1)
    alone = projector.project_teacher_kv("Qwen2-70B", k)
    projected_k, projected_v = projector.project_teacher_kv("Qwen2-70B", k, v)
    assert alone.shape == projected_k.shape == projected_v.shape == (2, 5, 32)
    np.testing.assert_array_equal(alone, projected_k)
    # 64: norm 2 * 64, inner 64 * 64 + 64, out 64 * 32 + 32; keys and values.
    assert projector.count_parameters() == 2 * (128 + 64 * 64 + 64 + 64 * 32 + 32)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_variant_shapes_and_its_file_is_bit_identical(options, tmp_path) -> None:
    projector = make(**options, init_method="normal", mlp_ratio=0.5, dropout=0.2)
    graph, state = nnx.split(projector)
    forward = options["direction"] == FORWARD
    path = tmp_path / "projector.safetensors"
    projector.save(path)
    loaded = KVDimensionProjector.load(path)
    assert loaded.arguments() == projector.arguments()
    before, after = (jax.tree_util.tree_leaves_with_path(weights(p)) for p in (projector, loaded))
    for (where, left), (there, right) in zip(before, after, strict=True):
        assert where == there
        assert left.dtype == right.dtype == jnp.float32
        np.testing.assert_array_equal(left, right)
    for name, heads in (("Qwen2-70B", (4, 6)), ("b/small.one", (2, 8))):
        ours, theirs = ((3, 2, 5, 2, 5), (3, 2, 5, *heads))
        source, target = (theirs, ours) if forward else (ours, theirs)
        cache = {"k": vectors(*source), "v": vectors(*source)}
        got = nnx.merge(graph, state).project(name, cache)
        assert got["k"].shape == got["v"].shape == target
        assert not np.allclose(got["k"], got["v"])  # one input, two sets of weights
        again = loaded.project(name, cache)
        np.testing.assert_array_equal(got["k"], again["k"])
        np.testing.assert_array_equal(got["v"], again["v"])


def test_teachers_keys_and_values_share_nothing() -> None:
    for options in VARIANTS:
        leaves = {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(weights(make(**options)))
            if "'kernel'" in jax.tree_util.keystr(path)
        }
        assert len({path.split("]")[1] for path in leaves}) == 2
        for left, right in itertools.combinations(leaves.values(), 2):
            assert left.shape != right.shape or not np.array_equal(left, right)
        for leaf in leaves.values():  # nor do the layers start alike
            if options["per_layer"]:
                assert leaf.shape[0] == 3
                assert not np.array_equal(leaf[0], leaf[1])


@pytest.mark.parametrize("kind", ["elastic", "linear"])
def test_per_layer_is_each_layers_own_adapter(kind) -> None:
    projector, shared = make(kind=kind, per_layer=True), make(kind=kind)
    k, v = vectors(3, 2, 5, 24), vectors(3, 2, 5, 24, seed=1)
    whole = projector.project_teacher_kv("Qwen2-70B", k, v)
    for layer in range(3):
        nnx.update(shared, jax.tree.map(lambda w, i=layer: w[i], weights(projector)))
        for all_layers, one in zip(
            whole, shared.project_teacher_kv("Qwen2-70B", k[layer], v[layer]), strict=True
        ):
            np.testing.assert_allclose(all_layers[layer], one, atol=TOL["rearranged"])


def test_per_layer_with_equal_weights_is_the_shared_projector() -> None:
    projector, shared = make(per_layer=True), make()
    nnx.update(projector, jax.tree.map(lambda w: jnp.stack([w] * 3), weights(shared)))
    k = vectors(3, 2, 5, 24)
    np.testing.assert_allclose(
        projector.project_teacher_kv("Qwen2-70B", k),
        shared.project_teacher_kv("Qwen2-70B", k),
        atol=TOL["rearranged"],
    )


@pytest.mark.parametrize("per_layer", [False, True])
def test_dropout_masks_differ_between_k_and_v_keys_and_layers(per_layer) -> None:
    projector = make(per_layer=per_layer, dropout=0.5)
    same = weights(projector)
    for pair in same["pairs"].values():
        pair["v"] = pair["k"]
        if per_layer:
            pair["k"] = pair["v"] = jax.tree.map(lambda w: jnp.stack([w[0]] * 3), pair["k"])
    nnx.update(projector, same)
    x = jnp.broadcast_to(vectors(1, 1, 1, 24), (3, 2, 5, 24))

    def run(key=None):
        return projector.project_teacher_kv("Qwen2-70B", x, x, dropout_key=key)

    plain_k, plain_v = run()
    np.testing.assert_array_equal(plain_k, plain_v)
    k, v = run(jax.random.key(0))
    assert not np.array_equal(k, v)
    assert not np.array_equal(k[0], k[1])
    assert not np.array_equal(k, run(jax.random.key(1))[0])
    np.testing.assert_array_equal(k, run(jax.random.key(0))[0])


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_frozen_projector_gets_no_gradient_but_passes_it_through(per_layer) -> None:
    for trainable in (True, False):
        graph, state = nnx.split(make(per_layer=per_layer, trainable=trainable))

        def total(state, x, graph=graph):
            k, v = nnx.merge(graph, state).project_teacher_kv("Qwen2-70B", x, x)
            return jnp.sum(k**2) + jnp.sum(v**2)

        by_weights, by_input = jax.grad(total, (0, 1))(state, vectors(3, 2, 24))
        largest = max(
            float(jnp.abs(leaf).max())
            for leaf in jax.tree.leaves(nnx.to_pure_dict(by_weights)["pairs"]["Qwen2-70B"])
        )
        assert (largest > 0) == trainable
        assert float(jnp.abs(by_input).max()) > 0


def test_parameters_counted_by_hand() -> None:
    linear = 2 * (24 * 10 + 10) + 2 * (16 * 10 + 10)
    assert make(kind="linear").count_parameters() == linear
    assert make(kind="linear", per_layer=True).count_parameters() == 3 * linear
    back = 2 * (10 * 24 + 24) + 2 * (10 * 16 + 16)
    assert make(kind="linear", direction=BACKWARD).count_parameters() == back
    half = 2 * (48 + 24 * 12 + 12 + 12 * 10 + 10) + 2 * (32 + 16 * 8 + 8 + 8 * 10 + 10)
    assert make(mlp_ratio=0.5).count_parameters() == half


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("per_layer", [False, True])
def test_identity_passes_vectors_and_its_file_holds_none(direction, per_layer, tmp_path) -> None:
    side = {"d_model": 10, "num_heads": 2, "num_layers": 3}
    options = {"kind": "identity", "direction": direction, "per_layer": per_layer}
    projector = KVDimensionProjector({"a": side, "b": side}, 10, student_heads=2, **options)
    assert projector.count_parameters() == 0
    assert weights(projector) == {}
    projector.save(tmp_path / "projector")
    loaded = KVDimensionProjector.load(tmp_path / "projector")
    assert loaded.arguments() == projector.arguments()
    again = nnx.merge(nnx.split(projector)[0], {})
    cache = {"k": vectors(3, 2, 5, 2, 5), "v": vectors(3, 2, 5, 2, 5, seed=1)}
    for one in (projector, loaded, again):
        got = one.project("b", cache, dropout_key=jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, got, cache)


def test_identity_needs_equal_heads() -> None:
    for student, heads, told in ((12, 2, "12 (2 x 6)"), (16, 2, "16 (2 x 8)"), (8, 1, "8 (1 x 8)")):
        for direction in (FORWARD, BACKWARD):
            with pytest.raises(KavaError) as caught:
                KVDimensionProjector(
                    {"a": {"d_model": 16, "num_heads": 4}},
                    student,
                    student_heads=heads,
                    kind="identity",
                    direction=direction,
                )
            for words in ("teacher 'a'", "16 (4 x 4)", told, "kind=linear bridges them"):
                assert words in str(caught.value)


def test_bad_shapes_and_names_are_told() -> None:
    with pytest.raises(KavaError, match=r"student_d_model=10 is not divisible by 3 heads"):
        KVDimensionProjector(TEACHERS, 10, student_heads=3)
    with pytest.raises(KavaError, match=r"teacher_configs\.a\.d_model=7 is not divisible by 2"):
        KVDimensionProjector({"a": {"d_model": 7, "num_heads": 2}}, 10)
    with pytest.raises(KavaError, match=r"teacher_configs\.a\.num_layers=None with per_layer"):
        KVDimensionProjector({"a": {"d_model": 8}}, 10, per_layer=True)
    projector = make(per_layer=True)
    with pytest.raises(KavaError, match=r"'qwen' is unknown .* knows Qwen2-70B, b/small\.one"):
        projector.project_teacher_kv("qwen", vectors(3, 24))
    with pytest.raises(KavaError, match=r"\(3, 2, 25\).*\[3, \.\.\., 24\]"):
        projector.project_teacher_kv("Qwen2-70B", vectors(3, 2, 25))
    with pytest.raises(KavaError, match=r"\(2, 2, 24\).*\[3, \.\.\., 24\]"):
        projector.project_teacher_kv("Qwen2-70B", vectors(2, 2, 24))
    with pytest.raises(KavaError, match=r"\(3, 10\).*built for 24"):
        make().project_teacher_kv("Qwen2-70B", vectors(3, 10))


def test_a_file_does_not_depend_on_how_arrays_lie_in_memory(tmp_path) -> None:
    """What linear algebra returns is often laid out column by column."""
    projector = make(kind="linear", per_layer=True)
    by_columns = jax.tree.map(lambda x: np.asfortranarray(np.asarray(x)), weights(projector))
    nnx.update(projector, by_columns)
    assert any(not x.flags["C_CONTIGUOUS"] for x in jax.tree.leaves(by_columns))
    projector.save(tmp_path / "file")
    loaded = weights(KVDimensionProjector.load(tmp_path / "file"))
    jax.tree.map(np.testing.assert_array_equal, loaded, by_columns)


def test_a_file_that_is_none_of_ours_is_told(tmp_path) -> None:
    from safetensors.numpy import save_file

    mark = "kava_jax.projector"
    arguments = make(kind="linear").arguments()
    tensor = {"x": np.zeros(3, np.float32)}
    (tmp_path / "text").write_text("not safetensors at all")
    save_file(tensor, tmp_path / "unmarked")
    save_file(tensor, tmp_path / "marked_otherwise", metadata={"format": "pt"})
    save_file(tensor, tmp_path / "no_json", metadata={mark: "{"})
    save_file(tensor, tmp_path / "no_arguments", metadata={mark: json.dumps({"kind": "linear"})})
    save_file(tensor, tmp_path / "no_tensors", metadata={mark: json.dumps(arguments)})
    short = {name: value[:-1] for name, value in _flat(make(kind="linear")).items()}
    save_file(short, tmp_path / "other_shapes", metadata={mark: json.dumps(arguments)})
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 7
    for name in [*files, "missing"]:
        with pytest.raises(KavaError, match="is not a projector file") as caught:
            KVDimensionProjector.load(tmp_path / name)
        assert "\n" not in str(caught.value)
