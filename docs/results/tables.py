"""The tables of the docs, written from the committed results; tests compare them word for word.

python docs/results/tables.py               rewrite every table in docs/ and in the README
python docs/results/tables.py NAME          print that of NAME.json, or of the grid in NAME/
python docs/results/tables.py prediction    print that of both regimes' grids together
python docs/results/tables.py confirmed     print that of both confirming grids together
python docs/results/tables.py real_pair     print that of the cut students
python docs/results/tables.py handoff_pair  print that of the handoff on the real pair
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from compiled import COMPILED
from handoff_pair_table import HANDOFF_PAIR
from lines import head, page, row
from real_pair_table import REAL_PAIR
from scipy.stats import rankdata
from speed import SPEED

from kava_jax.experiments.contrasts import COSINE, GAP, compare, figure_points
from kava_jax.experiments.results import read_results
from kava_jax.experiments.statistics import RankCorrelation, in_words, interval_of_rho
from kava_jax.experiments.tables import (
    Table,
    figures_table,
    further_notes,
    p_value,
    score_table,
    sets_table,
)
from kava_jax.journal.verdict import collapsed_layers

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent
SECTION = r"(<!-- results:(\w+) -->)\n.*?(<!-- /results:\2 -->)"


def recipes(found: dict[str, Any]) -> list[str]:
    """Real pair: every recipe as a whole, then by layer, before and after."""
    lines = head(
        " | >held-out loss | >cosine | >shuffled | >gap | >centred | >retrieval | >attention "
        "| verdict"
    )
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
    lines = head("recipe | >layer |  | cosine | shuffled | centred | R²")
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
    lines = head("router | teachers: share (gap) | >held-out loss | >exact match")
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


def bias_in_bf16(found: dict[str, Any]) -> list[str]:
    """What a large key bias costs in bfloat16."""
    columns = ("subtracted_keys", "transformers_keys", "kava_keys")
    columns += ("transformers_attention", "kava_attention")
    lines = head(
        "the bias lies in | >times the rest of a key | >bias subtracted | >the same in "
        "transformers | >**read before the bias** | >attention in transformers | >attention "
        "here"
    )
    for one in found["rows"]:
        cells = [f"{one[name]:.1e}" for name in columns]
        lines.append(row(one["place"], one["times"], *cells))
    return [*lines, "", f"Means of {found['seeds']} random layers, {found['tokens']} tokens each."]


def bench_diagnostics(found: dict[str, Any]) -> list[str]:
    """What looking costs."""
    step, probe = found["step_seconds"]["median"], found["probe_seconds"]["median"]
    return [
        f"A step takes {1000 * step:.0f} ms and a probe {1000 * probe:.0f} ms ({found['device']}): "
        f"every {found['diagnose_every']} steps that is {found['share_of_step']:.1%} of the time."
    ]


def padding(found: dict[str, Any]) -> list[str]:
    """What is computed for nothing, and how many shapes are compiled."""
    lines = head(
        "`data.batching` | >padding | >tokens computed, millions | padded lengths | >the "
        "last of them comes at step"
    )
    for name, own in found["batching"].items():
        cells = [f"{own['padding']:.1%}", f"{own['positions'] / 1e6:.2f}"]
        cells += [", ".join(map(str, own["lengths"])), str(own["last_new_length_at_step"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"{found['rows']} rows of {found['shortest']} to {found['longest']} tokens, median "
        f"{found['median']:.0f}; {found['steps']} steps of {found['batch_size']} rows.",
    ]


def grid(directory: Path) -> list[str]:
    """What ``kava ablate`` left: scores, other figures, further sets, and how sure they are."""
    results = read_results(directory)
    comparison = compare(results)
    found = [score_table(results, comparison), figures_table(results, comparison)]
    found += [sets] if (sets := sets_table(results, comparison)) else []
    lines = []
    for table in found:
        lines += [*_markdown(table), ""]
    if comparison.declared and results.grid.contrast:
        said = in_words(comparison.declared, results.grid.contrast, results.grid.baseline)
        lines += [f"Declared before: {said}.", ""]
    for said in further_notes(comparison):
        lines += [said, ""]
    for figure, rank in (("cosine", comparison.cosine), ("gap", comparison.gap)):
        if rank.rho is not None:
            ends = f"{_end(rank.low)} to {_end(rank.high)}"
            lines += [
                f"Rank correlation of held-out {figure} and score: {rank.rho:+.2f} "
                f"(95 % interval {ends}; {rank.n} runs)."
            ]
    return lines


# Ranges that the original's authors recommend (the student's rate is for a pretrained one).
RECOMMENDED = {
    "beta": "0 to 0.05, 0.01 best",
    "mlp_ratio": "0.5 to 2",
    "dropout": "0.05 to 0.15",
    "projector_lr": "5e-4 to 2e-3",
    "student_lr": "1e-5 to 1e-4",
}


def sensitivity(directory: Path) -> list[str]:
    """One setting changed at a time, beside what the original recommends for it."""
    results = read_results(directory)
    comparison = compare(results)
    lines = head(
        "setting | the original recommends | >value | exact match by seed, % | >minus "
        "default, points | >Student's 95 % interval | >cosine | >gap"
    )
    for name, own in comparison.arms.items():
        key, value = next(iter(results.grid.arms[name].items()), ("default", ""))
        setting = key.rpartition(".")[2]
        assert own.score is not None  # every arm of this grid has answered
        scores = ", ".join(f"{100 * x:.1f}" for x in own.score.per_seed.values())
        cells = [setting, RECOMMENDED.get(setting, ""), str(value), scores]
        change = own.difference
        ends = (change.student if change else None) or ()
        cells += [f"{100 * change.mean:+.1f}" if change else ""]
        cells += [" to ".join(f"{100 * end:+.1f}" for end in ends) or ""]
        cells += [f"{own.cosine:.3f}", f"{own.gap:.3f}"]
        lines.append(row(*cells))
    seeds = ", ".join(map(str, results.grid.seeds))
    return [*lines, "", f"Seeds {seeds}; {results.grid.set['train.steps']} steps each."]


def _end(value: float | None) -> str:
    return "?" if value is None else f"{value:+.2f}"


def _markdown(table: Table) -> list[str]:
    heads = head(" | >".join(table.heads))
    return [*heads, *(row(*cells) for cells in table.rows)]


REGIMES = ("scratch", "pretrained")


def prediction() -> list[str]:
    """Which figure ranks the runs of one seed as their score does? A level that belongs to the
    seed or to the regime cannot pose as an answer."""
    lines = head(
        "held-out figure | regime | >rank correlation with exact match | >95 % interval | >runs"
    )
    results = {name: read_results(HERE / name) for name in REGIMES}
    for figure, key in (("cosine", COSINE), ("gap", GAP)):
        groups: dict[str, list[list[tuple[float, float]]]] = {"both": []}
        for name, own in results.items():
            by_seed: dict[int, list[tuple[float, float]]] = {}
            for seed, x, y in figure_points(own, key):
                by_seed.setdefault(seed, []).append((x, y))
            groups[name] = list(by_seed.values())
            groups["both"] += groups[name]
        for regime in (*REGIMES, "both"):
            rho, low, high, runs = rank_correlation_within(groups[regime])
            ends = f"{_end(low)} to {_end(high)}"
            lines.append(f"| {figure} | {regime} | {_end(rho)} | {ends} | {runs} |")
    return lines


def rank_correlation_within(groups: Sequence[Sequence[tuple[float, float]]]) -> RankCorrelation:
    """Spearman's rho of (x, y) within groups, pooled: a difference between groups does not count.

    Ranks are taken within each group, measured from its middle rank and divided by its size. The
    interval is that of one group with n - 1 for each group after the first; groups of one do not
    count.
    """
    members = [np.array(own) for own in groups if len(own) > 1]
    n = sum(map(len, members))
    rank_x, rank_y = (
        [(r - (len(own) + 1) / 2) / len(own) for own in members for r in rankdata(own[:, side])]
        for side in (0, 1)
    )
    if not (any(rank_x) and any(rank_y)):
        return RankCorrelation(None, None, None, n)
    rho = float(np.corrcoef(rank_x, rank_y)[0, 1])
    return RankCorrelation(rho, *interval_of_rho(rho, n - len(members) + 1), n)


PARTS = {"k": "keys", "k_without_bias": "keys less bias", "v": "values"}
RHOS = ("plain", "at_position", "same_token")


def confidence(found: dict[str, Any]) -> list[str]:
    """Length against entropy and surprisal: over all heads, beside yardsticks, head by head."""
    lines = head(
        "model | against | of | rho: median (least to most) | at equal position | and for "
        "the same token | >heads below 0 | >above 0"
    )
    beside = head(
        "model | against | of | >length | >one coordinate | >whole direction | >direction "
        "and length | >with position | >with frequency"
    )
    yardsticks = ("coordinate", "direction", "direction_and_length")
    for name, heads, _ in _confidence_parts(found):
        rhos = {kind: [own[0] for own in heads[kind] if own[0] is not None] for kind in RHOS}
        cells = [f"{median(x):+.2f} ({min(x):+.2f} to {max(x):+.2f})" for x in rhos.values()]
        ends = [own[1:] for own in heads["same_token"] if own[0] is not None]
        cells += [f"{sum(high < 0 for _, high in ends)} of {len(ends)}"]
        cells += [f"{sum(low > 0 for low, _ in ends)} of {len(ends)}"]
        lines.append(f"{name} {' | '.join(cells)} |")
        sizes = [map(abs, rhos["plain"]), *(heads[what] for what in yardsticks)]
        sizes += [map(abs, heads[f"with_{what}"]) for what in ("position", "frequency")]
        beside.append(f"{name} {' | '.join(f'{median(x):.2f}' for x in sizes)} |")
    return [*lines, "", *beside, "", *_confidence_heads(found), "", _confidence_counts(found)]


def _confidence_parts(found: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A table's first cells, and the figures of all heads without and with the first tokens."""
    for model, outcomes in found["models"].items():
        for outcome, settings in outcomes.items():
            for part in settings["without_sinks"]["parts"]:
                kept, whole = (
                    {name: [x for layer in layers for x in layer] for name, layers in own.items()}
                    for own in (
                        settings[kind]["parts"][part] for kind in ("without_sinks", "with_sinks")
                    )
                )
                yield f"| {model} | {outcome} | {PARTS[part]} |", kept, whole


