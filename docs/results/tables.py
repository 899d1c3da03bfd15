"""The tables of the docs, written from the committed results; tests compare them word for word.

python docs/results/tables.py recipes        | teachers | auto_share | bench_diagnostics
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kava_jax.verdict import collapsed_layers

HERE = Path(__file__).resolve().parent


def recipes(found: dict[str, Any]) -> list[str]:
    """Real pair: every recipe as a whole, then by layer, before and after."""
    lines = [
        "| | held-out loss | cosine | shuffled | gap | centred | retrieval | attention | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    figures = ("cos_sim", "cos_shuffled", "alignment_gap", "cos_centered", "retrieval")
    for recipe, stages in found["recipes"].items():
        for stage in ("before", "after"):
            own = stages[stage]
            numbers = [f"{own['loss']:.4f}", *(f"{own[name]:.3f}" for name in figures)]
            attention = own["attention_cos"]
            numbers.append("" if attention is None else f"{attention:.3f}")
            word = own["verdict"]
            lost = collapsed_layers({f"t/{name}": row for name, row in own["layers"].items()})
            if lost and word != "collapsed":
                parts = [
                    f"{what.split()[1]} {', '.join(map(str, rows))}" for what, rows in lost.items()
                ]
                word += f"; collapsed: {'; '.join(parts)}"
            lines.append(f"| {recipe}, {stage} | {' | '.join(numbers)} | {word} |")
    alone = found["cross_entropy"]["loss"]
    lines.append(f"| cross-entropy alone, after | {alone:.4f} | | | | | | | |")
    lines += [
        "",
        f"{found['steps_before']} steps before, {found['steps']} steps under each recipe.",
    ]
    return [*lines, "", *_recipe_layers(found)]


def _recipe_layers(found: dict[str, Any]) -> list[str]:
    lines = [
        "| recipe | layer | | cosine | shuffled | centred | R² |",
        "| --- | ---: | --- | --- | --- | --- | --- |",
    ]
    for recipe, stages in found["recipes"].items():
        before, after = (stages[stage]["layers"] for stage in ("before", "after"))
        fits = {"before": found["r2_before"], "after": stages["r2_after"]}
        for part, title in (("k", "keys"), ("v", "values")):
            for layer in range(len(before["cos_sim_k"])):
                cells = [
                    f"{before[f'{name}_{part}'][layer]:.3f} → {after[f'{name}_{part}'][layer]:.3f}"
                    for name in ("cos_sim", "cos_shuffled", "cos_centered")
                ]
                fit = f"{fits['before'][part][layer]:.3f} → {fits['after'][part][layer]:.3f}"
                lines.append(f"| {recipe} | {layer} | {title} | {' | '.join([*cells, fit])} |")
    return lines


def teachers(found: dict[str, Any]) -> list[str]:
    """One, two and three teachers under every router."""
    lines = [
        "| router | teachers: share (gap) | held-out loss | exact match |",
        "| --- | --- | ---: | ---: |",
    ]
    for run in found["runs"]:
        parts = ", ".join(
            f"{name}: {own['share']:.2f} ({own['alignment_gap']:.2f})"
            for name, own in run["teachers"].items()
        )
        score = f"{100 * run['exact_match']:.1f} %"
        lines.append(f"| {run['router']} | {parts} | {run['loss']:.4f} | {score} |")
    return [*lines, "", f"{found['steps']} steps each."]


def auto_share(found: dict[str, Any]) -> list[str]:
    """What share the gradient really had."""
    windows = ", ".join(f"{value:.2f}" for value in found["median_by_window"])
    return [
        f"Asked: {found['asked']}. Median of every {found['window_steps']} of {found['steps']} "
        f"steps: {windows}. Of {found['probes']} single batches "
        f"{found['probes_within_half_and_double']} lay between half and double of what was asked."
    ]


def bench_diagnostics(found: dict[str, Any]) -> list[str]:
    """What looking costs."""
    step, probe = found["step_seconds"]["median"], found["probe_seconds"]["median"]
    return [
        f"A step takes {1000 * step:.0f} ms and a probe {1000 * probe:.0f} ms ({found['device']}): "
        f"every {found['diagnose_every']} steps that is {found['share_of_step']:.1%} of the time."
    ]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "recipes": recipes,
    "teachers": teachers,
    "auto_share": auto_share,
    "bench_diagnostics": bench_diagnostics,
}


def table(name: str) -> str:
    """The Markdown of one result."""
    return "\n".join(TABLES[name](json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    print(table(sys.argv[1]))
