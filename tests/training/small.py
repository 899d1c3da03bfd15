"""A small teacher, student and projector, one uneven batch, and the training between them."""

from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.data.batches import Batch, collate
from kava_jax.data.text import Encoded
from kava_jax.models.decoder import Decoder
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.mesh import AXES, batch_shards
from kava_jax.training.blueprint import Part
from kava_jax.training.objective import Objective, TeacherLink, kv_loss

SINKS = 2
PAIRS = ((1, 0), (2, 2))
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


class Setting(NamedTuple):
    """An objective, the parameters it is evaluated at, and where they lie."""

    objective: Objective
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
    direction: str = "student_to_teacher",
    dropout: float = 0.0,
    kl_weight: float = 0.0,
    kv_weight: float = 0.7,
    ce_weight: float = 1.0,
    beta: float = 0.01,
    trainable: bool = True,
) -> Setting:
    """The two models joined by layers 1 -> 0 and 2 -> 2, the teacher cut unless KL needs it all."""
    mesh = one_device() if mesh is None else mesh
    headless = kl_weight == 0

    def student(rngs: nnx.Rngs) -> Decoder:
        return Decoder(STUDENT, rngs=rngs)

    def teacher(rngs: nnx.Rngs) -> Decoder:
        blocks = 2 if headless else None
        return Decoder(TEACHER, rngs=rngs, blocks=blocks, tail=headless, head=not headless)

    def projector(rngs: nnx.Rngs) -> KVDimensionProjector:
        sides = {name: {"d_model": TEACHER.kv_width, "num_heads": 4} for name in names}
        return KVDimensionProjector(
            sides,
            STUDENT.kv_width,
            dropout=dropout,
            trainable=trainable,
            direction=direction,
            student_heads=2,
            rngs=rngs,
        )

    parts = {"student": Part.of(student, mesh), "projector": Part.of(projector, mesh)}
    teacher_part = Part.of(teacher, mesh)
    shardings = {name: part.shardings for name, part in parts.items()}
    teacher_shardings = dict.fromkeys(names, teacher_part.shardings)
    values = {"student": _values(student, 1), "projector": _values(projector, 2)}
    teachers = {name: _values(teacher, 3 + i) for i, name in enumerate(names)}
    objective = Objective(
        student=parts["student"].graph,
        projector=parts["projector"].graph,
        teachers={
            name: TeacherLink(teacher_part.graph, LayerMap(PAIRS), 1.0 + i)
            for i, name in enumerate(names)
        },
        kv_loss=kv_loss("mercator", beta=beta),
        kv_weight=optax.constant_schedule(kv_weight),
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        kl_temperature=2.0,
        batch_shards=batch_shards(mesh),
    )
    return Setting(
        objective,
        jax.device_put(values, shardings),
        jax.device_put(teachers, teacher_shardings),
        shardings,
        teacher_shardings,
    )


def _values(build: Any, seed: int) -> Any:
    """Random parameters, norms near 1; nothing is built, so nothing is compiled."""
    abstract = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[1])
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        mean = float(path[-1].key == "scale")
        return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

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
        jax.numpy.asarray, collate(rows(16)[first:last], length, pad_id=0, sink_tokens=SINKS)
    )
