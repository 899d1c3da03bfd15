"""A run's evaluations for a reader: the verdict, headline figures, and all of them as a table.

Left out on purpose: figures by layer (``heatmap``), and what training logged (``curves``).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kava_jax.experiments.page import Row, Table, number
from kava_jax.verdict import alignment_gap, collapse_signs, collapsed_layers, verdict

# Evaluated figures in words, most important first; what is not here goes by its own name.
NAMES = {
    "loss": "held-out loss, nats per token",
    "exact_match_strict": "exact match",
    "exact_match_flexible": "exact match of the last number",
    "exact_match_stderr": "standard error of exact match",
    "exact_match_rows": "questions asked",
    "cos_sim": "cosine",
    "cos_shuffled": "cosine, unrelated examples",
    "alignment_gap": "alignment gap",
    "cos_k": "cosine of keys",
    "cos_v": "cosine of values",
    "cos_centered": "centred cosine",
    "cos_constant": "cosine of the best constant vector",
    "cka": "CKA",
    "retrieval": "share of tokens retrieved",
    "retrieval_centered": "share retrieved, centred",
    "attention_cos": "cosine of attention outputs",
    "mag_ratio": "mean length, student / target",
    "mag_ratio_q10": "length ratio, quantile 0.1",
    "mag_ratio_q50": "length ratio, median",
    "mag_ratio_q90": "length ratio, quantile 0.9",
    "student_rank": "effective rank, student",
    "target_rank": "effective rank, target",
    "student_min_std": "smallest standard deviation, student",
    "target_min_std": "smallest standard deviation, target",
    "student_top3": "norm share of 3 dimensions, student",
    "target_top3": "norm share of 3 dimensions, target",
    "route": "share of the routing",
    "router_entropy": "entropy of the routing",
    "sampled_tokens": "tokens sampled",
}

Records = Sequence[Mapping[str, Any]]


class Verdict(NamedTuple):
    """A word (empty where there is none), what it stands on, and signs of collapse."""

    of: str
    word: str
    sentence: str
    signs: list[str]


def verdicts(evaluations: Records, teachers: Sequence[str]) -> list[Verdict]:
    """The last evaluation in words, overall and, of several teachers, for each."""
    if not teachers:
        text = "No teacher: the student learns by cross-entropy alone, so nothing is aligned."
        return [Verdict("", "", text, [])]
    if not evaluations:
        return [Verdict("", "", "There is no evaluation yet, and so no verdict.", [])]
    figures = {key.removeprefix("eval_"): value for key, value in evaluations[-1].items()}
    several = len(teachers) > 1
    found = [_verdict("All teachers together" if several else "", figures, figures)]
    for teacher in teachers if several else ():
        prefix = f"{teacher}/"
        own = {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}
        found.append(_verdict(teacher, own, figures))
    return found


def _verdict(of: str, own: Mapping[str, Any], figures: Mapping[str, Any]) -> Verdict:
    step, cosine, shuffled = figures["step"], own.get("cos_sim"), own.get("cos_shuffled")
    if cosine is None:
        return Verdict(of, "", f"At step {step} the cosine is not a number: no verdict.", [])
    gap = alignment_gap(cosine, shuffled)
    sentence = f"Held-out cosine {cosine:.3f} at step {step}"
    if gap is None:
        sentence += "; without a shuffled cosine to compare it with."
    else:
        sentence += (
            f"; unrelated examples reach {shuffled:.3f} (shuffled), so the gap is {gap:.3f}."
        )
    if step == 0:
        return Verdict(of, "", f"{sentence} Nothing has been learnt yet: no verdict.", [])
    tokens = figures.get("sampled_tokens")
    signs = collapse_signs(
        cos_shuffled=shuffled,
        gap=gap,
        tokens=None if tokens is None else int(tokens),
        **{k: own.get(k) for k in ("cos_centered", "retrieval", "student_rank", "target_rank")},
    )
    signs += [
        f"By themselves the {what} of mapped layers {', '.join(map(str, rows))} have collapsed."
        for what, rows in collapsed_layers(figures.get("layers", {})).items()
        if of in ("", what.rpartition(" ")[0])
    ]
    return Verdict(of, verdict(cosine, shuffled), sentence, signs)


class Card(NamedTuple):
    """A headline figure at the last evaluation, and at the first in words."""

    name: str
    last: str
    first: str


def cards(evaluations: Records) -> list[Card]:
    """Loss, exact match, cosine and gap, those that were measured."""
    found = []
    for key in ("eval_loss", "exact_match_strict", "eval_cos_sim", "eval_alignment_gap"):
        if key not in (evaluations[-1] if evaluations else {}):
            continue
        begun = evaluations[0]
        compared = len(evaluations) > 1 and key in begun
        first = f"{number(begun[key])} at step {begun['step']}" if compared else ""
        found.append(Card(_name(key), number(evaluations[-1][key]), first))
    return found


def first_and_last(evaluations: Records, teacher: str | None = None) -> Table | None:
    """All figures of the first and the last evaluation side by side; None where there are none.

    ``teacher`` asks for that teacher's own figures, which are logged where there are several.
    """
    shown = [*evaluations[:1], *evaluations[1:][-1:]]
    keys = dict.fromkeys(
        key
        for record in shown
        for key in record
        if key not in ("step", "kind", "layers") and _teacher(key) == teacher
    )
    if not keys:
        return None
    order = {name: place for place, name in enumerate(NAMES)}
    rows = [
        Row(_name(key), [number(record.get(key)) for record in shown], key)
        for key in sorted(keys, key=lambda key: order.get(_bare(key), len(order)))
    ]
    heads = ["figure", *(f"step {record['step']}" for record in shown)]
    of = "" if teacher is None else f" of {teacher}"
    return Table(f"First and last evaluation{of}, on held-out rows", heads, rows)


# Of a further held-out set, with their names as heads of narrow columns.
FURTHER = {
    "eval_loss": "loss",
    "exact_match_strict": "exact match",
    "exact_match_flexible": "last number",
    "exact_match_rows": "questions",
}


def further_sets(evaluations: Records, names: Sequence[str]) -> Table | None:
    """The scores of further held-out sets in the last evaluation; None where there are none."""
    last = evaluations[-1] if evaluations else {}
    rows = [
        Row(name, [number(last.get(f"{name}/{key}")) for key in FURTHER])
        for name in names
        if any(f"{name}/{key}" in last for key in FURTHER)
    ]
    if not rows:
        return None
    heads = ["set", *FURTHER.values()]
    return Table(f"Further held-out sets, step {last['step']}", heads, rows)


def _name(key: str) -> str:
    return NAMES.get(_bare(key), _bare(key))


def _bare(key: str) -> str:
    """A metric's name without its teacher and ``eval_``."""
    return key.removeprefix("eval_").rpartition("/")[2]


def _teacher(key: str) -> str | None:
    return key.removeprefix("eval_").rpartition("/")[0] or None
