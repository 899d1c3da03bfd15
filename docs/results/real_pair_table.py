"""The tables of the study of cut students, from the two files that real_pair.py writes."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from lines import head, row

from kava_jax.experiments.statistics import estimate, in_words, steps_to_reach
from kava_jax.training.share import share_is_due

HERE = Path(__file__).resolve().parent
RESULTS, SECONDS = HERE / "real_pair.jsonl", HERE / "real_pair_seconds.json"
TEXTS = {"gsm8k": "GSM8K", "tinystories": "TinyStories"}
# Steps between two measurements of auto(0.5), as the config has it.
EVERY = 20
# Cuts of one shape take one time: only which layers they hold differs.
TIMED = {"15-evenly": "15-middle", "20-evenly": "20-middle"}
Line = dict[str, Any]


def records(path: Path | None = None) -> list[Line]:
    """All finished arms of this study, or of another file, in the order in which they ended."""
    path = path or RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def append(line: dict[str, Any], told: str, path: Path | None = None) -> None:
    """A finished arm, as one line of the results; what it found goes to the screen."""
    with (path or RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{line['arm']}, seed {line['seed']}, {line['steps']} steps: {told}", flush=True)


def seconds(cut: str, losses: str, steps: int) -> float:
    """Of a run on a quiet machine; steps that measure the KV weight cost more."""
    own = _timed(cut)[losses]
    plain = own["step"]["median"]
    due = sum(share_is_due(number, EVERY) for number in range(steps))
    return steps * plain + due * (own.get("measuring_step", own["step"])["median"] - plain)


def _timed(cut: str) -> dict[str, Line]:
    """What the bench found of a cut, by its losses; nothing before it has been run."""
    if not SECONDS.is_file():
        return {}
    return json.loads(SECONDS.read_text(encoding="utf-8"))["seconds"].get(TIMED.get(cut, cut), {})


def affordable(cut: str, losses: str, steps: int) -> int:
    """How many steps an arm has in the time in which the one without matching takes ``steps``.

    At most as many: matching makes no step quicker, whatever the bench's noise says.
    """
    limit = seconds(cut, without_matching(losses), steps)
    return max(n for n in range(1, steps + 1) if seconds(cut, losses, n) <= limit)


def without_matching(losses: str) -> str:
    """What an arm is compared with: its language loss alone, and cross-entropy with KL."""
    return "ce" if losses.startswith("ce+") else "kl"


def real_pair() -> list[str]:
    """Every arm next to the one without matching; contrasts over seeds; the teachers."""
    lines = records()
    teachers = [line for line in lines if "cut" not in line]
    order = ("text", "cut", "steps", "arm", "seed")
    arms = sorted((x for x in lines if "cut" in x), key=lambda x: [x[name] for name in order])
    told = head(
        "arm | seeds | >steps | >minutes | >loss on its text | >minus without matching | >KL to "
        "the teacher | >loss on the other text | >minus without matching | >KL to the teacher | "
        ">last loss without matching reached at step"
    )
    groups = by_seeds(arms)
    told += [row(*_cells([(line, reference(line, arms)) for line in own])) for own in groups]
    told += [
        "",
        "Nats a token on held-out text, means over seeds. Plus or minus is a standard error of the "
        "paired difference: over test blocks for one seed, over seeds for several. Without "
        "matching is KL alone, and cross-entropy alone for arms with it. Minutes by the bench on a "
        "quiet machine.",
    ]
    for said in filter(None, (*_contrasts(arms), _teachers(teachers))):
        told += ["", said]
    return told


def by_seeds(lines: list[Line]) -> list[list[Line]]:
    """Sorted lines of one arm and as many steps together. Seed 0, which chose what the fresh seeds
    then ran, is a group of its own."""
    groups = groupby(lines, lambda line: (line["arm"], line["steps"], line["seed"] > 0))
    return [list(own) for _, own in groups]


def reference(line: Line, arms: list[Line]) -> Line | None:
    """The arm without matching of the same cut, text and seed; None for KL alone.

    It has as many steps or, where an arm was run at equal time, the next more. None too before it
    has been run.
    """
    same = [
        one
        for one in arms
        if one["losses"] == without_matching(line["losses"])
        and not one["changes"]
        and all(one[key] == line[key] for key in ("cut", "text", "seed"))
        and one["steps"] >= line["steps"]
    ]
    found = min(same, key=lambda one: one["steps"], default=None)
    return None if found is line else found


def _cells(pairs: list[tuple[Line, Line | None]]) -> list[str]:
    """A row: one arm over its seeds, each next to the one without matching."""
    line = pairs[0][0]
    texts = [line["text"], *(text for text in TEXTS if text != line["text"])]
    known = line["losses"] in _timed(line["cut"])
    minutes = seconds(line["cut"], line["losses"], line["steps"]) / 60 if known else None
    cells = [line["arm"], ", ".join(str(own["seed"]) for own, _ in pairs), str(line["steps"])]
    cells += ["" if minutes is None else f"{minutes:.1f}"]
    compared = [(own, other) for own, other in pairs if other]
    for text in texts:
        loss, kl = (np.mean([own["figures"][text][x] for own, _ in pairs]) for x in ("loss", "kl"))
        blocks = [
            np.subtract(*(one["figures"][text]["block_loss"] for one in pair)) for pair in compared
        ]
        cells += [f"{loss:.3f}", difference(blocks), f"{kl:.3f}"]
    return [*cells, _reached(compared)]


def difference(blocks: list[np.ndarray]) -> str:
    """Mean of a paired difference: over the blocks of one seed, or over seeds."""
    if not blocks:
        return ""
    parts = blocks[0] if len(blocks) == 1 else np.mean(blocks, axis=1)
    return f"{np.mean(parts):+.3f} ± {np.std(parts, ddof=1) / np.sqrt(len(parts)):.3f}"


def _reached(compared: list[tuple[Line, Line]]) -> str:
    """At which step each seed had the last loss of the arm without matching, least to most."""
    steps = [
        steps_to_reach(
            [(int(point["step"]), point["eval_loss"]) for point in own["curve"]],
            other["curve"][-1]["eval_loss"],
            higher_is_better=False,
        )
        for own, other in compared
    ]
    found = sorted({f"{step:.0f}" for step in steps if step is not None}, key=int)
    return " to ".join(found[:1] + found[1:][-1:] + ["not"] * (None in steps))


def _contrasts(arms: list[Line]) -> list[str]:
    """Over fresh seeds, arms minus those without matching; seed 0 chose them and does not count."""
    named: dict[tuple[str, int], dict[int, tuple[Line, Line]]] = {}
    for line in arms:
        if line["seed"] > 0 and (other := reference(line, arms)):
            named.setdefault((line["arm"], line["steps"]), {})[line["seed"]] = (line, other)
    told = []
    for (name, steps), pairs in named.items():
        for text, title in TEXTS.items():
            changes = {
                seed: own["figures"][text]["loss"] - other["figures"][text]["loss"]
                for seed, (own, other) in pairs.items()
            }
            baseline = next(other["arm"] for _, other in pairs.values())
            if len(changes) > 1 and (found := estimate(changes)):
                said = in_words(found, name, baseline)
                told.append(f"Loss on {title} after {steps} steps, {said}.")
    return told


def _teachers(lines: list[Line]) -> str:
    told = [
        f"{line['arm']} ({line['steps']} steps) "
        + ", ".join(f"{line['figures'][text]['loss']:.3f} on {TEXTS[text]}" for text in TEXTS)
        for line in lines
    ]
    return f"Teachers: {'; '.join(told)}." if told else ""


REAL_PAIR = {"real_pair": real_pair}
