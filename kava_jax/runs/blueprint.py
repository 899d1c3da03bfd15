"""Everything about a run that can be known without loading a weight.

A blueprint holds graphs, abstract parameters, shardings, objective and optimizer. Export,
evaluation and planning need it as much as training does; teachers are loaded, and a state made,
from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from kava_jax.alignment.layer_map import CALIBRATED_MAPS, LayerMap
from kava_jax.config.pair import TeacherConfig
from kava_jax.config.run import Config
from kava_jax.config.weights import is_zero
from kava_jax.errors import KavaError
from kava_jax.hf.cut import load_cut_params, merging_maps
from kava_jax.hf.cut_record import CutRecord
from kava_jax.hf.load import load_decoder_params, read_spec
from kava_jax.models.attend import Choice, choose, in_words
from kava_jax.models.decoder import Decoder, Params
from kava_jax.models.spec import DecoderSpec
from kava_jax.parallel.mesh import batch_shards
from kava_jax.parallel.sharding import batch_sharding, layouts, matching_shardings, replicated
from kava_jax.runs.assembly import (
    empty_statistics,
    handoff_of,
    kv_weight,
    learning_rates,
    make_objective,
    optimizer_of,
    projector_of,
)
from kava_jax.runs.find_models import Models
from kava_jax.runs.layer_maps import handoff_map, layer_map_of
from kava_jax.runs.parts import Part, TeacherPart, place_slices
from kava_jax.training.comparison import CacheComparison, OutputComparison
from kava_jax.training.objective import Objective, Statistics, TeacherLink
from kava_jax.training.probe import make_probe
from kava_jax.training.step import (
    TrainState,
    compiler_options,
    initial_state,
    make_train_step,
)

# Seeds of random teachers lie far from those of student and projector.
RANDOM_TEACHER = 1000


@dataclass(frozen=True)
class Blueprint:
    """A run before its weights; made by :func:`make_blueprint`."""

    config: Config
    mesh: Mesh
    student: Part
    student_spec: DecoderSpec
    student_dir: Path | None
    student_cut: CutRecord | None
    """What the run keeps of the model in ``student_dir``; None where it keeps all."""
    teachers: dict[str, TeacherPart]
    projector: Part | None
    handoff: Part | None
    """The projector of prompt caches that are handed over."""
    objective: Objective
    kv_weight: optax.Schedule
    rates: dict[str, optax.Schedule]
    optimizer: optax.GradientTransformation

    @property
    def parts(self) -> dict[str, Part | None]:
        """What the state holds parameters of, by their group."""
        parts = {"student": self.student, "projector": self.projector}
        return parts | ({"handoff": self.handoff} if self.handoff else {})

    @property
    def repeated(self) -> str | None:
        """What the mesh does not divide and every device holds whole, in one line."""
        parts = self.parts | {name: teacher.part for name, teacher in self.teachers.items()}
        found = [
            f"{name}/{misfit}"
            for name, part in parts.items()
            for misfit in (part.misfits if part else ())
        ]
        return f"repeated on every device: {', '.join(found)}" if found else None

    @property
    def attending(self) -> str:
        """What the models attend with, and why, in one line."""
        student = ("student", self.student_spec, _dtype(self.config.train.dtype))
        models = [student, *((name, t.spec, t.dtype) for name, t in self.teachers.items())]
        return in_words([(m[0], _attention(self.config, self.mesh, *m)) for m in models])

    def load_teachers(self) -> dict[str, Params]:
        """All teachers' weights."""
        return {name: teacher.load() for name, teacher in self.teachers.items()}

    def fresh_state(
        self, projector: Params | None = None, handoff: Params | None = None
    ) -> TrainState:
        """Step 0: the student as it came (or random), empty means, and the projectors.

        A projector is random unless it is given, that of the comparison as a calibration found it,
        that of the handoff as it was fitted, or follows from the cut.
        """
        seed, student = self.config.run.seed, self.student_start()
        if projector is None:
            projector = self._projector_start(self.projector) if self.projector else {}
        params = {"student": student, "projector": projector}
        if self.handoff:
            params["handoff"] = self.handoff.fresh(seed + 2) if handoff is None else handoff
        # The moments are made where they will lie: whole, they may not fit on one device. The seed
        # is an argument, so that runs with other seeds share the program.
        start = jax.jit(self._state_of, out_shardings=self.state_shardings())
        return start(params, jnp.uint32(seed))

    def _projector_start(self, part: Part) -> Params:
        """That of the comparison: random, or what the cut merged the heads by."""
        if self.config.projector.init != "merged":
            return part.fresh(self.config.run.seed + 1)
        assert self.student_dir is not None
        assert self.student_cut is not None
        maps = merging_maps(self.student_dir, read_spec(self.student_dir), self.student_cut)
        return jax.device_put({"pairs": dict.fromkeys(self.teachers, maps)}, part.shardings)

    def student_start(self) -> Params:
        """The student before its first step."""
        return self.load_student() if self.student_dir else self.student.fresh(self.config.run.seed)

    def load_student(self) -> Params:
        """The student's starting weights, in float32."""
        assert self.student_dir is not None
        put = partial(place_slices, self.student.shardings)
        if self.student_cut is None:
            return load_decoder_params(self.student_dir, self.student_spec, put=put)
        whole = read_spec(self.student_dir)
        return load_cut_params(self.student_dir, whole, self.student_cut, put=put)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state."""

        params = {
            name: nnx.to_pure_dict(part.abstract) if part else {}
            for name, part in self.parts.items()
        }
        return jax.eval_shape(self._state_of, params, jax.ShapeDtypeStruct((), jnp.uint32))

    def abstract_teachers(self) -> dict[str, Params]:
        """Shapes and dtypes of the teachers' weights."""
        return {
            name: nnx.to_pure_dict(teacher.part.abstract) for name, teacher in self.teachers.items()
        }

    def _state_of(self, params: dict[str, Params], seed: Array) -> TrainState:
        return initial_state(
            params, self.optimizer, self.empty_statistics(), seed, taught=bool(self.teachers)
        )

    def jitted_step(self, share: float | None = None) -> Any:
        """The train step with its shardings; the old state's memory is reused for the new one.

        With ``share``, the step that measures its KV weight.
        """
        step = make_train_step(
            self.objective,
            self.optimizer,
            kv_weight=self.kv_weight,
            microbatches=self.config.train.grad_accumulation,
            share=share,
        )
        places = self._step_shardings()
        return jax.jit(
            step,
            in_shardings=places,
            out_shardings=(places[0], replicated(self.mesh)),
            donate_argnums=0,
            compiler_options=compiler_options(self.mesh.devices.flat[0].platform),
        )

    def jitted_probe(self) -> Any:
        """The probe with its shardings; it reads the state and leaves it alone."""
        probe = make_probe(
            self.objective,
            kv_weight=self.kv_weight,
            microbatches=self.config.train.grad_accumulation,
        )
        return jax.jit(
            probe, in_shardings=self._step_shardings(), out_shardings=replicated(self.mesh)
        )

    def _step_shardings(self) -> tuple[Any, dict[str, Params], NamedSharding]:
        """Where the state, the teachers and the batch of a step lie."""
        return self.state_shardings(), self.teacher_shardings(), batch_sharding(self.mesh)

    def teacher_shardings(self) -> dict[str, Params]:
        """Where every parameter of every teacher lies."""
        return {name: teacher.part.shardings for name, teacher in self.teachers.items()}

    def empty_statistics(self) -> Statistics:
        """Those of a run that has not taken a step."""
        return empty_statistics(self.objective, self.student_spec)

    def state_shardings(self) -> Any:
        """Where every leaf of the state lies."""
        params = {name: part.shardings if part else {} for name, part in self.parts.items()}
        return matching_shardings(self.abstract_state(), params, self.mesh)


