"""A run before its weights: mesh, tokenizer, geometry; and a run directory opened again."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.config import Config
from kava_jax.config_file import dump_config, parse_config
from kava_jax.data.dataset import Dataset, Load, loader, make_dataset, split_examples
from kava_jax.data.text import Encoder
from kava_jax.data.tokenizer import (
    BUILTIN_TOKENIZER,
    Renamed,
    check_same_ids,
    check_unused,
    load_tokenizer,
    pad_id,
    vocabulary_size,
)
from kava_jax.errors import KavaError
from kava_jax.hf.config_keys import note_unknown
from kava_jax.hf.generation import end_ids
from kava_jax.hf.locate import model_fingerprint, read_json, resolve_model
from kava_jax.models.decoder import Params
from kava_jax.parallel.hosts import from_first
from kava_jax.parallel.mesh import make_mesh
from kava_jax.parallel.sharding import replicated
from kava_jax.runs.idle import compared_notes
from kava_jax.storage import Place, check_access, reachable
from kava_jax.training.blueprint import Blueprint, find_models, make_blueprint
from kava_jax.training.checkpoint import Checkpoints, abstract_state
from kava_jax.training.manifest import (
    CALIBRATION_NAME,
    MANIFEST_NAME,
    Fingerprints,
    read_manifest,
)
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
    end_ids: tuple[int, ...]
    """What ends an answer: the tokenizer's eos, and those of the student's own config."""
    renamed: Mapping[str, list[Renamed]]
    """Special tokens that have other names in a model, by what the model is called."""
    notes: tuple[str, ...]

    @property
    def directory(self) -> Place:
        """The run directory."""
        return self.config.run.directory


def prepare(config: Config, measured_maps: Mapping[str, LayerMap] | None = None) -> Run:
    """Mesh, tokenizer and geometry. Loads no weights and writes nothing.

    ``measured_maps`` are the layer maps that a calibration found, by teacher. Raises KavaError for
    whatever does not fit together.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    tokenizer, source = find_tokenizer(config)
    models = find_models(config, vocabulary_size(tokenizer))
    blueprint = make_blueprint(config, mesh, models, measured_maps or {})
    renamed, notes = _compare_models(tokenizer, config, blueprint)
    data = config.data
    encoder = Encoder(
        tokenizer,
        format=data.format,
        template=data.template,
        max_length=data.max_length,
        train_on=data.train_on,
        today=today_of(config.run.directory),
    )
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


def _compare_models(
    tokenizer: "PreTrainedTokenizerBase", config: Config, blueprint: Blueprint
) -> tuple[dict[str, list[Renamed]], tuple[str, ...]]:
    """Every model's own tokenizer beside the run's: renamed special tokens; and what to say.

    Keys of the models' config.json that are not known are among it.
    """
    models = {f"teachers.{n}": teacher.directory for n, teacher in blueprint.teachers.items()}
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
        batch_size=data.batch_size,
        bucketed=data.batching == "bucketed",
        bucket=data.train_bucket,
        seed=run.config.run.seed,
        pad_id=pad_id(run.tokenizer),
        sink_tokens=run.config.loss.sink_tokens,
        more={
            name: load(more.path, split=more.split or data.eval_split or data.split, rows=more.rows)
            for name, more in run.config.eval.sets.items()
        },
    )
    sets = (dataset.stream.rows, dataset.held_out.rows, *(m.rows for m in dataset.more.values()))
    told = [check_unused(renamed, chain(*sets), who) for who, renamed in run.renamed.items()]
    compared = {"training": dataset.stream.rows, "held-out": dataset.held_out.measured}
    short = compared_notes(compared if run.config.teachers else {}, run.config.loss.sink_tokens)
    return dataset._replace(notes=(*run.notes, *filter(None, told), *dataset.notes, *short))


