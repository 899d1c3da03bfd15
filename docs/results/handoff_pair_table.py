"""The table of the handoff study, from the two files that handoff_pair.py writes."""

import json
import textwrap
from typing import Any

import numpy as np
from lines import head, row
from real_pair_table import HERE, records

from kava_jax.experiments.statistics import estimate, in_words

RESULTS, HANDOFF_SECONDS = HERE / "handoff_pair.jsonl", HERE / "handoff_pair_seconds.json"
# How an answer is read: by the student alone, from the teacher's cache of the prompt, from its
# cache of another prompt, without a prompt, and by the teacher.
WAYS = ("alone", "handed", "wrong", "none", "teacher")
BASELINE = "alone"
Line = dict[str, Any]


def seconds() -> dict[str, float]:
    """Of a step of each mode, on a quiet machine; nothing before the bench."""
    if not HANDOFF_SECONDS.is_file():
        return {}
    found = json.loads(HANDOFF_SECONDS.read_text(encoding="utf-8"))["seconds"]
    return {mode: own["step"]["median"] for mode, own in found.items()}


def handoff_pair() -> list[str]:
    """Every arm next to the student that was trained on alone; the contrasts over fresh seeds."""
    lines = sorted(records(RESULTS), key=lambda x: (x["healed"], x["mode"], x["steps"], x["seed"]))
    told = head(
        "healed by | trained on | >seed | >steps | >minutes | >alone | >from the teacher's cache "
        "| >minus trained on alone | >of another prompt | >no prompt"
    )
    told += [row(*_cells(line, baseline(line, lines))) for line in lines]
    teacher = lines[0]["figures"]["teacher"] if lines else float("nan")
    told += [
        "",
        f"Nats a token of held-out answers; the teacher has {teacher:.3f}. The difference is from "
        "the teacher's cache minus the student that was trained on alone, at equal steps, plus or "
        "minus the standard error of the paired difference over rows.",
    ]
    for said in _contrasts(lines):
        told += ["", said]
    wrapped = (textwrap.wrap(line, 118) if line[:1] not in ("", "|") else [line] for line in told)
    return [line for lines in wrapped for line in lines]


def baseline(line: Line, lines: list[Line], *, longer: bool = False) -> Line | None:
    """Trained on alone from the same start: with as many steps, or with more."""
    same = [
        one
        for one in lines
        if one["mode"] == BASELINE
        and not one.get("changes")
        and all(one[key] == line[key] for key in ("healed", "seed"))
        and (one["steps"] > line["steps"] if longer else one["steps"] == line["steps"])
    ]
    return same[0] if same and same[0] is not line else None


def _cells(line: Line, other: Line | None) -> list[str]:
    own, timed = line["figures"], seconds()
    minutes = line["steps"] * timed[line["mode"]] / 60 if line["mode"] in timed else None
    change = ""
    if other is not None:
        rows = np.subtract(own["row_handed"], other["figures"]["row_alone"])
        change = f"{rows.mean():+.3f} ± {rows.std(ddof=1) / np.sqrt(len(rows)):.3f}"
    ways = (f"{own[way]:.3f}" for way in WAYS[:-1])
    alone, handed, *controls = ways
    named = " ".join((line["mode"] or "untrained", *line.get("changes", ())))
    cells = [line["healed"], named, str(line["seed"]), str(line["steps"])]
    return [*cells, "" if minutes is None else f"{minutes:.1f}", alone, handed, change, *controls]


def _contrasts(lines: list[Line]) -> list[str]:
    """Over fresh seeds, at equal steps and at equal time; seed 0 chose them and does not count."""
    told = []
    fresh = [line for line in lines if line["seed"] > 0 and line["mode"] != BASELINE]
    for arm in dict.fromkeys(line["arm"] for line in fresh):
        for longer, when in ((False, "At equal steps"), (True, "At equal time")):
            changes = {
                one["seed"]: one["figures"]["handed"] - other["figures"]["alone"]
                for one in fresh
                if one["arm"] == arm and (other := baseline(one, lines, longer=longer))
            }
            if found := estimate(changes):
                told.append(f"{when}, {in_words(found, f'{arm}, handed over', BASELINE)}.")
    return told


HANDOFF_PAIR = {"handoff_pair": handoff_pair}
