"""From a config to a run and back: train, reopen, evaluate, export.

This is where the rooms meet. Training is handed its evaluator here; the command line, the demo and
the experiments all start their runs through :func:`train`.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.config import FREE_FIELDS, Config
from kava_jax.config_file import dump_config, parse_config
from kava_jax.data.batches import eval_batches
from kava_jax.data.dataset import Dataset, bucket_of, loader, make_dataset, split_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import BUILTIN_TOKENIZER, check_same_ids, load_tokenizer, pad_id
from kava_jax.errors import KavaError
from kava_jax.evaluation.exact_match import ExactMatch, Generate, exact_match
from kava_jax.evaluation.heldout import held_out, make_measure
from kava_jax.hf.card import model_card
from kava_jax.hf.export import export_model
from kava_jax.hf.load import read_json
from kava_jax.hf.locate import model_fingerprint, resolve_model
from kava_jax.models.decoder import Params
from kava_jax.models.generate import generate
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import batch_sharding, put_batch, replicated
from kava_jax.training.blueprint import Blueprint, make_blueprint
from kava_jax.training.checkpoint import Checkpoints, abstract_state
from kava_jax.training.loop import Cadence, projector_path, run_steps
from kava_jax.training.manifest import (
    Fingerprints,
    Hardware,
    check_manifest,
    read_config,
    read_manifest,
    write_config,
    write_manifest,
)
from kava_jax.training.monitor import Monitor
from kava_jax.training.step import TrainState, make_train_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Run:
    """Everything of a run but its weights."""

    config: Config
    mesh: Mesh
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_source: str
    encoder: Encoder
    dataset: Dataset
    blueprint: Blueprint

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.config.run.directory


@dataclass(frozen=True)
class Trained:
    """What is left when a run has ended."""

    run: Run
    state: TrainState
    teachers: Mapping[str, Params]
    evaluation: dict[str, float]


def prepare(config: Config) -> Run:
    """Mesh, tokenizer, data and geometry. Loads no weights and writes nothing.

    Raises KavaError for whatever does not fit together.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tokenizer, source = _tokenizer(config)
    blueprint = make_blueprint(config, mesh, len(tokenizer))
    for name, teacher in blueprint.teachers.items():
        check_same_ids(tokenizer, teacher.directory, name)
    data = config.data
    encoder = Encoder(
        tokenizer, format=data.format, template=data.template, max_length=data.max_length
    )
    load = loader(
        subset=data.subset,
        revision=data.revision,
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
        messages_field=data.messages_field,
        separator=data.separator,
        seed=config.run.seed,
    )
    training, held = split_examples(
        load,
        path=data.path,
        split=data.split,
        rows=data.rows,
        eval_path=data.eval_path,
        eval_split=data.eval_split,
        eval_rows=data.eval_rows,
    )
    dataset = make_dataset(
        training,
        held,
        encoder,
        batch_size=data.batch_size,
        seed=config.run.seed,
        pad_id=pad_id(tokenizer),
        sink_tokens=config.loss.sink_tokens,
    )
    return Run(config, mesh, tokenizer, source, encoder, dataset, blueprint)


def train(config: Config, command: Sequence[str]) -> Trained:
    """Run, or continue, the training that ``config`` describes.

    Everything that can be wrong with the input is found before anything is written.
    """
    run = prepare(config)
    plain, fingerprints = dump_config(config), _fingerprints(run)
    check_manifest(run.directory, config=plain, fingerprints=fingerprints, free=FREE_FIELDS)
    teachers = run.blueprint.load_teachers()
    start = run.blueprint.fresh_state()
    write = jax.process_index() == 0
    if write:
        write_config(run.directory, plain)
        write_manifest(
            run.directory,
            command=command,
            config=plain,
            fingerprints=fingerprints,
            hardware=Hardware(
                jax.process_count(), jax.device_count(), jax.devices()[0].device_kind
            ),
        )
    with Checkpoints(run.directory, config.train.keep_checkpoints) as checkpoints:
        resumed = checkpoints.steps()
        if resumed:
            start = checkpoints.restore(resumed[-1], _restore_target(run))
        with Monitor(
            run.directory,
            total_steps=config.train.steps,
            start_step=int(start.step),
            write=write,
        ) as monitor:
            for note in run.dataset.notes:
                monitor.note(note)
            if resumed:
                monitor.note(f"continuing from the checkpoint at step {resumed[-1]}")
            state, evaluation = run_steps(
                start,
                step=_jitted_step(run),
                teachers=teachers,
                stream=run.dataset.stream,
                evaluate=_evaluator(run, teachers),
                checkpoints=checkpoints,
                monitor=monitor,
                mesh=run.mesh,
                rates=run.blueprint.rates,
                cadence=Cadence(
                    config.train.steps,
                    config.train.log_every,
                    config.train.eval_every,
                    config.train.checkpoint_every,
                ),
            )
    if run.blueprint.projector and write:
        _save_projector(run, state)
    return Trained(run, state, teachers, evaluation)