def _confidence_counts(found: dict[str, Any]) -> str:
    counts, moved = [], 0.0
    for model, outcomes in found["models"].items():
        for outcome, settings in outcomes.items():
            low, middle, high = settings["nats_q10_q50_q90"]
            own = settings["without_sinks"]
            counts.append(
                f"{model}, {outcome}: {own['tokens']} tokens of {own['texts']} texts, median "
                f"{middle:.2g} nats (a tenth below {low:.2g}, a tenth above {high:.2g})"
            )
    for _, heads, whole in _confidence_parts(found):
        for kind in RHOS:
            pairs = zip(heads[kind], whole[kind], strict=True)
            moved = max(moved, *(abs(a[0] - b[0]) for a, b in pairs if a[0] is not None))
    return (
        f"{'; '.join(counts)}. With the first {found['sinks']} tokens of each text counted as well "
        f"no rho moves by more than {moved:.2f}."
    )


def _confidence_heads(found: dict[str, Any]) -> list[str]:
    lines = head("model | >layer | >head | keys | keys, same token | values | values, same token")
    for model, outcomes in found["models"].items():
        parts = outcomes["entropy"]["without_sinks"]["parts"]
        columns = [parts[part][kind] for part in ("k", "v") for kind in ("plain", "same_token")]
        for layer, of_heads in enumerate(columns[0]):
            for place in range(len(of_heads)):
                cells = [
                    "" if rho is None else f"{rho:+.2f} ({low:+.2f} to {high:+.2f})"
                    for rho, low, high in (column[layer][place] for column in columns)
                ]
                lines.append(f"| {model} | {layer} | {place} | {' | '.join(cells)} |")
    return lines