def make_blueprint(
    config: Config, mesh: Mesh, models: Models, measured_maps: Mapping[str, LayerMap]
) -> Blueprint:
    """Resolve geometry and layer maps.

    Args:
        config: the run.
        mesh: its devices.
        models: what :func:`find_models` found.
        measured_maps: by teacher, the layer maps that a calibration found.

    Raises KavaError for whatever does not fit together.
    """
    shards = batch_shards(mesh) * config.train.grad_accumulation
    if config.data.batch_size % shards:
        raise KavaError(
            f"data.batch_size={config.data.batch_size} is not divisible by {batch_shards(mesh)} "
            f"data-parallel devices times train.grad_accumulation={config.train.grad_accumulation};"
            f" use a multiple of {shards} or lower mesh.data"
        )
    student_dir, student_spec, _ = models.student
    if student_spec.num_experts:
        raise KavaError(
            f"student: a mixture of experts ({student_spec.family}) can teach, and is not trained "
            "here; give a dense student"
        )
    dtype = _dtype(config.train.dtype)
    remat, layout = config.student.remat, layouts(mesh)
    build = partial(Decoder, student_spec, dtype=dtype, remat=remat, layouts=layout)
    student = Part.of(build, mesh, config.mesh.indivisible)
    # Kernels want padding on the right, as batches have it; prompts to be continued, which
    # ``student`` reads, have it on the left.
    attention = _attention(config, mesh, "student", student_spec, dtype).implementation
    of_batches = Part.of(partial(build, attention=attention), mesh, config.mesh.indivisible)
    asked = config.loss.handoff
    handed = {name: handoff_map(asked, name, models) for name in models.teachers} if asked else {}
    teachers = {
        teacher.name: _teacher(index, teacher, models, config, mesh, measured_maps, handed)
        for index, teacher in enumerate(config.teachers)
    }
    _check_frame(config, student_spec, teachers)
    _check_merged(config, models, teachers)
    projector = projector_of(config, student_spec, teachers, mesh) if teachers else None
    handoff, term = handoff_of(config, models, handed, mesh) if asked else (None, None)
    rates = learning_rates(config)
    return Blueprint(
        config=config,
        mesh=mesh,
        student=student,
        student_spec=student_spec,
        student_dir=student_dir,
        student_cut=models.student.cut if config.student.cut else None,
        teachers=teachers,
        projector=projector,
        handoff=handoff,
        objective=make_objective(
            config,
            of_batches.graph,
            {name: teacher.link for name, teacher in teachers.items()},
            projector.graph if projector else None,
            term,
            batch_shards(mesh),
        ),
        kv_weight=kv_weight(config),
        rates=rates,
        optimizer=optimizer_of(config, rates),
    )


