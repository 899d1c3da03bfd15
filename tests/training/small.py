"""A small teacher, student and projector, one uneven batch, and the training between them."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh

from kava_jax.alignment.kv_losses import AnyKVLoss
from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.data.batches import Batch, collate
from kava_jax.data.text import Encoded
from kava_jax.models.decoder import Decoder
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.mesh import AXES, batch_shards
from kava_jax.parallel.sharding import replicated
from kava_jax.runs.assembly import empty_statistics
from kava_jax.runs.parts import Part
from kava_jax.training.comparison import CacheComparison, OutputComparison
from kava_jax.training.objective import PART_WEIGHTS, Objective, Statistics, TeacherLink
from kava_jax.training.step import TrainState, initial_state

SINKS = 2
PAIRS = ((1, 0), (2, 2))
MAP = LayerMap((0, 2), ((1,), (2,)))
STUDENT = DecoderSpec(
    family="qwen2",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=100.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=True,
    initializer_range=0.2,
)
TEACHER = DecoderSpec(
    family="qwen3",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=48,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    rope_theta=1000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
    qk_norm=True,
    initializer_range=0.2,
)

KV_LOSSES = {loss.model_fields["kind"].default: loss for loss in get_args(AnyKVLoss)}


class Setting(NamedTuple):
    """An objective, the parameters it is evaluated at, and where they lie."""

    objective: Objective
    kv_weight: optax.Schedule
    statistics: Statistics
    params: dict[str, Any]
    teachers: dict[str, Any]
    shardings: dict[str, Any]
    teacher_shardings: dict[str, Any]


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def setting(
    mesh: Mesh | None = None,
    *,
    names: tuple[str, ...] = ("big",),
    layer_map: LayerMap = MAP,
    direction: str = "student_to_teacher",
    kind: str = "elastic",
    per_layer: bool = False,
    dropout: float = 0.0,
    trainable: bool = True,
    kv: str = "mercator",
    match: str = "cache",
    kv_weight: float = 0.7,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    beta: float = 0.01,
    center: str = "none",
    remove_key_bias: bool = False,
    key_space: str = "pre_rope",
    weights: tuple[float, ...] | None = None,
    control: str = "none",
    parts: str = "both",
) -> Setting:
    """The two models joined by layers 1 -> 0 and 2 -> 2, the teacher cut unless KL needs it all."""
    mesh = one_device() if mesh is None else mesh
    headless = kl_weight == 0
    output = None if match in ("cache", "attention") else match
    weights = weights or tuple(1.0 + i for i in range(len(names)))

    def comparison(name: str) -> CacheComparison | OutputComparison:
        if output is not None:
            return OutputComparison(name, layer_map)
        return CacheComparison(name, layer_map, key_space, remove_key_bias)

    def heads(spec: DecoderSpec) -> tuple[int, int]:
        return (1, spec.hidden_size) if output else (spec.num_kv_heads, spec.head_dim)

    def student(rngs: nnx.Rngs) -> Decoder:
        return Decoder(STUDENT, rngs=rngs)

    def teacher(rngs: nnx.Rngs) -> Decoder:
        # An output needs the whole of the last mapped layer, keys and values a KV-only tail.
        blocks = layer_map.last_teacher_layer + bool(output) if headless else None
        tail = headless and not output
        return Decoder(TEACHER, rngs=rngs, blocks=blocks, tail=tail, head=not headless)

    def projector(rngs: nnx.Rngs) -> KVDimensionProjector:
        side = {
            "d_model": math.prod(heads(TEACHER)) * layer_map.sources,
            "num_heads": heads(TEACHER)[0] * layer_map.sources,
            "num_layers": len(layer_map),
        }
        return KVDimensionProjector(
            dict.fromkeys(names, side),
            math.prod(heads(STUDENT)),
            dropout=dropout,
            trainable=trainable,
            kind=kind,
            per_layer=per_layer,
            direction=direction,
            student_heads=heads(STUDENT)[0],
            parts="o" if output else "kv",
            rngs=rngs,
        )

    builds = {"student": student, "projector": projector}
    modules = {name: Part.of(build, mesh) for name, build in builds.items()}
    teacher_part = Part.of(teacher, mesh)
    shardings = {name: module.shardings for name, module in modules.items()}
    teacher_shardings = dict.fromkeys(names, teacher_part.shardings)
    values = {name: random_values(build, 1 + i) for i, (name, build) in enumerate(builds.items())}
    teachers = {name: random_values(teacher, 3 + i) for i, name in enumerate(names)}
    objective = Objective(
        student=modules["student"].graph,
        projector=modules["projector"].graph,
        teachers={
            name: TeacherLink(
                teacher_part.graph,
                comparison(name),
                TEACHER,
                weight,
                control,
            )
            for name, weight in zip(names, weights, strict=True)
        },
        kv_loss=KV_LOSSES[kv](**({"beta": beta} if "beta" in KV_LOSSES[kv].model_fields else {})),
        center=center,
        parts={"o": 1.0} if output else PART_WEIGHTS[parts],
        output=output,
        direction=direction,
        match_attention=match == "attention",
        ce_weight=optax.constant_schedule(ce_weight),
        kl_weight=optax.constant_schedule(kl_weight) if kl_weight else None,
        kl_temperature=2.0,
        batch_shards=batch_shards(mesh),
    )
    return Setting(
        objective,
        optax.constant_schedule(kv_weight),
        empty_statistics(objective, STUDENT),
        jax.device_put(values, shardings),
        jax.device_put(teachers, teacher_shardings),
        shardings,
        teacher_shardings,
    )


def jitted(program: Callable) -> Callable:
    """``jit`` on one device with results where ``start`` puts its state.

    Left to itself, JAX compiles a step again for its own result, and for a state that was read
    from a file: the same device, written down in another way.
    """
    return jax.jit(program, out_shardings=replicated(one_device()))


def start(made: Setting, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0, placed for ``jitted``."""
    taught = bool(made.teachers)
    state = initial_state(made.params, optimizer, made.statistics, taught=taught)
    return jax.device_put(state, replicated(one_device()))


def total_loss(made: Setting) -> Callable:
    """``(params, teachers, batch, step, share) -> (loss, metrics)``, KV weighted as it was set."""

    def loss(params, teachers, data, step, share):
        (language, kv), (metrics, _) = made.objective(
            params, teachers, data, step, share, made.statistics
        )
        return language + made.kv_weight(step) * kv, metrics

    return loss


def random_values(build: Any, seed: int) -> Any:
    """Random parameters, norms near 1; nothing is built, so nothing is compiled."""
    abstract = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))[1])
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        mean = float(path[-1].key == "scale")
        return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@cache
def rows(count: int = 8) -> tuple[Encoded, ...]:
    """Rows of very different lengths; ids below both vocabularies' sizes."""
    rng = np.random.default_rng(7)
    lengths = (12, 3, 7, 12, 2, 9, 5, 4)
    return tuple(
        Encoded(
            rng.integers(1, TEACHER.vocab_size, lengths[i % 8]).astype(np.int32),
            min(i % 4, lengths[i % 8] - 1),
            False,
        )
        for i in range(count)
    )


def batch(first: int = 0, last: int = 8, length: int = 12) -> Batch:
    return jax.tree.map(
        jax.numpy.asarray,
        collate(rows(max(16, last))[first:last], length, pad_id=0, sink_tokens=SINKS),
    )
