"""``kava report`` of a grid: one HTML file that compares its arms, to look at on any screen.

Everything is inside the file: pictures as data, styles, no scripts, nothing to load. It is made
from the records that ``kava ablate`` left so far; the directories of the runs are not needed.

Left out on purpose: what a difference is worth. The page says by how much and how surely; a verdict
is the reader's.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from kava_jax.experiments.comparison import (
    COSINE,
    EXACT_MATCH,
    GAP,
    LOSS,
    Comparison,
    Difference,
    compare,
)
from kava_jax.experiments.grid import Grid, run_config
from kava_jax.experiments.grid_curves import (
    by_score,
    chosen_arms,
    curve_pictures,
    scatter_pictures,
    score_picture,
)
from kava_jax.experiments.grid_tables import (
    FIGURES_NOTE,
    figures_table,
    further_notes,
    score_notes,
    score_table,
    sets_table,
)
from kava_jax.experiments.heatmap import heat_map
from kava_jax.experiments.page import Picture, Row, Table, number, picture, render, write_page
from kava_jax.experiments.probe_pictures import magnitude_ratios
from kava_jax.experiments.results import Arm, Results, read_results
from kava_jax.experiments.run_layers import layer_map_of
from kava_jax.experiments.samples import Sample, samples_of_arms
from kava_jax.experiments.statistics import in_words
from kava_jax.storage import Place

TEMPLATE, REPORT_NAME = "grid.html.j2", "report.html"


def write_grid_report(directory: Path, out: Place | None = None) -> Place:
    """Write the report of a grid and return its path, by default ``report.html`` in it.

    Raises:
        KavaError: ``directory`` holds no grid, its records are broken or cannot be compared, or
            ``out`` cannot be written.
    """
    results = read_results(directory)
    comparison = compare(results)
    grid, styles = results.grid, chosen_arms(results, comparison)
    shown = _shown(results, comparison)
    page = render(
        TEMPLATE,
        name=grid.name,
        subtitle=_subtitle(results),
        missing=_missing(results),
        declared=_declared(grid, comparison.declared),
        score=score_picture(results, comparison),
        learning=curve_pictures(results, styles, (LOSS, EXACT_MATCH)),
        alignment=curve_pictures(results, styles, (COSINE, GAP)),
        scatters=scatter_pictures(results, comparison, styles),
        scores=score_table(results, comparison),
        notes=further_notes(comparison) + score_notes(grid),
        sets=sets_table(results, comparison),
        figures=figures_table(results, comparison),
        figures_note=FIGURES_NOTE,
        layers=_layers(results, results.arms[shown]) if shown else None,
        samples=_samples(results, shown),
        fields=_fields(grid),
        common=_lines(grid.set),
        pretrain=_lines(grid.pretrain or {}),
        grid=_yaml(grid.model_dump(mode="json")),
        config=_yaml(results.base),
        versions=Table(
            "Versions",
            ["package", "version"],
            [Row(name, [version]) for name, version in results.versions.items()],
            words=True,
        ),
    )
    return write_page(page, directory / REPORT_NAME if out is None else out)


def _subtitle(results: Results) -> str:
    grid = results.grid
    runs = [run for arm in results.arms.values() for run in arm.runs.values()]
    words = [f"{len(grid.arms)} arms x {len(grid.seeds)} seeds ({', '.join(map(str, grid.seeds))})"]
    if grid.score == EXACT_MATCH and runs:
        asked = {int(run.values["exact_match_rows"] or 0) for run in runs}
        words.append(f"{' or '.join(map(str, sorted(asked)))} questions per seed")
    if steps := {int(run.curve[-1]["step"] or 0) for run in runs if run.curve}:
        words.append(f"{' or '.join(map(str, sorted(steps)))} steps")
    score = "exact match" if grid.score == EXACT_MATCH else "held-out loss"
    return (
        f"Report of an experiment grid: {', '.join(words)}. The score is {score}, the baseline is "
        f"the arm {grid.baseline}. Runs with the same seed share their data, their order and the "
        f"student's start."
    )


class Missing(NamedTuple):
    """What has not been run yet: in one sentence, and arm by arm."""

    head: str
    arms: list[str]


def _missing(results: Results) -> Missing | None:
    """None when all has been run."""
    grid, lacking = results.grid, []
    for arm in grid.arms:
        runs = results.arms[arm].runs if arm in results.arms else {}
        if absent := [str(seed) for seed in grid.seeds if seed not in runs]:
            which = f"seed {', '.join(absent)}" if runs else "all seeds"
            lacking.append(f"{arm}: {which}")
    done = sum(len(arm.runs) for arm in results.arms.values())
    head = f"Not finished: {done} of {len(grid.arms) * len(grid.seeds)} runs are here."
    return Missing(head, lacking) if lacking else None


class Declared(NamedTuple):
    """The contrast that was declared before the runs, in words."""

    head: str
    notes: list[str]


def _declared(grid: Grid, found: Difference | None) -> Declared:
    if grid.contrast is None:
        return Declared(
            "No contrast was declared.",
            [
                "With many arms some differ by luck: these figures are for choosing, and what is "
                "chosen is to be confirmed once, on fresh seeds and unseen questions."
            ],
        )
    names = f"{grid.contrast} minus {grid.baseline}"
    if found is None:
        return Declared(f"{names} was declared; they have no seed in common yet.", [])
    if found.contrast is None:
        mean = (
            f"{100 * found.mean:+z.1f} points"
            if grid.score == EXACT_MATCH
            else f"{found.mean:+z.3g}"
        )
        return Declared(f"{names}: {mean}, with one seed only; no interval.", [])
    words = ["Declared before the runs, and tested alone."]
    if found.by_seeds is not None:
        ends = " to ".join(f"{100 * end:+z.1f}" for end in found.by_seeds[1:3])
        words.append(
            f"The interval is a hierarchical bootstrap. Student's, of the seeds' accuracies, which "
            f"is the safer one with few seeds: {ends} points."
        )
    each = ", ".join(
        f"{100 * d:+z.1f}" if grid.score == EXACT_MATCH else f"{d:+z.3g}"
        for d in found.contrast.per_seed
    )
    words.append(f"Seed by seed: {each}.")
    return Declared(f"{in_words(found.contrast, grid.contrast, grid.baseline)}.", words)


def _shown(results: Results, comparison: Comparison) -> str | None:
    """The arm that is looked into: the declared one, else the best that has figures by layer."""
    contrast = results.grid.contrast
    if contrast in results.arms:
        return contrast
    others = [arm for arm in by_score(results.grid, comparison) if arm != results.grid.baseline]
    seen = [arm for arm in others if any(run.layers for run in results.arms[arm].runs.values())]
    return next(iter([*seen, *others]), None)


class Layers(NamedTuple):
    """One arm's figures by layer."""

    arm: str
    pictures: list[Picture]
    table: Table


