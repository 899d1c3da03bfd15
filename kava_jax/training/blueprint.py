"""Everything about a run that can be known without loading a weight.

A blueprint holds graphs, abstract parameters, shardings, objective and optimizer. Export and
evaluation need it as much as training does; teachers are loaded, and a state made, from it.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from kava_jax.alignment.layer_map import make_layer_map
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.config import Config, OptimizerConfig, Ramp, TeacherConfig
from kava_jax.errors import KavaError
from kava_jax.hf.geometry import spec_from_config
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.hf.locate import resolve_model
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.mesh import batch_shards
from kava_jax.parallel.sharding import matching_shardings, param_shardings
from kava_jax.training.objective import Objective, TeacherLink, kv_loss
from kava_jax.training.optimizer import Rate, make_optimizer
from kava_jax.training.step import TrainState, initial_state


@dataclass(frozen=True)
class Part:
    """One module: how to build it, and where its parameters lie."""

    graph: nnx.GraphDef[Any]
    build: Any
    shardings: Params

    @classmethod
    def of(cls, build: Any, mesh: Mesh) -> "Part":
        """Trace ``build(rngs)`` without allocating anything."""
        graph, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        return cls(graph, build, param_shardings(abstract, mesh))

    def fresh(self, seed: int) -> Params:
        """Random parameters, created where they lie: no device ever holds the whole."""

        def init() -> Params:
            return nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(seed)))[1])

        return jax.jit(init, out_shardings=self.shardings)()


@dataclass(frozen=True)
class TeacherPart:
    """A teacher's module, cut after its last mapped layer, and where its weights are."""

    part: Part
    spec: DecoderSpec
    directory: Path
    link: TeacherLink
    blocks: int
    headless: bool
    dtype: Any

    def load(self) -> Params:
        """Read the weights that are needed, each straight to its place on the mesh."""
        return load_decoder_params(
            self.directory,
            self.spec,
            layers=self.blocks,
            tail=self.headless,
            head=not self.headless,
            param_dtype=self.dtype,
            put=partial(_put, self.part.shardings),
        )