def _teacher(
    index: int,
    teacher: TeacherConfig,
    models: Models,
    config: Config,
    mesh: Mesh,
    measured_maps: Mapping[str, LayerMap],
    handed: Mapping[str, LayerMap],
) -> TeacherPart:
    """``handed`` are the layer maps of the run's handoff, by teacher."""
    directory, spec, _ = models.teachers[teacher.name]
    assert directory is not None  # a teacher is never fresh
    layer_map, map_note = measured_maps.get(teacher.name), None
    if layer_map is None or teacher.layer_map not in CALIBRATED_MAPS:
        layer_map, _, map_note = layer_map_of(index, teacher, models)
    loss = config.loss
    comparison = (
        CacheComparison(teacher.name, layer_map, loss.key_space, loss.remove_key_bias)
        if loss.output is None
        else OutputComparison(teacher.name, layer_map)
    )
    # Logits need every layer and the head; what is read only the layers up to the last mapped.
    reads = [comparison.cut()]
    headless, handoff = is_zero(loss.kl_weight), loss.handoff
    if handoff is not None:
        headless = headless and handoff.reader == "teacher"
        reads.append(CacheComparison(teacher.name, handed[teacher.name]).cut())
    blocks, tail = max(reads) if headless else (spec.num_layers, False)
    dtype = _dtype(config.train.dtype)
    build = partial(
        Decoder,
        spec,
        blocks=blocks,
        tail=tail,
        head=not headless,
        # A teacher never learns, so it needs no float32 weights to add small steps to.
        param_dtype=dtype,
        dtype=dtype,
        layouts=layouts(mesh),
        attention=_attention(config, mesh, f"teachers.{index}", spec, dtype).implementation,
    )
    part = Part.of(build, mesh, config.mesh.indivisible)
    link = TeacherLink(part.graph, comparison, spec, teacher.weight, teacher.control)
    seed = config.run.seed + RANDOM_TEACHER + index
    return TeacherPart(part, spec, directory, link, blocks, tail, headless, dtype, seed, map_note)


def _check_frame(config: Config, student: DecoderSpec, teachers: Mapping[str, TeacherPart]) -> None:
    """What ``remove_key_bias`` and the attention terms cannot do with these models and maps."""
    specs = {"student": student, **{name: part.spec for name, part in teachers.items()}}
    if config.loss.remove_key_bias and teachers:
        normed = [name for name, spec in specs.items() if spec.qk_norm and spec.qkv_bias]
        if normed:
            raise KavaError(
                f"loss.remove_key_bias=true: the keys of {', '.join(normed)} are normalised after "
                f"the bias, so it cannot be taken out; set it to false and use loss.center"
            )
    if config.loss.match != "attention":
        return
    direction = config.projector.direction
    for name, part in teachers.items():
        comparison = part.link.comparison
        if isinstance(comparison, CacheComparison) and not comparison.can_attend(direction):
            raise KavaError(
                f"loss.match=attention: the target of teacher {name} joins or mixes several "
                f"layers, so it has no queries of its own; give one teacher layer per student "
                f"layer, or set projector.direction=teacher_to_student"
            )


def _check_merged(config: Config, models: Models, teachers: Mapping[str, TeacherPart]) -> None:
    """Heads are merged in the very layers that the student's came from, or in no basis of its."""
    cut, width = models.student.cut, models.student.spec.head_dim
    if config.projector.init != "merged" or cut is None:
        return
    origins = tuple((layer,) for layer in cut.layers)
    for index, part in enumerate(teachers.values()):
        heads = sum(map(len, cut.kv_heads))
        if (part.spec.num_kv_heads, part.spec.head_dim) != (heads, width):
            raise KavaError(
                f"projector.init=merged: teachers.{index} has {part.spec.num_kv_heads} KV heads of "
                f"{part.spec.head_dim}, and the cut merges {heads} of {width}; set init=calibrated"
            )
        if part.layer_map.teacher_layers != origins:
            raise KavaError(
                f"projector.init=merged: teachers.{index}.layer_map pairs layers with others than "
                f"they came from, whose heads have other bases; set it to origin"
            )


def _attention(config: Config, mesh: Mesh, who: str, spec: DecoderSpec, dtype: Any) -> Choice:
    """What one model attends with when it reads a batch."""
    return choose(config.train.attention, mesh.devices.flat[0], who, dtype, spec)


def _dtype(name: str) -> Any:
    """``auto`` is float32 on CPU and bfloat16 on accelerators."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