def today_of(run_dir: Place) -> date:
    """The date that chat templates write: that of the run's first start, whenever it goes on.

    Before that, the day of SOURCE_DATE_EPOCH (seconds since 1970), else the day on which this
    process started. All processes of a run must ask once; whoever asks again need not wait.

    Raises KavaError when SOURCE_DATE_EPOCH is no number of seconds.
    """
    day = _day_of_start()
    if (run_dir / MANIFEST_NAME).is_file():
        manifest = read_manifest(run_dir)
        day = date.fromisoformat(manifest.get("date") or manifest["starts"][0]["time"][:10])
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
    return loader(
        subset=data.subset,
        revision=data.revision,
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
        messages_field=data.messages_field,
        separator=data.separator,
        seed=run.config.run.seed,
    )


def reopen(run_dir: Place, overrides: Sequence[str] = ()) -> Run:
    """A run directory that ``train`` made, prepared again from the config it was started with.

    The attention kernel is chosen anew: this may be another kind of machine.
    """
    config = config_of(run_dir, overrides)
    check_directories(config)
    return prepare(config, read_measured_maps(config))


def reopen_student(run_dir: Place, overrides: Sequence[str] = ()) -> Run:
    """A run directory opened for its student alone; the teachers need not be there.

    The result's blueprint has no teachers, its config is the run's own. Only a student made from
    random weights, whose tokenizer came with the first teacher, needs that one still.
    """
    config = config_of(run_dir, overrides)
    raw = dump_config(config)
    needed = [f"teachers.{index}.path" for index in range(len(config.teachers))]
    if config.student.path is None and config.student.tokenizer is None and needed:
        check_directories(config, besides=needed[1:])
        raw["student"]["tokenizer"] = find_tokenizer(config)[1]
    else:
        check_directories(config, besides=needed)
    # What weighs teachers is refused without any.
    raw |= {"teachers": []}
    raw["loss"] |= {"ce_weight": 1.0, "kv_weight": 1.0}
    return replace(prepare(parse_config(raw)), config=config)


# The last commit whose config has the fields named in docs/findings.md, "Options that went".
LAST_WITH_ALL_FIELDS = "1c99f0a"


def recorded_config(run_dir: Place, overrides: Sequence[str] = ()) -> Config:
    """The config that a run's manifest holds.

    Raises KavaError: there is no manifest, an override is wrong, or the run is of an earlier
    version with other fields; the version and a commit that reads such a run are named.
    """
    manifest = read_manifest(run_dir)
    text = json.dumps(manifest["config"])  # parsing fills in overrides and recipes in place
    try:
        parse_config(json.loads(text))
    except KavaError as error:
        made = manifest["starts"][-1]["versions"]["kava_jax"]
        raise KavaError(
            f"{run_dir} is a run of kava_jax {made}, whose config had other fields; "
            f"commit {LAST_WITH_ALL_FIELDS} exports, evaluates and reports it ({error})"
        ) from None
    return parse_config(json.loads(text), overrides)


def config_of(run_dir: Place, overrides: Sequence[str]) -> Config:
    """The config that a run was started with, at the place where the run lies now."""
    check_access(run_dir, "run")
    chosen = ["train.attention=auto", *overrides]
    config = recorded_config(run_dir, chosen)
    located = config.run.model_copy(update={"dir": str(run_dir)})
    return config.model_copy(update={"run": located})


def model_paths(config: Config) -> dict[str, str]:
    """Where the models and the tokenizer lie or come from, by field."""
    paths = {f"teachers.{index}.path": one.path for index, one in enumerate(config.teachers)}
    paths |= {"student.path": config.student.path, "student.tokenizer": config.student.tokenizer}
    return {field: path for field, path in paths.items() if path is not None}


def directories_of(config: Config) -> list[str]:
    """Those of the ``model_paths`` that are directories, for the manifest."""
    return [path for field, path in model_paths(config).items() if reachable(path, field).is_dir()]