def reopen(run_dir: Path) -> Run:
    """A run directory that ``train`` made, prepared again from its own resolved config."""
    config = parse_config(read_config(run_dir) | {})
    located = config.run.model_copy(update={"dir": str(run_dir)})
    return prepare(config.model_copy(update={"run": located}))


def restore(run: Run, checkpoint: str = "last") -> TrainState:
    """The state at ``last``, ``best`` or a step number."""
    with Checkpoints(run.directory, run.config.train.keep_checkpoints) as checkpoints:
        return checkpoints.restore(checkpoints.choose(checkpoint), _restore_target(run))


def evaluate(
    run: Run, state: TrainState, teachers: Mapping[str, Params], *, answers: bool
) -> dict[str, float]:
    """Held-out loss, alignment with the teachers given, and (``answers``) exact match."""
    measure = make_measure(run.blueprint.objective)
    values = held_out(measure, state.params, teachers, _held_out_batches(run))
    if answers and _has_answers(run):
        values |= score(answer_questions(run, run.blueprint.student.graph, state.params["student"]))
    return values


def answer_questions(run: Run, graph: nnx.GraphDef[Any], params: Params) -> ExactMatch:
    """Greedy answers of any model with the run's tokenizer to the run's held-out questions."""
    settings = run.config.eval
    return exact_match(
        make_generate(graph, params, run.tokenizer, settings.max_new_tokens),
        run.encoder,
        run.dataset.held_out_examples,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )


def score(answers: ExactMatch) -> dict[str, float]:
    """The figures of an exact-match evaluation by the names that ``metrics.jsonl`` uses."""
    return {
        "exact_match_strict": answers.strict,
        "exact_match_flexible": answers.flexible,
        "exact_match_stderr": answers.strict_error,
        "exact_match_rows": answers.rows,
    }