def bench_arms(found: dict[str, Any]) -> list[str]:
    """The step of every arm, fastest first."""
    lines = head(f"arm | >median, ms | >least to most | >times {found['baseline']}")
    steps = found["step_seconds"]
    for arm in sorted(steps, key=lambda arm: steps[arm]["median"]):
        own = {key: 1000 * steps[arm][key] for key in ("median", "least", "most")}
        ends = f"{own['least']:.1f} to {own['most']:.1f}"
        ratio = found["relative"][arm]
        lines.append(f"| {arm} | {own['median']:.1f} | {ends} | {ratio:.2f} |")
    rounds, batch = steps[found["baseline"]]["rounds"], found["batch"]
    return [
        *lines,
        "",
        f"{rounds} alternating rounds; {batch['rows']} rows of {batch['tokens_of_a_row']} tokens; "
        f"{found['device']}.",
    ]


def confirmed() -> list[str]:
    """What the confirming grids say of each comparison, in points of exact match."""
    lines = head("student | comparison | >points | >95 % interval | >Student's 95 % interval | >p")
    for regime in REGIMES:
        results = read_results(HERE / f"{regime}_confirm")
        comparison, grid = compare(results), results.grid
        found = {(arm, grid.baseline): own.difference for arm, own in comparison.arms.items()}
        found |= comparison.further
        for (arm, other), own in found.items():
            if own is None or own.interval is None or own.student is None:
                continue
            declared = (arm, other) == (grid.contrast, grid.baseline)
            cells = [regime, f"{arm} minus {other}" + (" (declared)" if declared else "")]
            cells += [f"{100 * own.mean:+.1f}"]
            for low, high in (own.interval, own.student):
                cells += [f"{100 * low:+.1f} to {100 * high:+.1f}"]
            lines.append(f"| {' | '.join(cells)} | {p_value(own)} |")
    return lines


PLANS = ("plan_1_h100", "plan_16_v5e", "plan_64_v5e", "plan_256_v5e")
CUT_PLANS = ("plan_cut_14b_8_h100", "plan_cut_7b_4_h100")
FAMILY_PLANS = (
    "plan_30b_a3b_8_h100",
    "plan_30b_a3b_16_v5e",
    "plan_gemma3_27b_8_h100",
    "plan_gemma3_27b_32_v5e",
)


