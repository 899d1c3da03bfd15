"""A trained handoff in files: ``handoff.json`` and ``handoff.safetensors``, next to the student.

transformers does not read them. ``dynamic_cache`` is the way to its ``generate``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kava_jax.alignment.handoff import Handoff
from kava_jax.alignment.layer_map import LayerMap
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.cache import KVCache
from kava_jax.errors import KavaError
from kava_jax.hf.locate import HANDOFF_RECORD, model_fingerprint, read_json
from kava_jax.storage import Place

if TYPE_CHECKING:
    from transformers import DynamicCache

HANDOFF_WEIGHTS = "handoff.safetensors"


class CarriedFrom(BaseModel):
    """One teacher's part of a handoff, as its reader or its answerer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """What the teacher was given by: a directory or a hub id."""
    fingerprint: str
    """``locate.model_fingerprint`` of its directory."""
    share: float
    layer_map: LayerMap


class HandoffRecord(BaseModel):
    """What a handoff is, but for its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teachers: dict[str, CarriedFrom]
    projector: dict[str, Any]
    """The arguments of ``KVDimensionProjector``."""


def write_handoff_record(directory: Place, record: HandoffRecord) -> None:
    """Write the record into an export, or the directory of the run that trains the handoff."""
    text = json.dumps(record.model_dump(mode="json"), indent=1)
    (directory / HANDOFF_RECORD).write_text(text + "\n", encoding="utf-8")


def write_handoff(directory: Path, record: HandoffRecord, projector: KVDimensionProjector) -> None:
    """Write record and weights, as ``load_handoff`` reads them."""
    write_handoff_record(directory, record)
    projector.save(directory / HANDOFF_WEIGHTS)


def read_handoff_record(directory: Place) -> HandoffRecord:
    """What ``write_handoff_record`` wrote.

    Raises KavaError, naming the file, where it is missing or damaged.
    """
    raw = read_json(directory / HANDOFF_RECORD)
    try:
        return HandoffRecord.model_validate(raw)
    except (ValidationError, KavaError) as error:
        told = [one["msg"] for one in error.errors()] if isinstance(error, ValidationError) else []
        raise KavaError(
            f"{directory.name}/{HANDOFF_RECORD} is no record of a handoff "
            f"({'; '.join(told) or error}); export the run again"
        ) from None


def check_teachers(directory: Place, teachers: Mapping[str, Path]) -> HandoffRecord:
    """The record of a handoff, whose teachers these are.

    Raises KavaError for another teacher than the one that the handoff was trained for.
    """
    record = read_handoff_record(directory)
    if set(teachers) != set(record.teachers):
        raise KavaError(
            f"teachers={', '.join(teachers)}: {directory.name} was trained with "
            f"{', '.join(record.teachers)}; give the directory of each by that name"
        )
    for name, one in record.teachers.items():
        if model_fingerprint(teachers[name]) != one.fingerprint:
            raise KavaError(
                f"teachers.{name}={str(teachers[name])!r} is another model than {one.path!r}, "
                f"which {directory.name} was trained with; give that one, or train for this one"
            )
    return record


def load_handoff(directory: Path, teachers: Mapping[str, Path]) -> Handoff:
    """The handoff that ``kava export`` wrote.

    Args:
        directory: the export.
        teachers: by the name that the run gave it, the directory of every teacher.

    Raises KavaError for files that are missing or damaged, and for another teacher than the one
    that the handoff was trained for.
    """
    record = check_teachers(directory, teachers)
    return Handoff(
        KVDimensionProjector.load(directory / HANDOFF_WEIGHTS),
        {name: one.layer_map for name, one in record.teachers.items()},
        {name: one.share for name, one in record.teachers.items()},
    )


def dynamic_cache(cache: KVCache) -> "DynamicCache":
    """The cache as transformers has it, for ``generate(past_key_values=...)`` of a torch model.

    ``cache`` holds keys after RoPE, [L, B, T, K, H]; padding is told by the attention mask. Needs
    torch.
    """
    import torch
    from transformers import DynamicCache

    found = DynamicCache()
    for layer, (k_BTKH, v_BTKH) in enumerate(zip(*jax.device_get(cache), strict=True)):
        # A copy, since numpy's view of a JAX array cannot be written to.
        k, v = (torch.from_numpy(np.array(x).swapaxes(1, 2).copy()) for x in (k_BTKH, v_BTKH))
        found.update(k, v, layer)
    return found
