"""Where the parts of a cut model came from: ``kava_cut.json`` in its Hugging Face directory.

transformers does not read the file. An export of the healed student keeps it, so the origins of its
layers stay known.
"""

import json
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kava_jax.errors import KavaError
from kava_jax.hf.locate import CUT_RECORD, read_json
from kava_jax.storage import Place

_Number = Annotated[int, Field(ge=0, strict=True)]


class CutRecord(BaseModel):
    """Which layer, head and feed-forward unit of the teacher each part of a cut model is.

    All are counted from 0. ``kv_heads`` has one row for each head that is left: the teacher's heads
    that were merged into it. ``units`` has one row for each layer that is left, or is None where
    the feed-forward width stayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    """The name that the teacher was given by: a path or a hub id."""
    fingerprint: str
    """``locate.model_fingerprint`` of the teacher's directory."""
    teacher_layers: _Number
    layers: tuple[_Number, ...]
    kv_heads: tuple[tuple[_Number, ...], ...]
    units: tuple[tuple[_Number, ...], ...] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "CutRecord":
        if not self.layers or any(a >= b for a, b in pairwise((*self.layers, self.teacher_layers))):
            raise ValueError(
                f"layers={list(self.layers)} do not rise within {self.teacher_layers} layers"
            )
        return self


def write_cut_record(directory: Place, record: CutRecord) -> None:
    """Write the record of a cut into its directory, or that of the run that cuts."""
    text = json.dumps(record.model_dump(), indent=1)
    (directory / CUT_RECORD).write_text(text + "\n", encoding="utf-8")


def read_cut_record(directory: Place) -> CutRecord | None:
    """The record of a cut model; None for a directory that holds none.

    Raises KavaError, naming the file, for one that is damaged.
    """
    file = directory / CUT_RECORD
    if not file.is_file():
        return None
    try:
        # As JSON: strict numbers, and lists for tuples.
        return CutRecord.model_validate_json(json.dumps(read_json(file)))
    except ValidationError as error:
        told = "; ".join(one["msg"] for one in error.errors())
        raise KavaError(
            f"{directory.name}/{CUT_RECORD} is no record of a cut ({told}); restore it, or remove "
            f"it and name the layers in teachers.0.layer_map"
        ) from None
