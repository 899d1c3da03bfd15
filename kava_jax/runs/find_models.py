"""The models of a config: their geometry and, for a run, the directories of their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kava_jax.config.pair import CutConfig
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.config_keys import refuse_unknown
from kava_jax.hf.cut import cut_spec, plan_cut
from kava_jax.hf.cut_record import CutRecord, read_cut_record
from kava_jax.hf.known import KNOWN_CONFIGS
from kava_jax.hf.load import read_spec
from kava_jax.hf.locate import BUILTIN_PREFIX, CUT_RECORD, resolve_model
from kava_jax.journal.manifest import MANIFEST_NAME
from kava_jax.models.spec import DecoderSpec
from kava_jax.storage import at_revision, reachable


class Found(NamedTuple):
    """A model's geometry and the directory of its weights (None for random ones).

    Of a student that the run cuts, the directory is that of the uncut model.
    """

    directory: Path | None
    spec: DecoderSpec
    cut: CutRecord | None = None
    """Of a model that was cut from another one: where its layers came from."""

    @classmethod
    def at(cls, directory: Path) -> "Found":
        """The model of a Hugging Face directory, which needs no weights."""
        return cls(directory, read_spec(directory), read_cut_record(directory))


class Models(NamedTuple):
    """The models of a run; teachers by name."""

    student: Found
    teachers: dict[str, Found]


def with_weights(address: str) -> Found:
    """A model whose weights will be read; downloaded where it has to be."""
    return Found.at(resolve_model(address))


def at_hand(address: str) -> Found:
    """A model's geometry alone, without a download: from a table, a directory, or the hub's cache.

    Raises KavaError for a model that is not found here.
    """
    hub_id, revision = at_revision(address)
    if hub_id in KNOWN_CONFIGS:
        return Found(Path(hub_id), spec_from_config(KNOWN_CONFIGS[hub_id], where=hub_id))
    directory = reachable(address, "model path")
    if address.startswith(BUILTIN_PREFIX):
        return with_weights(address)
    if directory.is_dir():
        return Found.at(directory)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except HFValidationError:  # a path, not an id
        found = None
    # The cache also remembers files that a repository does not have, by an object that is no path.
    if not isinstance(found, str):
        raise KavaError(f"model path={address!r} was not found here; give a directory")
    return Found.at(Path(found).parent)


def at_hand_or_downloaded(address: str) -> Found:
    """Geometry, by a download where nothing else helps."""
    try:
        return at_hand(address)
    except KavaError:
        return with_weights(address)


def find_models(
    config: Config,
    vocabulary: int = 1,
    find: Callable[[str], Found] = with_weights,
    cut: CutRecord | None = None,
) -> Models:
    """The config's models.

    Args:
        config: the run.
        vocabulary: the tokenizer's number of ids: the least that any model may have, and what a
            fresh student has where its geometry does not say.
        find: how much of a model is needed.
        cut: what ``student.cut`` keeps, where the run's directory does not say yet.

    Raises KavaError for a model that is not to be had or has too few rows.
    """
    student = config.student
    if student.path is not None:
        found = find(student.path)
    elif student.cut is not None:
        found = _cut_student(config, student.cut, find, cut)
    else:
        geometry = {"vocab_size": vocabulary} | (student.geometry or {})
        refuse_unknown(geometry, "student.geometry")
        found = Found(None, spec_from_config(geometry, where="student.geometry"))
    models = Models(found, {one.name: find(one.path) for one in config.teachers})
    named = {f"teachers.{index}": one for index, one in enumerate(models.teachers.values())}
    for who, model in {"student": found, **named}.items():
        # More rows than ids are usual, since tables are padded: 152064 rows for 151665 ids.
        if vocabulary > model.spec.vocab_size:
            raise KavaError(
                f"{who} has vocab_size={model.spec.vocab_size} rows and the tokenizer {vocabulary} "
                f"ids; use the tokenizer that belongs to the model (student.tokenizer=...)"
            )
    return models


def cut_source(config: Config) -> str:
    """The model that ``student.cut`` cuts."""
    assert config.student.cut is not None
    return config.student.cut.path or config.teachers[0].path


def _cut_student(
    config: Config, cut: CutConfig, find: Callable[[str], Found], record: CutRecord | None
) -> Found:
    """The student that ``student.cut`` describes."""
    source = cut_source(config)
    directory, spec, earlier = find(source)
    assert directory is not None
    if earlier is not None:  # the record of a cut of it would name its own layers
        raise KavaError(
            f"teacher={source!r} was cut from {earlier.teacher!r} already ({CUT_RECORD}); cut that "
            f"one, or remove {CUT_RECORD} to take this one for a model of its own"
        )
    # A record without a manifest is that of a start that came to nothing, maybe of another config.
    if record is None and (config.run.directory / MANIFEST_NAME).is_file():
        record = read_cut_record(config.run.directory)
        if record is None:
            raise KavaError(
                f"run.dir={config.run.dir} has lost {CUT_RECORD}, which says what its student is "
                f"cut to; restore it, or begin another run"
            )
    record = planned(cut, source, spec) if record is None else record
    return Found(directory, cut_spec(spec, record), record)


def planned(cut: CutConfig, source: str, spec: DecoderSpec, fingerprint: str = "") -> CutRecord:
    """What a cut of the model at ``source`` keeps, as far as it is known without measuring.

    Raises KavaError for what the model does not have.
    """
    named = {"teacher": source, "fingerprint": fingerprint}
    try:
        return plan_cut(spec, cut.layers, cut.rule, cut.kv_heads, cut.intermediate_size, **named)
    except KavaError as error:  # its first word is a field of the cut
        raise KavaError(f"student.cut.{error}") from None