def _layers(results: Results, arm: Arm) -> Layers | None:
    """Means over the arm's seeds; None where it has no teacher."""
    mean = _mean_layers(arm)
    if not mean:
        return None
    seed = next(iter(arm.runs))
    config = run_config(results.grid, results.base, arm.name, seed, Path())
    pictures, columns = [], []
    for teacher in config.teachers:
        own = {key: row for key, row in mean.items() if key.startswith(f"{teacher.name}/")}
        if not own:
            continue
        layer_map = layer_map_of(teacher, {}, {})
        count = len(next(iter(own.values())))
        # A map that has a name maps all layers of the student in order.
        columns = list(layer_map.student_layers if layer_map else range(count))
        pictures += _layer_pictures(own, teacher.name, columns, len(arm.runs))
    rows = [Row(key, [number(value) for value in row]) for key, row in mean.items()]
    heads = ["student layer", *map(str, columns)]
    caption = f"Held-out figures of {arm.name} by student layer, mean over seeds"
    return Layers(arm.name, pictures, Table(caption, heads, rows))


def _layer_pictures(
    own: Mapping[str, list[float | None]], teacher: str, columns: list[int], seeds: int
) -> list[Picture]:
    over = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    centred = "; ".join(
        f"{title} {', '.join(number(value) for value in own[key])}"
        for title, key in (
            ("keys", f"{teacher}/cos_centered_k"),
            ("values", f"{teacher}/cos_centered_v"),
        )
        if key in own
    )
    found = [
        picture(
            partial(heat_map, own, teacher, columns),
            f"Heat map of keys and values by student layer, {over}. Centred cosine by layer: "
            f"{centred or 'not measured'}. Every number is in the table of all figures by layer.",
            f"Held out, last evaluation, {over}. Brighter is higher. The cosine of the best "
            f"constant vector is what a cosine is to be measured against.",
        )
    ]
    if f"{teacher}/mag_ratio_q50_k" in own and f"{teacher}/mag_ratio_q50_v" in own:
        found.append(
            picture(
                partial(magnitude_ratios, own, teacher, columns),
                f"Length ratios of student and target vectors by student layer, {over}; the "
                f"quantiles are in the table of all figures by layer.",
                f"Length of student vectors beside their targets, from quantile 0.1 to 0.9, the "
                f"median marked; 1 is as long as the target. {over[0].upper()}{over[1:]}.",
            )
        )
    return found


def _mean_layers(arm: Arm) -> dict[str, list[float | None]]:
    """Layer by layer over the seeds; None where a seed's figure was not finite."""
    runs = [run.layers for run in arm.runs.values()]
    shared = [key for key in runs[0] if all(key in layers for layers in runs)]
    found = {}
    for key in shared:
        rows = np.array([layers[key] for layers in runs], np.float64)
        mean = rows.mean(axis=0)
        found[key] = [float(value) if np.isfinite(value) else None for value in mean]
    return found


def _samples(results: Results, shown: str | None) -> list[Sample]:
    """Answers of the baseline and the shown arm to the same questions."""
    arms = [results.arms[name] for name in (results.grid.baseline, shown) if name in results.arms]
    common = [seed for seed in results.grid.seeds if all(seed in arm.runs for arm in arms)]
    if not arms or not common:
        return []
    return samples_of_arms({arm.name: arm.runs[common[0]] for arm in arms})


def _fields(grid: Grid) -> list[tuple[str, list[str]]]:
    return [(arm, _lines(fields)) for arm, fields in grid.arms.items()]


def _lines(fields: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
