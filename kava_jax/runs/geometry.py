"""Geometry of a run's models without their weights: for plans, smoke runs and explanations."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kava_jax.config.file import dump_config
from kava_jax.config.run import Config
from kava_jax.data.tokenizer import vocabulary_size
from kava_jax.errors import KavaError
from kava_jax.hf.config_json import spec_from_config
from kava_jax.hf.config_keys import refuse_unknown
from kava_jax.hf.known import KNOWN_CONFIGS
from kava_jax.hf.load import read_spec
from kava_jax.hf.locate import BUILTIN_PREFIX, resolve_model
from kava_jax.models.spec import DecoderSpec
from kava_jax.runs.blueprint import Found, Models
from kava_jax.runs.prepare import find_tokenizer
from kava_jax.storage import reachable


def model_specs(raw: Mapping[str, Any]) -> dict[str, DecoderSpec]:
    """Geometry of every model of a dumped config: ``student`` and ``teacher-<name>``.

    Raises KavaError for a model that is neither at hand nor in the table of known ones.
    """
    student = raw["student"]
    if student["geometry"] is not None:
        geometry = {"vocab_size": 1} | student["geometry"]
        refuse_unknown(geometry, "student.geometry")
        specs = {"student": spec_from_config(geometry, where="student.geometry")}
    else:
        specs = {"student": _spec(student["path"], student["revision"])}
    return specs | {
        f"teacher-{teacher['name']}": _spec(teacher["path"], teacher["revision"])
        for teacher in raw["teachers"]
    }


def models_without_weights(config: Config) -> Models:
    """The config's models for a blueprint that will never load them; nothing is downloaded.

    Raises KavaError for a model whose geometry is not at hand.
    """
    raw = dump_config(config)
    geometry = raw["student"]["geometry"]
    if geometry is not None and "vocab_size" not in geometry:
        geometry["vocab_size"] = vocabulary_size(find_tokenizer(config)[0])
    specs = specs_at_hand(raw)
    path = config.student.path
    student = Found(None if path is None else Path(path), specs["student"])
    teachers = {
        teacher.name: Found(Path(teacher.path), specs[f"teacher-{teacher.name}"])
        for teacher in config.teachers
    }
    return Models(student, teachers)


def specs_at_hand(raw: Mapping[str, Any]) -> dict[str, DecoderSpec]:
    """As ``model_specs``, but nothing is downloaded: a hub id counts only where it is cached.

    Raises KavaError for a model that is not at hand.
    """
    found = copy.deepcopy(dict(raw))
    for model in (found["student"], *found["teachers"]):
        if model["path"] is not None:
            model["path"] = _at_hand(model["path"], model["revision"])
    return model_specs(found)


def _at_hand(path: str, revision: str | None) -> str:
    """The path or known name itself, or where the hub's cache keeps the model."""
    if (
        path in KNOWN_CONFIGS
        or path.startswith(BUILTIN_PREFIX)
        or reachable(path, "model path").is_dir()
    ):
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:  # a path, not an id
        found = None
    if not isinstance(found, str):
        raise KavaError(f"model path={path!r} is not at hand; give a directory")
    return str(Path(found).parent)


def _spec(path: str, revision: str | None) -> DecoderSpec:
    """From the table of known models, else from the model itself; a directory needs no weights."""
    if path in KNOWN_CONFIGS:
        return spec_from_config(KNOWN_CONFIGS[path], where=path)
    directory = reachable(path, "model path")
    if directory.is_dir():
        return read_spec(directory)
    return read_spec(resolve_model(path, revision))