def make_generate(
    graph: nnx.GraphDef[Any],
    params: Params,
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
) -> Generate:
    """Greedy continuation of left-padded prompts; ends at the tokenizer's eos or ``eos_ids``."""
    ends = tuple(sorted({int(tokenizer.eos_token_id), *eos_ids}))  # pyright: ignore[reportArgumentType]  (Encoder demands an eos)

    def continued(prompt_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
        new_BM = generate(
            graph,
            params,
            prompt_BT,
            valid_BT,
            max_new_tokens=max_new_tokens,
            eos_ids=ends,
            pad_id=pad_id(tokenizer),
        )
        return np.asarray(new_BM)

    return continued


def export(run: Run, state: TrainState, out: Path, dtype: DtypeName = "auto") -> None:
    """The student as a Hugging Face directory. ``auto`` is the dtype it came in, or float32."""
    source = run.blueprint.student_dir
    tokenizer = Path(run.tokenizer_source)
    export_model(
        out,
        state.params["student"],
        run.blueprint.student_spec,
        dtype=_export_dtype(source) if dtype == "auto" else dtype,
        tokenizer=tokenizer if tokenizer.is_dir() else run.tokenizer,
        source_dir=source,
        card=_card(run, int(state.step)),
    )


def _tokenizer(config: Config) -> tuple["PreTrainedTokenizerBase", str]:
    """The run's tokenizer and where it came from: named, the student's, or the first teacher's."""
    student = config.student
    if student.tokenizer is not None:
        source, revision = student.tokenizer, None
    elif student.path is not None:
        source, revision = student.path, student.revision
    elif config.teachers:
        source, revision = config.teachers[0].path, config.teachers[0].revision
    else:
        raise KavaError(
            f"student.tokenizer=null for a fresh student without teachers; name a tokenizer, for "
            f"example {BUILTIN_TOKENIZER}"
        )
    if source != BUILTIN_TOKENIZER and source.startswith("builtin:"):
        source = str(resolve_model(source))
    return load_tokenizer(source, revision), source


def _fingerprints(run: Run) -> Fingerprints:
    student = run.blueprint.student_dir
    return Fingerprints(
        teachers={
            name: model_fingerprint(teacher.directory)
            for name, teacher in run.blueprint.teachers.items()
        },
        student=model_fingerprint(student) if student else None,
        data=run.dataset.fingerprint,
    )


def _jitted_step(run: Run) -> Any:
    """The train step with its shardings; the old state's memory is reused for the new one."""
    blueprint = run.blueprint
    step = make_train_step(
        blueprint.objective,
        blueprint.optimizer,
        seed=run.config.run.seed,
        microbatches=run.config.train.grad_accumulation,
    )
    state = blueprint.state_shardings()
    teachers = {name: teacher.part.shardings for name, teacher in blueprint.teachers.items()}
    return jax.jit(
        step,
        in_shardings=(state, teachers, batch_sharding(run.mesh)),
        out_shardings=(state, replicated(run.mesh)),
        donate_argnums=0,
    )


def _evaluator(
    run: Run, teachers: Mapping[str, Params]
) -> Callable[[TrainState, int], dict[str, float]]:
    """What the loop is handed; answers are generated at the end only, being slow."""
    measure = make_measure(run.blueprint.objective)

    def evaluate_at(state: TrainState, step: int) -> dict[str, float]:
        values = held_out(measure, state.params, teachers, _held_out_batches(run))
        if step == run.config.train.steps and run.config.eval.exact_match and _has_answers(run):
            graph, params = run.blueprint.student.graph, state.params["student"]
            values |= score(answer_questions(run, graph, params))
        return values

    return evaluate_at


def _held_out_batches(run: Run) -> Any:
    batches = eval_batches(
        run.dataset.held_out,
        run.config.data.batch_size,
        max_length=run.config.data.max_length,
        bucket=bucket_of(run.config.data.max_length),
        pad_id=pad_id(run.tokenizer),
        sink_tokens=run.config.loss.sink_tokens,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (put_batch(batch, run.mesh) for batch in batches)


def _has_answers(run: Run) -> bool:
    """Whether the held-out rows are questions with final answers to compare."""
    return all("#### " in row.answer and row.prompt for row in run.dataset.held_out_examples)


def _restore_target(run: Run) -> Any:
    return abstract_state(run.blueprint.abstract_state(), run.blueprint.state_shardings())


def _save_projector(run: Run, state: TrainState) -> None:
    projector = run.blueprint.projector
    assert projector is not None
    module: KVDimensionProjector = nnx.merge(projector.graph, state.params["projector"])
    module.save(projector_path(run.directory))


def _export_dtype(source: Path | None) -> Literal["float32", "bfloat16", "float16"]:
    """The dtype that the student's own config.json names."""
    if source is None:
        return "float32"
    config = read_json(source / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in ("bfloat16", "float16") else "float32"


def _card(run: Run, step: int) -> str:
    config, manifest = run.config, read_manifest(run.directory)
    start = manifest["starts"][-1]
    recipe = {
        "KV loss": f"{config.loss.kv}, weight {config.loss.kv_weight}, {config.loss.key_space} keys",
        "projector": f"{config.projector.kind}, {config.projector.direction}",
        "steps": f"{step} of {config.train.steps}, batch {config.data.batch_size}",
        "learning rates": f"student {config.optimizer.student_lr:g}, "
        f"projector {config.optimizer.projector_lr:g}",
    }
    return model_card(
        name=config.run.name,
        base_model=config.student.path or "a student trained from random weights",
        teachers=[teacher.path for teacher in config.teachers],
        recipe=recipe if config.teachers else {name: recipe[name] for name in ("steps",)},
        metrics=_last_evaluation(run.directory, step),
        dataset=config.data.path,
        command=start["command"],
        versions=start["versions"],
    )


def _last_evaluation(run_dir: Path, step: int) -> dict[str, float]:
    """The held-out figures logged at ``step``; none if the run was not evaluated there."""
    from kava_jax.training.monitor import METRICS_NAME, read_metrics

    records = [r for r in read_metrics(run_dir / METRICS_NAME, "eval") if r["step"] == step]
    return {
        name.removeprefix("eval_"): value
        for record in records[-1:]
        for name, value in record.items()
        if name not in ("step", "kind")
    }
