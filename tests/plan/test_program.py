"""Counting a program's products and messages: by hand, and scanned against unrolled."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from kava_jax.models.attend import attend
from kava_jax.models.decoder import Decoder
from kava_jax.models.masks import attention_mask, token_positions
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.mesh import make_mesh
from kava_jax.plan.compiled import partitioned
from kava_jax.plan.program import first_group, work_of

NESTED = """HloModule nested

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %w = bf16[8,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %y = bf16[4,8]{1,0} dot(%p#1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %y)
}

%inner_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[4,8]{1,0}) while(%p), condition=%inner_condition, body=%inner_body
}

%outer_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%p#0, %n), direction=LT
}

ENTRY %main (p: (s32[], bf16[4,8]), q: f32[16,8]) -> f32[2,8] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %q = f32[16,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %loop = (s32[], bf16[4,8]{1,0}) while(%p), condition=%outer_condition, body=%outer_body
  %kept = f32[16,8]{1,0} all-reduce(%q), replica_groups=[1,8]<=[8], to_apply=%add
  %sums = f32[16,8]{1,0} all-reduce(%q), replica_groups=[1,8]<=[8], to_apply=%add
  %used = f32[16,8]{1,0} multiply(%sums, %sums)
  ROOT %part = f32[2,8]{1,0} dynamic-slice(%kept, %zero, %zero), dynamic_slice_sizes={2,8}
}
"""


def test_loops_and_messages_by_hand() -> None:
    work = work_of(NESTED)
    # 3 x 5 rounds of a product [4, 8] x [8, 8].
    assert work.flops == 15 * 2 * 4 * 8 * 8
    assert work.products == {"bf16": 15}
    group, everyone = (0, 1, 2, 3), tuple(range(8))
    assert work.messages == {
        ("all-gather", group): 15 * 8 * 8 * 2 * 3 / 4,
        # Only an eighth of this sum is kept, so it is scattered: half of what a full sum sends.
        ("reduce-scatter", everyone): 16 * 8 * 4 * 7 / 8,
        ("all-reduce", everyone): 2 * 16 * 8 * 4 * 7 / 8,
    }
    assert list(work.bytes_by_kind()) == ["all-gather", "all-reduce", "reduce-scatter"]


def test_loops_as_accelerators_write_them() -> None:
    """The number of rounds is told, or the comparison is in a fusion."""
    less = "ROOT %less = pred[] compare(%i, %n), direction=LT\n}"
    told = NESTED.replace(less, less.replace("LT", "NE")).replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    fused = NESTED.replace(less, "ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%inner_less\n}")
    fused = fused.replace(
        "%inner_condition (p",
        f"%inner_less (i: s32[]) -> pred[] {{\n"
        f"  %i = s32[] parameter(0)\n  %n = s32[] constant(5)\n  {less}\n\n%inner_condition (p",
    ).replace(
        "  %n = s32[] constant(5)\n  ROOT %less = pred[] fusion", "  ROOT %less = pred[] fusion"
    )
    assert "constant(5)" in fused
    assert work_of(told) == work_of(fused) == work_of(NESTED)


def test_a_loop_without_a_known_end_is_refused() -> None:
    with pytest.raises(ValueError, match="inner_condition is not a counter below a constant"):
        work_of(NESTED.replace("%n = s32[] constant(5)", "%n = s32[] copy(%i)"))


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, x", (0, 4)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['axis_0'=16] {'axis_0'}, x", tuple(range(16))),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, x", (0, 2)),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}, x", (0, 1, 4, 5)),
        ("replica_groups=mesh['all'=8] {'all':(1)2}, x", (0, 4)),
        ("replica_groups=mesh['all'=8] {'all':(2)4}, x", (0, 1, 2, 3)),
        ("source_target_pairs={{0,1},{1,0}}, x", (0, 1)),
        ("source_target_pairs={{0,0},{1,3}}, x", (1, 3)),
        ("no groups", ()),
    ],
)
def test_every_way_to_write_a_group(text: str, group: tuple[int, ...]) -> None:
    assert first_group(text) == group


def spec(layers: int) -> DecoderSpec:
    return DecoderSpec(
        family="qwen2",
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=128,
        rope_theta=100.0,
        norm_eps=1e-6,
        qkv_bias=True,
        tie_embeddings=True,
    )


def gradient(model_spec: DecoderSpec, unrolled: bool):
    """Loss gradient of a decoder over its parameters; layer by layer in Python if unrolled."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(model_spec, rngs=nnx.Rngs(0))))

    def loss(params, tokens):
        model = nnx.merge(graph, params)
        positions = token_positions(tokens >= 0)
        mask = attention_mask(positions, positions, tokens >= 0)
        if not unrolled:
            hidden, cache = model(tokens, positions, mask)
            return (model.logits(hidden) ** 2).sum() + (cache.k**2).sum() + (cache.v**2).sum()
        x, total = model.embed.embedding[...][tokens], jnp.zeros(())
        assert model.blocks is not None
        block, stacked = nnx.split(model.blocks)
        rotation = jax.tree.map(lambda part: part[0], model.rotation(positions))
        for layer in range(model_spec.num_layers):
            own = jax.tree.map(lambda stack, layer=layer: stack[layer], stacked)
            x, new = nnx.merge(block, own)(x, rotation, mask, None, attend)
            total += (new.pre_rope**2).sum() + (new.v**2).sum()
        assert model.final_norm is not None
        return (model.logits(model.final_norm(x)) ** 2).sum() + total

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("layers", [2, 8, 48])
def test_a_scanned_model_counts_as_the_unrolled_one(layers: int) -> None:
    params = nnx.to_pure_dict(
        nnx.split(nnx.eval_shape(lambda: Decoder(spec(layers), rngs=nnx.Rngs(0))))[1]
    )
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    scanned, unrolled = (
        work_of(gradient(spec(layers), unroll).lower(params, tokens).as_text("hlo")).flops
        for unroll in (False, True)
    )
    assert scanned == unrolled > 0


def test_messages_of_a_sharded_product() -> None:
    """Rows and weights split over the same axis: the weights are gathered, once."""
    mesh = make_mesh(1, 8, 1)
    rows = NamedSharding(mesh, PartitionSpec("fsdp", None))

    def multiply(x, w):
        return jax.lax.with_sharding_constraint(x @ w, rows)

    shapes = (
        jax.ShapeDtypeStruct((64, 32), jnp.float32),
        jax.ShapeDtypeStruct((32, 48), jnp.float32),
    )
    jitted = jax.jit(multiply, in_shardings=(rows, rows), out_shardings=rows)
    text, _ = partitioned(jitted.lower(*shapes))
    work = work_of(text)
    assert work.flops == 2 * 64 / 8 * 32 * 48
    assert work.bytes_by_kind() == {"all-gather": 32 * 48 * 4 * 7 / 8}