def gone(config: Config) -> dict[str, str]:
    """The ``model_paths`` that were directories when the run was made, and are not there now."""
    known = set()
    if (config.run.directory / MANIFEST_NAME).is_file():
        known.update(read_manifest(config.run.directory).get("directories", ()))
    return {
        field: path
        for field, path in model_paths(config).items()
        if path in known and not reachable(path, field).is_dir()
    }


def check_directories(config: Config, besides: Sequence[str] = ()) -> None:
    """Refuse a run whose model directories are gone; their names might be taken for hub ids.

    ``besides`` are fields that do not matter. Raises KavaError.
    """
    lost = [f"{field}={path!r}" for field, path in gone(config).items() if field not in besides]
    if lost:
        raise KavaError(
            f"{', '.join(lost)}: a directory when the run was made, and gone now; put it back, or "
            f"a link to where it is (kava train also takes {lost[0].partition('=')[0]}=DIR)"
        )


def calibration_path(run_dir: Place) -> Place:
    """Where a run keeps what its calibration found."""
    return run_dir / CALIBRATION_NAME / "calibration.json"


def read_calibration(run_dir: Place) -> dict[str, Any]:
    """What a run's calibration found, by teacher: ``layer_map`` and scores.

    Raises KavaError when there is none, or its file is not whole.
    """
    path = calibration_path(run_dir)
    try:
        teachers = json.loads(path.read_text(encoding="utf-8"))["teachers"]
        return {
            name: {"layer_map": found["layer_map"], **found} for name, found in teachers.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KavaError(
            f"calibration={str(path)!r} cannot be read ({type(error).__name__}); run `kava "
            f"calibrate` with the run's config.yaml"
        ) from None


def read_measured_maps(config: Config) -> dict[str, LayerMap]:
    """The layer maps in the run's calibration; none where the config asks for none.

    Raises KavaError when there is no calibration, or its file is not whole.
    """
    if not config.needs_calibration:
        return {}
    where, found = config.run.directory, read_calibration(config.run.directory)
    path = str(calibration_path(where))
    return {name: LayerMap.from_dict(own["layer_map"], path) for name, own in found.items()}


def restore(run: Run, checkpoint: str = "last") -> TrainState:
    """The state at ``last``, ``best`` or a step number.

    Raises KavaError when its weights are not finite.
    """
    keep = run.config.train.keep_checkpoints
    with Checkpoints(run.directory, keep, read_only=True) as checkpoints:
        state = checkpoints.restore(checkpoints.choose(checkpoint), restore_target(run))
    check_finite(run, state.params, int(state.step))
    return state


def check_finite(run: Run, params: Params, step: int) -> None:
    """Raises KavaError with the restored weights that hold NaN or infinity."""
    every = jax.jit(
        lambda params: jax.tree.map(lambda x: jnp.isfinite(x).all(), params),
        out_shardings=replicated(run.mesh),
    )(params)
    flat, _ = jax.tree.flatten_with_path(every)
    wrong = [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in flat if not x]
    if wrong:
        raise KavaError(
            f"checkpoint={step} of {run.directory} holds NaN or infinity in "
            f"{', '.join(wrong)}; use an earlier one, or train again"
        )


def restore_student(run: Run, checkpoint: str = "last") -> tuple[int, Params]:
    """The student at ``last``, ``best`` or a step number, and that number.

    Raises KavaError when its weights are not finite.
    """
    keep = run.config.train.keep_checkpoints
    student = run.blueprint.student
    abstract = abstract_state(nnx.to_pure_dict(student.abstract), student.shardings)
    with Checkpoints(run.directory, keep, read_only=True) as checkpoints:
        step = checkpoints.choose(checkpoint)
        params = checkpoints.restore_student(step, abstract)
    check_finite(run, {"student": params}, step)
    return step, params


def restore_target(run: Run) -> Any:
    """Shapes, dtypes and places of the run's state, for reading a checkpoint into."""
    return abstract_state(run.blueprint.abstract_state(), run.blueprint.state_shardings())


def find_tokenizer(config: Config) -> tuple["PreTrainedTokenizerBase", str]:
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
