"""The table of the handoff study, from the two files that handoff_pair.py writes."""

import json
from typing import Any

import numpy as np
from lines import head, row
from real_pair_table import HERE, by_seeds, difference, records

from kava_jax.experiments.statistics import estimate, in_words

RESULTS, HANDOFF_SECONDS = HERE / "handoff_pair.jsonl", HERE / "handoff_pair_seconds.json"
# How an answer is read: by the student alone, from the teacher's cache of the prompt, from its
# cache of another prompt, without a prompt, and by the teacher.
WAYS = ("alone", "handed", "wrong", "none", "teacher")
# With two other rows in the prompt: longer than any that was trained on.
LONG = ("long alone", "long handed")
Line = dict[str, Any]


def seconds() -> dict[str, float]:
    """Of a step of each mode, on a quiet machine; nothing before the bench."""
    if not HANDOFF_SECONDS.is_file():
        return {}
    found = json.loads(HANDOFF_SECONDS.read_text(encoding="utf-8"))["seconds"]
    return {mode: own["step"]["median"] for mode, own in found.items()}


def handoff_pair() -> list[str]:
    """Every arm next to the student that was trained on alone; the contrasts over fresh seeds."""
    order = ("healed", "mode", "arm", "steps", "seed")
    lines = sorted(records(RESULTS), key=lambda line: [line[name] for name in order])
    told = head(
        "healed by | trained on | seeds | >steps | >minutes | >alone | >from the teacher's cache "
        "| >minus trained on alone | >of another prompt | >no prompt"
    )
    told += [
        row(*_cells([(line, baseline(line, lines)) for line in own])) for own in by_seeds(lines)
    ]
    teacher = next((one["figures"]["teacher"] for one in lines if "teacher" in one["figures"]), 0)
    told += [
        "",
        f"Nats a token of held-out answers, means over seeds; the teacher has {teacher:.3f}. The "
        "difference is from the teacher's cache minus the student that was trained on alone, plus "
        "or minus its standard error: over rows for one seed, over seeds for several.",
    ]
    for said in (*_contrasts(lines), *_long_prompts(lines)):
        told += ["", said]
    return told


def baseline(line: Line, lines: list[Line]) -> Line | None:
    """Trained on alone from the same start, with KL where the arm has it.

    It has as many steps or, where an arm was stopped at equal time, the next more.
    """
    mode = "alone, KL" if line["mode"].endswith("KL") else "alone"
    same = [
        one
        for one in lines
        if one["mode"] == mode
        and not one.get("changes")
        and all(one[key] == line[key] for key in ("healed", "seed"))
        and one["steps"] >= line["steps"] > 0
    ]
    found = min(same, key=lambda one: one["steps"], default=None)
    return None if found is line else found


def _cells(pairs: list[tuple[Line, Line | None]]) -> list[str]:
    """A row: one arm over its seeds, each next to the student that was trained on alone."""
    line, timed = pairs[0][0], seconds()
    minutes = line["steps"] * timed[line["mode"]] / 60 if line["mode"] in timed else None
    rows = [
        np.subtract(own["figures"]["row_handed"], other["figures"]["row_alone"])
        for own, other in pairs
        if other and "handed" in own["figures"]
    ]
    figures = [own["figures"] for own, _ in pairs]
    # Not every student was measured in every way.
    alone, handed, *controls = (
        f"{np.mean([own[way] for own in figures]):.3f}" if way in figures[0] else ""
        for way in WAYS[:-1]
    )
    named = " ".join((line["mode"] or "untrained", *line.get("changes", ())))
    seeds = ", ".join(str(own["seed"]) for own, _ in pairs)
    cells = [line["healed"], named, seeds, str(line["steps"])]
    cells += ["" if minutes is None else f"{minutes:.1f}", alone, handed]
    return [*cells, difference(rows), *controls]


def _long_prompts(lines: list[Line]) -> list[str]:
    """Prompts longer than any that was trained on."""
    told = []
    for line in lines:
        other = baseline(line, lines)
        if other and "long handed" in line["figures"] and "long alone" in other["figures"]:
            own, alone = line["figures"], other["figures"]
            rows = np.subtract(own["row_long handed"], alone["row_long alone"])
            told.append(
                f"With two other rows in the prompt, {line['arm']} from the teacher's cache "
                f"{own['long handed']:.3f} minus {other['arm']} {alone['long alone']:.3f}: "
                f"{difference([rows])} (seed {line['seed']}, over rows)."
            )
    return told


def _contrasts(lines: list[Line]) -> list[str]:
    """Over fresh seeds; seed 0 chose them and does not count."""
    told = []
    for own in by_seeds(lines):
        fresh = [one for one in own if one["seed"] and "handed" in one["figures"]]
        pairs = [(one, other) for one in fresh if (other := baseline(one, lines))]
        changes = {
            one["seed"]: one["figures"]["handed"] - other["figures"]["alone"]
            for one, other in pairs
        }
        if len(changes) > 1 and (found := estimate(changes)):
            arm, other = pairs[0]
            after = f"{arm['arm']} from the teacher's cache after {arm['steps']} steps"
            alone = f"{other['arm']} after {other['steps']}"
            told.append(f"{in_words(found, after, alone)}.")
    return told


HANDOFF_PAIR = {"handoff_pair": handoff_pair}
