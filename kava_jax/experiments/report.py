"""``kava report``: one HTML file about a run or a grid, to look at on any screen and to pass on.

Everything is inside the file: pictures as data, styles, no scripts, nothing to load. It is made
from what a run left behind (manifest, metrics, answers, calibration), or from a grid's table of
results; what is still going, or has no teacher, gets the parts that exist. The words are in the
templates among the package's assets. What a difference is worth is left to the reader.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from kava_jax.alignment.layer_map import LayerMap
from kava_jax.config.pair import TeacherConfig
from kava_jax.config.run import Config
from kava_jax.diagnostics import alignment_gap
from kava_jax.errors import KavaError
from kava_jax.evaluation.exact_match import ExactMatch
from kava_jax.experiments import pictures, tables
from kava_jax.experiments.contrasts import COSINE, EXACT_MATCH, GAP, LOSS, compare
from kava_jax.experiments.grid import run_config
from kava_jax.experiments.pictures import Chart, Line, number
from kava_jax.experiments.results import Results, read_results
from kava_jax.experiments.statistics import in_words, student_interval
from kava_jax.journal.manifest import read_manifest
from kava_jax.journal.metrics_file import METRICS_NAME
from kava_jax.journal.verdict import collapse_signs, collapsed_layers, verdict
from kava_jax.runs.evaluate import read_answers
from kava_jax.runs.explain import explain
from kava_jax.runs.reopen import calibration_path, read_calibration, recorded_config
from kava_jax.storage import Place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_NAME = "report.html"
# Dots of a picture per CSS pixel, for sharp screens.
DENSITY = 1.5
# Of a grid: what is drawn over the steps, and which levels are marked. Exact match is in percent.
AXES = {
    LOSS: "held-out loss (nats per token)",
    EXACT_MATCH: "exact match (%)",
    COSINE: "held-out cosine",
    GAP: "held-out alignment gap",
}
LEVELS = {COSINE: pictures.VERDICTS, GAP: pictures.LEAST}
SCALE = {EXACT_MATCH: 100}


def write_report(
    run_dir: Place,
    out: Place | None = None,
    answered: Mapping[str, ExactMatch] = MappingProxyType({}),
) -> Place:
    """Write the report of a run and return its path, by default ``report.html`` in the run.

    ``answered`` are the same questions answered by several models, by their names. Raises
    KavaError: ``run_dir`` is no run, or one of its files is broken.
    """
    if not run_dir.is_dir():
        raise KavaError(f"run={str(run_dir)!r} is no directory; name one made by `kava train`")
    manifest, log = read_manifest(run_dir), pictures.read_log(run_dir / METRICS_NAME)
    config = recorded_config(run_dir)
    kept = config.needs_calibration and calibration_path(run_dir).is_file()
    evaluations, calibration = log["eval"], read_calibration(run_dir) if kept else {}
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    names, measured = [teacher.name for teacher in config.teachers], log["diagnostics"]
    page = _render(
        "report.html.j2",
        manifest=manifest,
        config=config,
        step=max((record["step"] for record in (*log["train"], *evaluations)), default=0),
        first=first,
        last=last,
        verdicts=[_verdict(of, last) for of in ("", *(names if len(names) > 1 else ()))],
        loss=pictures.loss_chart({"loss": log}),
        alignment=pictures.alignment_chart(log),
        gradients=pictures.gradient_chart(log),
        probed=config.train.diagnose_every,
        cost=measured[-1].get("probe_share_of_time") if measured else None,
        evaluations=_by_owner(first, last),
        answers=read_answers(run_dir),
        answered=answered,
        explained=_explained(config),
        teachers=[
            _by_layer(teacher, last.get("layers", {}), calibration.get(teacher.name))
            for teacher in config.teachers
        ],
    )
    return _write(page, out or run_dir / REPORT_NAME)


def write_grid_report(directory: Path, out: Place | None = None) -> Place:
    """Write the report of a grid and return its path, by default ``report.html`` in it.

    Raises KavaError: ``directory`` holds no grid, or its results are broken or cannot be compared.
    """
    results = read_results(directory)
    comparison, grid, arms = compare(results), results.grid, results.arms
    # Drawn as lines are the baseline, the declared contrast, and the arms with the best scores.
    best = [grid.baseline, grid.contrast, *tables.by_score(grid, comparison)]
    chosen = [arm for arm in dict.fromkeys(best) if arm in arms][: len(pictures.COLOURS)]
    # Looked into is the declared arm, else the best that has figures by layer.
    others = [arm for arm in chosen if arm != grid.baseline]
    seen = [
        arm
        for arm in others
        if arm == grid.contrast or any(run.layers for run in arms[arm].values())
    ]
    shown = next(iter([*seen, *others]), None)
    page = _render(
        "grid.html.j2",
        results=results,
        grid=grid,
        comparison=comparison,
        ordered=tables.by_score(grid, comparison),
        marks=tables.marks(grid),
        charts=[_bands(results, chosen, key) for key in AXES],
        tables=[
            table(results, comparison)
            for table in (tables.score_table, tables.figures_table, tables.sets_table)
        ],
        notes=tables.further_notes(comparison),
        shown=shown,
        layers_of_shown=_mean_layers(results, shown) if shown else [],
        asked=_same_questions(results, [grid.baseline, shown]),
    )
    return _write(page, out or directory / REPORT_NAME)


def _verdict(of: str, last: Mapping[str, Any]) -> dict[str, Any]:
    """The last evaluation of one teacher (or overall): a word, what it rests on, and signs of
    collapse. Before the first step there is neither word nor sign, without a cosine nothing."""
    figures = {key.removeprefix("eval_"): value for key, value in last.items()}
    start = f"{of}/" if of else ""
    own = {k.removeprefix(start): v for k, v in figures.items() if k.startswith(start)}
    cosine, shuffled = own.get("cos_sim"), own.get("cos_shuffled")
    if cosine is None:
        return {"of": of, "cosine": None, "signs": []}
    gap = alignment_gap(cosine, shuffled)
    # All teachers are compared on the same tokens, so their number is not each one's own.
    tokens = figures.get("sampled_tokens")
    signs = collapse_signs(own | {"alignment_gap": gap, "sampled_tokens": tokens})
    signs += [
        f"By themselves the {what} of mapped layers {', '.join(map(str, rows))} have collapsed."
        for what, rows in collapsed_layers(figures.get("layers", {})).items()
        if of in ("", what.rpartition(" ")[0])
    ]
    found = {"of": of, "cosine": cosine, "shuffled": shuffled, "gap": gap}
    if figures["step"] == 0:
        return found | {"word": "", "signs": []}
    return found | {"word": verdict(cosine, shuffled), "signs": signs}


def _by_owner(first: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of two evaluations: overall (""), by teacher, and by further held-out set.

    Each is its metric's own name and its values, by the name without the owner.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in {**first, **last}:
        if key not in ("step", "kind", "layers"):
            of, _, name = key.removeprefix("eval_").rpartition("/")
            values = [first.get(key)] + ([last.get(key)] if last is not first else [])
            found.setdefault(of, {})[name.removeprefix("eval_")] = key, values
    return found


def _explained(config: Config) -> list[str]:
    """What the config does, a paragraph per question, with the models as they are here now."""
    try:
        return explain(config).split("\n\n")
    except KavaError as error:  # a page does not fail because its run's models have changed
        return [f"The models that are here now do not fit the config: {error}"]


def _by_layer(
    teacher: TeacherConfig, layers: Mapping[str, Any], scores: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One teacher's rows by figure, the student layers that their columns are, and the layer map
    and scores of a calibration."""
    start, setting = f"{teacher.name}/", teacher.layer_map
    own = {k.removeprefix(start): row for k, row in layers.items() if k.startswith(start)}
    for part in ("k", "v"):
        student, target = (own.get(f"{side}_rank_{part}", ()) for side in ("student", "target"))
        if student and target:
            pairs = zip(student, target, strict=True)
            own[f"rank_share_{part}"] = [s / t if s is not None and t else None for s, t in pairs]
    columns = sorted(student for _, student in setting) if isinstance(setting, tuple) else []
    found = {"teacher": teacher, "layers": own, "scores": scores, "map": []}
    if scores is not None:
        layer_map = LayerMap.from_dict(scores["layer_map"], f"calibration of {teacher.name}")
        columns, found["map"] = list(layer_map.student_layers), layer_map.rows()
    # A map that has a name maps all layers of the student in order.
    count = len(next(iter(own.values()), ()))
    return found | {"columns": columns if len(columns) == count else list(range(count))}


