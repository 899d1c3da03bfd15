"""A run before its weights: mesh, tokenizer, geometry, rows."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.config.file import parse_config, without_teachers
from kava_jax.config.run import Config
from kava_jax.data.batches import BatchStream
from kava_jax.data.dataset import Dataset, Load, make_dataset, split_examples
from kava_jax.data.sources import load_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import (
    BUILTIN_TOKENIZER,
    check_same_ids,
    check_unused,
    load_tokenizer,
    pad_id,
    vocabulary_size,
)
from kava_jax.errors import KavaError
from kava_jax.hf.config_keys import note_unknown
from kava_jax.hf.cut_record import CutRecord
from kava_jax.hf.generation import end_ids
from kava_jax.hf.locate import model_fingerprint, read_json, resolve_model
from kava_jax.journal.manifest import (
    MANIFEST_NAME,
    Fingerprints,
    read_manifest,
)
from kava_jax.parallel.hosts import from_first
from kava_jax.parallel.mesh import make_mesh
from kava_jax.runs.blueprint import Blueprint, make_blueprint
from kava_jax.runs.find_models import Models, at_hand, cut_source, find_models
from kava_jax.runs.idle import check_prompts, compared_notes
from kava_jax.storage import Place

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
    end_ids: tuple[int, ...]
    """What ends an answer: the tokenizer's eos, and those of the student's own config."""
    renamed: Mapping[str, Mapping[int, str]]
    """Special tokens that have other names in a model: by the model and by id, in words."""
    notes: tuple[str, ...]

    @property
    def directory(self) -> Place:
        """The run directory."""
        return self.config.run.directory


def prepare(
    config: Config,
    measured_maps: Mapping[str, LayerMap] | None = None,
    cut: CutRecord | None = None,
) -> Run:
    """Mesh, tokenizer and geometry. Loads no weights and writes nothing.

    ``measured_maps`` are the layer maps that a calibration found, by teacher; ``cut`` is what
    ``student.cut`` was found to keep, where the run directory does not say yet.

    Raises KavaError for whatever does not fit together.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tokenizer, source = find_tokenizer(config)
    models = find_models(config, vocabulary_size(tokenizer), cut=cut)
    blueprint = make_blueprint(config, mesh, models, measured_maps or {})
    renamed, notes = _compare_models(tokenizer, config, blueprint)
    data = config.data
    encoder = Encoder(
        tokenizer,
        format=data.format,
        max_length=data.max_length,
        train_on=data.train_on,
        today=today_of(config.run.directory),
    )
    # Chat models may end a turn with another token than the tokenizer's eos.
    ends = {int(tokenizer.eos_token_id)}  # pyright: ignore[reportArgumentType]  (Encoder demands an eos)
    if blueprint.student_dir is not None:
        ends |= end_ids(blueprint.student_dir)
    return Run(
        config,
        mesh,
        tokenizer,
        source,
        encoder,
        blueprint,
        tuple(sorted(ends)),
        renamed,
        notes,
    )


def prepare_alone(config: Config, path: str | Path) -> Run:
    """A finished model as the student of a run without teachers, on the same data."""
    # Another recipe may say where its student comes from, beside the path that is given here.
    alone = {"student": {"path": str(path)}, "recipe": "anchored"}
    return prepare(parse_config(without_teachers(config) | alone))


def _compare_models(
    tokenizer: "PreTrainedTokenizerBase", config: Config, blueprint: Blueprint
) -> tuple[dict[str, dict[int, str]], tuple[str, ...]]:
    """Every model's own tokenizer compared with the run's: renamed special tokens; and what to say.

    Keys of the models' config.json that are not known are among it.
    """
    models = {f"teachers.{n}": teacher.directory for n, teacher in blueprint.teachers.items()}
    # Without a tokenizer that is named, the run's is the student's own.
    if config.student.tokenizer is not None and blueprint.student_dir is not None:
        models["student.path"] = blueprint.student_dir
    found = {who: check_same_ids(tokenizer, directory, who) for who, directory in models.items()}
    if blueprint.student_dir is not None:
        models["student.path"] = blueprint.student_dir
    told = [note for _, note in found.values()]
    told += [note_unknown(read_json(where / "config.json"), who) for who, where in models.items()]
    notes = tuple(note for note in told if note is not None)
    return {who: renamed for who, (renamed, _) in found.items()}, notes


