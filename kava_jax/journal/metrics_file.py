"""``metrics.jsonl``: one JSON object a line, with its step and kind; read, and cut for a resume.

Left out on purpose: writing and showing (``monitor``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kava_jax.errors import KavaError
from kava_jax.storage import Place

METRICS_NAME = "metrics.jsonl"
Kind = Literal["train", "eval", "diagnostics", "skipped"]


def read_metrics(path: Place, kind: Kind) -> list[dict[str, Any]]:
    """All lines of one kind in ``metrics.jsonl``, by step; ``null`` is None.

    A half-written last line, as a running or killed run leaves it, is skipped; a step logged twice,
    before and after a resume, counts as it was last.

    Raises:
        KavaError: the file is missing, or another line is not a metrics line (its number is named).
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise KavaError(f"{path} is missing; name the metrics.jsonl of a run") from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise KavaError(f"{path}, line {number} is not a metrics line; remove or mend it")
    of_kind = {record["step"]: record for record in records if record["kind"] == kind}
    return [of_kind[step] for step in sorted(of_kind)]


def cut(path: Path, step: int) -> None:
    """Cut the file where its lines stop being whole lines of steps up to ``step`` (0: nothing)."""
    if not path.exists():
        return
    end = 0
    # The length of whole lines is a position in the file only when it is counted in bytes.
    with path.open("r+b") as file:
        for line in file:
            record = _parse(line)
            if record is None or step == 0 or _after(record, step):
                break
            end += len(line)
        file.truncate(end)


def _after(record: Mapping[str, Any], step: int) -> bool:
    """Whether a run that continues after ``step`` writes this record again.

    Diagnostics of a step are taken before it, that is after everything else of the step before.
    """
    return record["step"] > step or (record["kind"] == "diagnostics" and record["step"] == step)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of one line, None if it is not whole."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    # Without its newline, a line would be continued by the next one that is appended.
    whole = isinstance(record, dict) and {"step", "kind"} <= record.keys() and line.endswith(b"\n")
    return record if whole else None
