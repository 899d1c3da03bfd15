"""A run before its weights: mesh, tokenizer, geometry; and a run directory opened again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from kava_jax.config import Config
from kava_jax.config_file import parse_config
from kava_jax.data.dataset import Dataset, Load, loader, make_dataset, split_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import BUILTIN_TOKENIZER, check_same_ids, load_tokenizer, pad_id
from kava_jax.errors import KavaError
from kava_jax.hf.locate import resolve_model
from kava_jax.parallel.mesh import make_mesh
from kava_jax.training.blueprint import Blueprint, make_blueprint
from kava_jax.training.checkpoint import Checkpoints, abstract_state
from kava_jax.training.manifest import read_manifest
from kava_jax.training.step import TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """Everything of a run but its weights."""

    config: Config
    mesh: Mesh
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_source: str
    encoder: Encoder
    blueprint: Blueprint

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.config.run.directory


def prepare(config: Config) -> Run:
    """Mesh, tokenizer and geometry. Loads no weights and writes nothing.

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
    return Run(config, mesh, tokenizer, source, encoder, blueprint)


def load_dataset(run: Run) -> Dataset:
    """The run's training stream and held-out rows."""
    data = run.config.data
    training, held = split_examples(
        data_loader(run),
        path=data.path,
        split=data.split,
        rows=data.rows,
        eval_path=data.eval_path,
        eval_split=data.eval_split,
        eval_rows=data.eval_rows,
    )
    return make_dataset(
        training,
        held,
        run.encoder,
        batch_size=data.batch_size,
        seed=run.config.run.seed,
        pad_id=pad_id(run.tokenizer),
        sink_tokens=run.config.loss.sink_tokens,
    )


def data_loader(run: Run) -> Load:
    """``(path, split, rows) -> examples`` with the run's field names and seed."""
    data = run.config.data
    return loader(
        subset=data.subset,
        revision=data.revision,
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
        messages_field=data.messages_field,
        separator=data.separator,
        seed=run.config.run.seed,
    )


def reopen(run_dir: Path, overrides: Sequence[str] = ()) -> Run:
    """A run directory that ``train`` made, prepared again from the config it was started with."""
    config = parse_config(read_manifest(run_dir)["config"], overrides)
    located = config.run.model_copy(update={"dir": str(run_dir)})
    return prepare(config.model_copy(update={"run": located}))


def restore(run: Run, checkpoint: str = "last") -> TrainState:
    """The state at ``last``, ``best`` or a step number."""
    keep = run.config.train.keep_checkpoints
    with Checkpoints(run.directory, keep, read_only=True) as checkpoints:
        return checkpoints.restore(checkpoints.choose(checkpoint), restore_target(run))


def restore_target(run: Run) -> Any:
    """Shapes, dtypes and places of the run's state, for reading a checkpoint into."""
    return abstract_state(run.blueprint.abstract_state(), run.blueprint.state_shardings())


def _tokenizer(config: Config) -> tuple["PreTrainedTokenizerBase", str]:
    """The run's tokenizer and where it came from: named, the student's, or the first teacher's."""
    student = config.student
    if student.tokenizer is not None:
        source = student.tokenizer
    elif student.path is not None:
        source = str(resolve_model(student.path, student.revision))
    elif config.teachers:
        source = str(resolve_model(config.teachers[0].path, config.teachers[0].revision))
    else:
        raise KavaError(
            f"student.tokenizer=null for a fresh student without teachers; name a tokenizer, for "
            f"example {BUILTIN_TOKENIZER}"
        )
    if source != BUILTIN_TOKENIZER and source.startswith("builtin:"):
        source = str(resolve_model(source))
    return load_tokenizer(source), source