def load_dataset(run: Run) -> Dataset:
    """The run's training stream and held-out rows."""
    data, load = run.config.data, data_loader(run)
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
        run.encoder,
        partial(
            BatchStream,
            batch_size=data.batch_size,
            max_length=data.max_length,
            bucketed=data.batching == "bucketed",
            bucket=data.train_bucket,
            seed=run.config.run.seed,
            pad_id=pad_id(run.tokenizer),
            sink_tokens=run.config.loss.sink_tokens,
        ),
        more={
            name: load(more.path, split=more.split or data.eval_split or data.split, rows=more.rows)
            for name, more in run.config.eval.sets.items()
        },
    )
    sets = (dataset.stream.rows, dataset.held_out.rows, *(m.rows for m in dataset.more.values()))
    # Renamed tokens do harm only in use, and only encoded rows show which are used.
    told = [check_unused(renamed, chain(*sets), who) for who, renamed in run.renamed.items()]
    compared = {"training": dataset.stream.rows, "held-out": dataset.held_out.measured}
    if run.config.loss.handoff:
        check_prompts(compared)
    short = compared_notes(compared if run.config.teachers else {}, run.config.loss.sink_tokens)
    return dataset._replace(notes=(*run.notes, *filter(None, told), *dataset.notes, *short))


def today_of(run_dir: Place) -> date:
    """The date that chat templates write: that of the run's first start, whenever it goes on.

    Before that, the day of SOURCE_DATE_EPOCH (seconds since 1970), else the day on which this
    process started. All processes of a run must ask once; whoever asks again need not wait.

    Raises KavaError when SOURCE_DATE_EPOCH is no number of seconds.
    """
    # Asked in any case: all processes must ask, even if some do not see the manifest yet.
    day = _day_of_start()
    if (run_dir / MANIFEST_NAME).is_file():
        day = date.fromisoformat(read_manifest(run_dir)["date"])
    return day


@cache
def _day_of_start() -> date:
    """The first process's, kept, so that a run that starts at midnight has one day everywhere."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        now = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(int(seconds), UTC)
    except (ValueError, OverflowError, OSError):
        raise KavaError(
            f"SOURCE_DATE_EPOCH={seconds!r} is no number of seconds since 1970; correct or unset it"
        ) from None
    return date.fromordinal(from_first(now.toordinal(), "date of the run"))


def fingerprints_of(run: Run, dataset: Dataset) -> Fingerprints:
    """Hashes of every file that the run reads."""
    student = run.blueprint.student_dir
    return Fingerprints(
        teachers={
            name: model_fingerprint(teacher.directory)
            for name, teacher in run.blueprint.teachers.items()
        },
        student=model_fingerprint(student) if student else None,
        data=dataset.fingerprint,
        tokens=dataset.tokens,
    )


def data_loader(run: Run) -> Load:
    """``(path, split, rows) -> examples`` with the run's field names and seed."""
    data = run.config.data
    return partial(
        load_examples,
        subset=data.subset,
        prompt_field=data.fields[0] if len(data.fields) == 2 else None,
        answer_field=str(data.fields[-1]),
        messages_field=data.fields[0] if len(data.fields) == 1 else None,
        seed=run.config.run.seed,
    )


def models_without_weights(config: Config) -> Models:
    """The config's models for a blueprint that will never load them; nothing is downloaded.

    Raises KavaError for a model whose geometry is not found here.
    """
    fresh = config.student.geometry
    sized = fresh is None or "vocab_size" in fresh
    return find_models(config, 1 if sized else vocabulary_size(find_tokenizer(config)[0]), at_hand)


def find_tokenizer(config: Config) -> tuple["PreTrainedTokenizerBase", str]:
    """The run's tokenizer and where it came from: named, the student's, or the first teacher's."""
    student = config.student
    if student.tokenizer is not None:
        source = student.tokenizer
    elif student.path is not None:
        source = str(resolve_model(student.path))
    elif student.cut is not None:
        source = str(resolve_model(cut_source(config)))
    elif config.teachers:
        source = str(resolve_model(config.teachers[0].path))
    else:
        raise KavaError(
            f"student.tokenizer=null for a fresh student without teachers; name a tokenizer, for "
            f"example {BUILTIN_TOKENIZER}"
        )
    if source != BUILTIN_TOKENIZER and source.startswith("builtin:"):
        source = str(resolve_model(source))
    return load_tokenizer(source), source