def plans() -> list[str]:
    """The named job planned for several numbers of devices; bytes are those of one device."""
    return [*_planned(PLANS, jobs=False), "", _one_device()]


def cut_plans() -> list[str]:
    """Students cut from a 14B and a 7B teacher."""
    return _planned(CUT_PLANS)


def family_plans() -> list[str]:
    """A mixture of experts that teaches, and layers of two kinds."""
    return _planned(FAMILY_PLANS)


def _planned(names: Sequence[str], *, jobs: bool = True) -> list[str]:
    lines = head(
        ("job | " if jobs else "")
        + "devices | >rows | >weights and moments, GB | >temporaries, GB | >by the CPU "
        "compiler | >peak, GB | verdict | >FLOPs over the floor | >gathered, GB | >scattered "
        "or summed, GB"
    )
    for name in names:
        plan = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        held = sum(plan["held"].values()) - plan["held"]["batch"]
        spans = [
            _gigabytes(*(plan[part][end] for end in ("least", "most")))
            for part in ("temporaries", "estimated", "peak")
        ]
        sent = plan["messages"]
        summed = sent.get("all-reduce", 0.0) + sent.get("reduce-scatter", 0.0)
        cells = [plan["name"]] if jobs else []
        cells += [f"{plan['devices']} x {plan['chip']}", str(plan["rows"]), f"{held / 1e9:.2f}"]
        cells += [*spans, f"{plan['verdict']} in {plan['hbm'] / 1e9:g} GB"]
        cells += [f"{plan['flops_over_floor']:.2f}", f"{sent.get('all-gather', 0.0) / 1e9:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {summed / 1e9:.2f} |")
    return lines


def _one_device() -> str:
    """The original's claim, answered."""
    plan = json.loads((HERE / f"{PLANS[0]}.json").read_text(encoding="utf-8"))
    surely, at_best = plan["largest_batch"]
    least, most = (one["fits"]["rows"] for one in plan["boundaries"])
    return (
        f"Does 14B → 1.5B fit on one {plan['chip']}? Yes: {least} rows of {plan['length']} tokens "
        f"in the memory that JAX takes by itself, {most} with XLA_PYTHON_CLIENT_MEM_FRACTION=.92, "
        f"by the GPU's compiler; by the estimate in {plan['hbm'] / 1e9:g} GB {surely} surely and "
        f"{at_best} at best."
    )


def _gigabytes(least: float, most: float) -> str:
    low, high = f"{least / 1e9:.2f}", f"{most / 1e9:.2f}"
    return low if low == high else f"{low} to {high}"


TOGETHER = {
    "prediction": prediction,
    "confirmed": confirmed,
    "plans": plans,
    "cut_plans": cut_plans,
    "family_plans": family_plans,
    **REAL_PAIR,
    **HANDOFF_PAIR,
}


def demo_handoff(found: dict[str, Any]) -> list[str]:
    """Who answers how well, and how fast, in ``kava demo --handoff``."""
    lines = head("answers | >held-out loss | >exact match | >ms an answer")
    for own in found["models"]:
        right = f"{own['exact_match_strict']:.1%} ± {own['exact_match_stderr']:.1%}"
        each = f"{1000 * own['seconds_per_answer']:.2f}"
        lines.append(row(own["model"], f"{own['eval_loss']:.4f}", right, each))
    return lines


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "recipes": recipes,
    "demo_handoff": demo_handoff,
    "teachers": teachers,
    "auto_share": auto_share,
    "bias_in_bf16": bias_in_bf16,
    "bench_diagnostics": bench_diagnostics,
    "bench_arms": bench_arms,
    "padding": padding,
    "confidence": confidence,
    **SPEED,
    **COMPILED,
}


def table(name: str) -> str:
    """The Markdown of one result."""
    if name in TOGETHER:
        return page(TOGETHER[name]())
    if (HERE / name).is_dir():
        show = sensitivity if name == "sensitivity" else grid
        return page(show(HERE / name)).rstrip("\n")
    return page(TABLES[name](json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))))


def written_here(name: str) -> bool:
    """Whether this script writes the table; two of the README's are written by hand, and tested."""
    return name in TOGETHER or name in TABLES or (HERE / name).is_dir()


def filled(text: str) -> str:
    """A page's text with every table between ``results:`` markers written anew."""

    def section(found: re.Match[str]) -> str:
        if not written_here(found[2]):
            return found[0]
        return f"{found[1]}\n{table(found[2])}\n{found[3]}"

    return re.sub(SECTION, section, text, flags=re.S)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(table(sys.argv[1]))
    else:
        for path in [*PAGES.glob("*.md"), PAGES.parent / "README.md"]:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