def _mean_layers(results: Results, arm: str) -> list[dict[str, Any]]:
    """By teacher of an arm, its figures by layer over the seeds; None where one was not finite."""
    runs = [run.layers for run in results.arms[arm].values()]
    shared = [key for key in runs[0] if all(key in layers for layers in runs)]
    # As float64 a None is NaN. It makes its mean NaN, which becomes None again.
    rows = {key: np.array([layers[key] for layers in runs], np.float64) for key in shared}
    means = {
        key: [float(x) if np.isfinite(x) else None for x in row.mean(axis=0)]
        for key, row in rows.items()
    }
    # Any seed and any directory will do, because only the arm's teachers are read.
    config = run_config(results.grid, results.base, arm, results.grid.seeds[0], Path())
    found = [_by_layer(teacher, means) for teacher in config.teachers]
    return [teacher for teacher in found if teacher["layers"]]


def _same_questions(results: Results, arms: Sequence[str | None]) -> list[Any]:
    """A run of each of the arms with one seed, whose questions are the same."""
    runs = [results.arms[arm] for arm in arms if arm in results.arms]
    common = [[own[s] for own in runs] for s in results.grid.seeds if all(s in r for r in runs)]
    return common[0] if runs and common else []


def _bands(results: Results, chosen: Sequence[str], key: str) -> Chart:
    """Mean of a figure over seeds at the steps that all seeds have, arm by arm.

    The band is Student's 95 % interval of the mean; of two seeds it would be wider than any
    picture, and their range is drawn. In percent it ends at 0 and 100.
    """
    lines, scale = [], SCALE.get(key, 1)
    for place, arm in enumerate(chosen):
        points = [pictures.course(run.curve, key) for run in results.arms[arm].values()]
        steps = sorted(set(points[0]).intersection(*points[1:]))
        values = {s: np.array([scale * own[s] for own in points], np.float64) for s in steps}
        ends = {}
        if len(points) == 2:
            ends = {step: (float(own.min()), float(own.max())) for step, own in values.items()}
        elif len(points) > 2:
            ends = {step: student_interval(own) for step, own in values.items()}
        if key in SCALE:
            ends = {step: (max(low, 0.0), min(high, 100.0)) for step, (low, high) in ends.items()}
        if len(steps) > 1:  # the last evaluation alone is in the tables
            means = {step: float(own.mean()) for step, own in values.items()}
            lines.append(Line(arm, means, place, ends=ends))
    return Chart(AXES[key], lines, "log" if key == LOSS else "linear", LEVELS.get(key, {}))


def _render(template: str, **parts: Any) -> str:
    """The page that one of the package's templates makes; every text among its parts is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Questions and answers may hold HTML, hence autoescape. A name that a template misspells is
    # an error by StrictUndefined, and not an empty place on the page.
    environment = Environment(
        loader=PackageLoader("kava_jax", "assets"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "number": number,
        "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
        "image": _image,
    }
    environment.globals |= {"in_words": in_words}
    return environment.get_template(template).render(parts)


def _image(figure: "Figure") -> dict[str, Any]:
    """A picture as the attributes of an ``img``: a PNG as data, and its size in CSS pixels."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    width, height = (round(size * pictures.DPI / DENSITY) for size in figure.get_size_inches())
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {"src": source, "width": width, "height": height}


def _write(page: str, target: Place) -> Place:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
