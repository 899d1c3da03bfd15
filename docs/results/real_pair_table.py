"""The tables of the study of cut students, from the two files that real_pair.py writes."""

import json
import textwrap
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
        "arm | >seed | >steps | >minutes | >loss on its text | >minus without matching | >KL to "
        "the teacher | >loss on the other text | >minus without matching | >KL to the teacher | "
        ">last loss without matching reached at step"
    )
    told += [row(*_cells(line, reference(line, arms))) for line in arms]
    told += [
        "",
        "Nats a token on held-out text, plus or minus the standard error of the paired difference "
        "over test blocks. Without matching is KL alone, and cross-entropy alone for arms with it. "
        "Minutes by the bench on a quiet machine.",
    ]
    for said in filter(None, (*_contrasts(arms), _teachers(teachers))):
        told += ["", said]
    wrapped = (textwrap.wrap(line, 118) if line[:1] not in ("", "|") else [line] for line in told)
    return [line for lines in wrapped for line in lines]


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


def _cells(line: Line, other: Line | None) -> list[str]:
    texts = [line["text"], *(text for text in TEXTS if text != line["text"])]
    known = line["losses"] in _timed(line["cut"])
    minutes = seconds(line["cut"], line["losses"], line["steps"]) / 60 if known else None
    cells = [line["arm"], str(line["seed"]), str(line["steps"])]
    cells += ["" if minutes is None else f"{minutes:.1f}"]
    for text in texts:
        own = line["figures"][text]
        change = "" if other is None else _difference(own, other["figures"][text])
        cells += [f"{own['loss']:.3f}", change, f"{own['kl']:.3f}"]
    if other is None:
        return [*cells, ""]
    target = other["curve"][-1]["eval_loss"]
    curve = [(int(point["step"]), point["eval_loss"]) for point in line["curve"]]
    step = steps_to_reach(curve, target, higher_is_better=False)
    return [*cells, "not" if step is None else f"{step:.0f}"]


def _difference(own: Line, other: Line) -> str:
    """Of the mean over blocks, with its standard error."""
    change = np.subtract(own["block_loss"], other["block_loss"])
    return f"{change.mean():+.3f} ± {change.std(ddof=1) / np.sqrt(len(change)):.3f}"


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
            if found := estimate(changes):
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