@dataclass(frozen=True)
class Blueprint:
    """A run before its weights; made by :func:`make_blueprint`."""

    config: Config
    mesh: Mesh
    student: Part
    student_spec: DecoderSpec
    student_dir: Path | None
    teachers: dict[str, TeacherPart]
    projector: Part | None
    objective: Objective
    rates: dict[str, optax.Schedule]
    optimizer: optax.GradientTransformation

    def load_teachers(self) -> dict[str, Params]:
        """All teachers' weights."""
        return {name: teacher.load() for name, teacher in self.teachers.items()}

    def fresh_state(self) -> TrainState:
        """Step 0: the student as it came (or random), a random projector, empty moments."""
        seed = self.config.run.seed
        student = self.load_student() if self.student_dir else self.student.fresh(seed)
        projector = self.projector.fresh(seed + 1) if self.projector else {}
        params = {"student": student, "projector": projector}
        shardings = self.state_shardings()
        return jax.jit(
            lambda params: initial_state(params, self.optimizer), out_shardings=shardings
        )(params)

    def load_student(self) -> Params:
        """The student's starting weights, in float32."""
        assert self.student_dir is not None
        put = partial(_put, self.student.shardings)
        return load_decoder_params(self.student_dir, self.student_spec, put=put)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state."""

        def build() -> TrainState:
            params = {"student": _initial(self.student), "projector": _initial(self.projector)}
            return initial_state(params, self.optimizer)

        return jax.eval_shape(build)

    def state_shardings(self) -> Any:
        """Where every leaf of the state lies."""
        projector = self.projector.shardings if self.projector else {}
        params = {"student": self.student.shardings, "projector": projector}
        return matching_shardings(self.abstract_state(), params, self.mesh)


def make_blueprint(config: Config, mesh: Mesh, vocabulary: int) -> Blueprint:
    """Resolve models, geometry and layer maps; ``vocabulary`` is the tokenizer's number of ids.

    Raises KavaError for whatever does not fit together.
    """
    shards = batch_shards(mesh) * config.train.grad_accumulation
    if config.data.batch_size % shards:
        raise KavaError(
            f"data.batch_size={config.data.batch_size} is not divisible by {batch_shards(mesh)} "
            f"data-parallel devices times train.grad_accumulation={config.train.grad_accumulation};"
            f" use a multiple of {shards} or lower mesh.data"
        )
    student_dir, student_spec = _student(config, vocabulary)
    dtype = _dtype(config.student.dtype)
    build = partial(_build_decoder, student_spec, dtype=dtype, remat=config.student.remat)
    student = Part.of(build, mesh)
    teachers = {
        teacher.name: _teacher(index, teacher, student_spec, config, mesh, vocabulary)
        for index, teacher in enumerate(config.teachers)
    }
    projector = _projector(config, student_spec, teachers, mesh) if teachers else None
    rates = _rates(config.optimizer, config.train.steps)
    return Blueprint(
        config=config,
        mesh=mesh,
        student=student,
        student_spec=student_spec,
        student_dir=student_dir,
        teachers=teachers,
        projector=projector,
        objective=_objective(config, student, teachers, projector, mesh),
        rates=rates,
        optimizer=make_optimizer(
            rates["student"],
            rates["projector"] if config.projector.trainable else None,
            weight_decay=config.optimizer.weight_decay,
            clip_norm=config.optimizer.clip_norm,
            b1=config.optimizer.b1,
            b2=config.optimizer.b2,
        ),
    )


def _student(config: Config, vocabulary: int) -> tuple[Path | None, DecoderSpec]:
    """Directory (None for a fresh student) and geometry."""
    if config.student.path is not None:
        directory = resolve_model(config.student.path, config.student.revision)
        spec = read_spec(directory)
    else:
        directory = None
        geometry = {"vocab_size": vocabulary} | (config.student.geometry or {})
        spec = spec_from_config(geometry, where="student.geometry")
    _check_vocabulary("student", spec, vocabulary)
    return directory, spec


def _check_vocabulary(who: str, spec: DecoderSpec, vocabulary: int) -> None:
    if vocabulary > spec.vocab_size:
        raise KavaError(
            f"{who} has vocab_size={spec.vocab_size} rows and the tokenizer {vocabulary} ids; use "
            f"the tokenizer that belongs to the model (student.tokenizer=...)"
        )


def _teacher(
    index: int,
    teacher: TeacherConfig,
    student: DecoderSpec,
    config: Config,
    mesh: Mesh,
    vocabulary: int,
) -> TeacherPart:
    field = f"teachers.{index}"
    directory = resolve_model(teacher.path, teacher.revision)
    spec = read_spec(directory)
    _check_vocabulary(field, spec, vocabulary)
    layer_map = make_layer_map(
        teacher.layer_map, spec.num_layers, student.num_layers, field=f"{field}.layer_map"
    )
    # Logits need every layer and the head; the caches alone only the layers up to the last mapped.
    headless = config.loss.kl_weight == 0
    blocks = layer_map.last_teacher_layer if headless else spec.num_layers
    dtype = _dtype(teacher.dtype)
    build = partial(
        _build_decoder,
        spec,
        blocks=blocks,
        tail=headless,
        head=not headless,
        param_dtype=dtype,
        dtype=dtype,
    )
    part = Part.of(build, mesh)
    link = TeacherLink(part.graph, layer_map, teacher.weight)
    return TeacherPart(part, spec, directory, link, blocks, headless, dtype)


def _projector(
    config: Config, student: DecoderSpec, teachers: dict[str, TeacherPart], mesh: Mesh
) -> Part:
    settings = config.projector
    shapes = {
        name: {
            "d_model": teacher.spec.kv_width,
            "num_heads": teacher.spec.num_kv_heads,
            "num_layers": len(teacher.link.layer_map.pairs),
        }
        for name, teacher in teachers.items()
    }

    def build(rngs: nnx.Rngs) -> KVDimensionProjector:
        return KVDimensionProjector(
            shapes,
            student.kv_width,
            settings.mlp_ratio,
            settings.dropout,
            settings.init,
            settings.trainable,
            kind=settings.kind,
            direction=settings.direction,
            student_heads=student.num_kv_heads,
            per_layer=settings.per_layer,
            per_head=settings.per_head,
            rngs=rngs,
        )

    return Part.of(build, mesh)


def _objective(
    config: Config,
    student: Part,
    teachers: dict[str, TeacherPart],
    projector: Part | None,
    mesh: Mesh,
) -> Objective:
    loss, steps = config.loss, config.train.steps
    return Objective(
        student=student.graph,
        projector=projector.graph if projector else None,
        teachers={name: teacher.link for name, teacher in teachers.items()},
        kv_loss=kv_loss(
            loss.kv,
            alpha=loss.alpha,
            beta=loss.beta,
            mercator_weight=_ramp(loss.mercator_weight, steps),
            mse_weight=_ramp(loss.mse_weight, steps),
        ),
        kv_weight=_ramp(loss.kv_weight, steps),
        ce_weight=loss.ce_weight,
        kl_weight=loss.kl_weight,
        kl_temperature=loss.kl_temperature,
        key_space=loss.key_space,
        batch_shards=batch_shards(mesh),
    )


def _rates(settings: OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    shape = (steps, settings.warmup_steps, settings.schedule, settings.final_lr_share)
    return {
        "student": Rate(settings.student_lr, *shape).build(),
        "projector": Rate(settings.projector_lr, *shape).build(),
    }


def _ramp(weight: float | Ramp, steps: int) -> optax.Schedule:
    if isinstance(weight, Ramp):
        return optax.linear_schedule(weight.start, weight.end, max(1, steps - 1))
    return optax.constant_schedule(weight)


def _dtype(name: str) -> Any:
    """``auto`` is float32 on CPU and bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _build_decoder(spec: DecoderSpec, rngs: nnx.Rngs, **options: Any) -> Decoder:
    return Decoder(spec, rngs=rngs, **options)


def _initial(part: Part | None) -> Params:
    return {} if part is None else nnx.to_pure_dict(nnx.split(part.build(nnx.Rngs(0)))[1])


def _put(shardings: Params, path: str, shape: tuple[int, ...], dtype: np.dtype, read: Any) -> Any:
    """Place one parameter: every device's slice is read from disk by itself."""
    sharding: Any = shardings
    for name in path.split("/"):
        sharding = sharding[name]
    return jax.make_array_from_callback(shape, sharding, read, dtype=dtype)
