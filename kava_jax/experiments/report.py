"""``kava report``: one HTML file about one run, to look at on any screen and to pass on.

Everything is inside the file: pictures as data, styles, no scripts, nothing to load. It is made
from what the run left behind (manifest, metrics, answers, calibration); a run that is still going,
or has no teacher, gets the parts that exist. Numbers that were not finite are shown as a dash.

Left out on purpose: comparing runs (``grid_report``), and any look at weights or data.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from kava_jax.alignment.layer_map import CALIBRATED_MAPS, LayerMap
from kava_jax.config import AutoShare, Config, TeacherConfig
from kava_jax.config_file import parse_config
from kava_jax.errors import KavaError
from kava_jax.experiments.curves import alignment_curve, learning_curve
from kava_jax.experiments.evaluated import cards, first_and_last, further_sets, verdicts
from kava_jax.experiments.heatmap import Layers, heat_map
from kava_jax.experiments.layer_picture import layer_picture
from kava_jax.experiments.page import Picture, Row, Table, number, picture, render, write_page
from kava_jax.experiments.probe_pictures import gradient_curve, magnitude_ratios
from kava_jax.experiments.run_layers import depths_at_hand, layer_map_of, read_calibration
from kava_jax.experiments.samples import samples_of_everyone, samples_of_run
from kava_jax.runs.explain import MAPS
from kava_jax.runs.samples import Answered
from kava_jax.storage import Place, check_access
from kava_jax.training.manifest import read_manifest
from kava_jax.training.metrics_file import METRICS_NAME, Kind, read_metrics

TEMPLATE, REPORT_NAME = "report.html.j2", "report.html"
# Scores of a calibration by mapped layer, and overall.
SCORES = {"r2_k": "R² keys", "r2_v": "R² values", "cka_k": "CKA keys", "cka_v": "CKA values"}
HELD_OUT = {
    "cos_sim": "cosine",
    "cos_shuffled": "cosine of unrelated examples",
    "cos_centered": "centred cosine",
    "retrieval": "share of tokens retrieved",
}


class Run(NamedTuple):
    """What a run left behind; records by step, a step logged twice as it was last."""

    directory: Place
    manifest: dict[str, Any]
    config: Config
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    probes: list[dict[str, Any]]


def write_report(
    run_dir: Place, out: Place | None = None, answered: Sequence[Answered] = ()
) -> Place:
    """Write the report of a run and return its path, by default ``report.html`` in the run.

    ``answered`` are the same questions answered by several models (``runs.samples``).

    Raises:
        KavaError: ``run_dir`` is not a run, one of its files is broken, or ``out`` cannot be
            written.
    """
    check_access(run_dir, "run")
    run = _read(run_dir)
    page = render(
        TEMPLATE,
        name=run.config.run.name,
        subtitle=_subtitle(run),
        verdicts=verdicts(run.evaluations, [teacher.name for teacher in run.config.teachers]),
        cards=cards(run.evaluations),
        curves=_curves(run),
        evaluations=first_and_last(run.evaluations),
        further=further_sets(run.evaluations, list(run.config.eval.sets)),
        samples=[*([samples_of_everyone(answered)] if answered else []), *samples_of_run(run_dir)],
        teachers=_teachers(run),
        probes=_probes(run) if run.config.teachers else None,
        config=yaml.safe_dump(run.manifest["config"], sort_keys=False, allow_unicode=True),
        starts=_starts(run.manifest.get("starts", [])),
        fingerprints=_fingerprints(run.manifest["fingerprints"]),
    )
    return write_page(page, run_dir / REPORT_NAME if out is None else out)


def _read(run_dir: Place) -> Run:
    if not run_dir.is_dir():
        raise KavaError(f"run={str(run_dir)!r} is no directory; name one made by `kava train`")
    manifest = read_manifest(run_dir)
    # Overrides and recipes are filled in in place: the manifest's own config is shown as it is.
    config = parse_config(json.loads(json.dumps(manifest["config"])))
    path = run_dir / METRICS_NAME
    kinds: tuple[Kind, ...] = ("train", "eval", "diagnostics")
    # A run that has only begun has no metrics file.
    records = [read_metrics(path, kind) if path.exists() else [] for kind in kinds]
    return Run(run_dir, manifest, config, *records)


def _subtitle(run: Run) -> str:
    steps = run.config.train.steps
    reached = max((r["step"] for r in (*run.train, *run.evaluations)), default=0)
    state = "" if reached >= steps else " It is not finished."
    time = next((start["time"] for start in run.manifest.get("starts", [])), "")
    started = f" Started {time[:16].replace('T', ' ')} UTC." if time else ""
    return (
        f"Report of one run, recipe {run.config.recipe}. Step {reached} of {steps}.{state}{started}"
    )


def _curves(run: Run) -> list[Picture]:
    """What the run learned and how well it is aligned, as far as that was logged."""
    path, found = run.directory / METRICS_NAME, []
    losses = [_course(run.train, "ce"), _course(run.evaluations, "eval_loss")]
    if any(losses):
        found.append(
            picture(
                lambda out: learning_curve({"loss": path}, out),
                f"Loss curve. Training cross-entropy: {losses[0] or 'not logged'}. Held-out loss: "
                f"{losses[1] or 'not measured'}.",
                "Cross-entropy in training (thin) and on held-out rows (marked).",
            )
        )
    cosine = _course(run.train, "cos_running") or _course(run.train, "cos_sim")
    if cosine:
        gap = _course(run.train, "gap_running") or _course(run.train, "alignment_gap")
        found.append(
            picture(
                lambda out: alignment_curve(path, out),
                f"Alignment curve. Cosine in training: {cosine}. Gap: {gap or 'none'}. Held-out "
                f"cosine: {_course(run.evaluations, 'eval_cos_sim') or 'not measured'}.",
                "Cosine, the cosine of unrelated examples (shuffled), and the gap between the two. "
                "Without a gap a high cosine means nothing.",
            )
        )
    return found


def _course(records: Sequence[Mapping[str, Any]], key: str) -> str:
    """The first and the last number of a metric in words; empty where it has none."""
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    return ", ".join(
        f"{number(value)} at step {step}" for step, value in points[:1] + points[1:][-1:]
    )


class Teacher(NamedTuple):
    """What the page says of one teacher."""

    name: str
    path: str
    meets: str
    notes: list[str]
    pictures: list[Picture]
    figures: Table | None
    evaluations: Table | None
    drawn: Picture | None
    map: Table | None


def _teachers(run: Run) -> list[Teacher]:
    depths = depths_at_hand(run.config)
    calibration = read_calibration(run.directory, run.config)
    return [_teacher(run, teacher, depths, calibration) for teacher in run.config.teachers]


def _teacher(
    run: Run, teacher: TeacherConfig, depths: Mapping[str, int], calibration: Mapping[str, Any]
) -> Teacher:
    setting, scores = teacher.layer_map, calibration.get(teacher.name, {})
    meets = MAPS[setting] if isinstance(setting, str) else "the one of its pair in the config"
    layer_map = layer_map_of(teacher, depths, calibration)
    layers, step = _layers(run.evaluations, teacher.name)
    count = len(next(iter(layers.values()), ()))
    if layer_map is not None and layers and len(layer_map) != count:
        layer_map = None  # the models that are here now are others than the run's
    # A map that has a name maps all layers of the student in order.
    students = range(count) if layer_map is None else layer_map.student_layers
    drawn, notes = _drawn(run.config, teacher, layer_map, depths)
    held_out = [
        f"{words} {number(scores[key])}" for key, words in HELD_OUT.items() if key in scores
    ]
    if held_out:
        notes.append(f"Calibration, on rows it was not fitted to: {', '.join(held_out)}.")
    return Teacher(
        name=teacher.name,
        path=teacher.path,
        meets=meets.format(layers=run.config.calibration.layers),
        notes=notes,
        pictures=_pictures(layers, teacher.name, students, step) if layers else [],
        figures=_figures(layers, students, step) if layers else None,
        evaluations=first_and_last(run.evaluations, teacher.name),
        drawn=drawn,
        map=None if layer_map is None else _map_table(layer_map, scores),
    )


def _layers(evaluations: Sequence[Mapping[str, Any]], teacher: str) -> tuple[dict[str, Any], int]:
    """Figures of one teacher by mapped layer in the last evaluation, and its step."""
    if not evaluations:
        return {}, 0
    found = evaluations[-1].get("layers", {})
    own = {key: row for key, row in found.items() if key.startswith(f"{teacher}/")}
    return own, evaluations[-1]["step"]


def _pictures(layers: Layers, teacher: str, students: Sequence[int], step: int) -> list[Picture]:
    """What the figures look like from layer to layer."""
    return [
        picture(
            lambda out: heat_map(layers, teacher, students, out),
            f"Heat map of the evaluation at step {step} by student layer; every number is in the "
            f"table of all figures by layer.",
            f"Held out, step {step}. Brighter is higher. Higher is better, but for the best "
            f"constant vector: its cosine is a baseline. The attention output is that of the "
            f"same queries reading either cache.",
        ),
        picture(
            lambda out: magnitude_ratios(layers, teacher, students, out),
            f"Length ratios of student and target vectors at step {step} by student layer; the "
            f"quantiles are in the table of all figures by layer.",
            f"Held out, step {step}. From quantile 0.1 to 0.9, the median marked; 1 is as long "
            f"as the target.",
        ),
    ]


def _figures(layers: Layers, students: Sequence[int], step: int) -> Table:
    """The numbers of the pictures, and those that have no common scale."""
    rows = [
        Row(key.partition("/")[2], [number(value) for value in row]) for key, row in layers.items()
    ]
    heads = ["student layer", *map(str, students)]
    return Table(f"Held-out figures by student layer, step {step}", heads, rows)


def _drawn(
    config: Config, teacher: TeacherConfig, layer_map: LayerMap | None, depths: Mapping[str, int]
) -> tuple[Picture | None, list[str]]:
    """The map as a picture, or why there is none."""
    if layer_map is None and teacher.layer_map in CALIBRATED_MAPS:
        return None, [
            "The layer map was measured, but its calibration is not in the run directory."
        ]
    if layer_map is None or not depths:
        return None, [
            "The layer map is not drawn: the models are not at hand, so their numbers of "
            "layers are not known."
        ]
    ours, theirs = depths["student"], depths[f"teacher-{teacher.name}"]
    cut = config.loss.kl_weight == 0
    last = layer_map.last_teacher_layer
    ended = f" Layers after {last} are cut off." if cut and last < theirs - 1 else ""
    wide = " The wider a line, the more it weighs." if layer_map.weights is not None else ""
    return picture(
        lambda out: layer_picture(layer_map, theirs, ours, out, cut=cut),
        f"Layer map from {theirs} teacher layers to {ours} student layers; its pairs are in the "
        f"table below.{ended}",
        f"Dark layers are compared, along the lines; faint ones are not.{wide}{ended}",
    ), []


def _map_table(layer_map: LayerMap, scores: Mapping[str, Any]) -> Table:
    """The map row by row, beside the scores of a calibration where there is one."""
    columns = {words: scores[key] for key, words in SCORES.items() if key in scores}
    rows = [
        Row(str(student), [text, *(number(column[p]) for column in columns.values())])
        for p, (student, text) in enumerate(layer_map.rows())
    ]
    heads = ["student layer", "teacher layers", *columns]
    return Table("Layer map and calibration scores" if columns else "Layer map", heads, rows)


class Probes(NamedTuple):
    """What the probes found on training batches, and what they cost."""

    notes: list[str]
    picture: Picture | None


def _probes(run: Run) -> Probes:
    share = _course(run.probes, "kv_gradient_share")
    cosine = _course(run.probes, "kv_gradient_cosine")
    if not share or not cosine:
        weighted = isinstance(run.config.loss.kv_weight, AutoShare)
        asked = weighted or run.config.train.diagnose_every is not None
        why = (
            "No probe was taken yet." if asked else "train.diagnose_every=null: nothing is probed."
        )
        return Probes([why], None)
    drawn = picture(
        lambda out: gradient_curve(run.directory / METRICS_NAME, out),
        f"Gradient shares. KV gradient beside cross-entropy gradient: {share}. Their cosine: "
        f"{cosine}.",
        "Gradients of the student's parameters on a training batch: how long that of the KV loss "
        "is beside that of cross-entropy (1 is as long), and whether both pull the same way.",
    )
    cost = run.probes[-1].get("probe_share_of_time")
    return Probes(
        [
            f"KV gradient / cross-entropy gradient: {share}. Cosine of the two: {cosine}.",
            "What probes cost is not known: that takes three, and three logged lines."
            if cost is None
            else f"Probes cost {cost:.1%} of the time that the steps took.",
        ],
        drawn,
    )


def _starts(starts: Sequence[Mapping[str, Any]]) -> Table:
    """Versions, hardware and command of every start, oldest first."""
    columns = []
    for start in starts:
        git = start.get("git") or {}
        revision = {"git": git["revision"] + (" + changes" if git["dirty"] else "")} if git else {}
        about = {key: start[key] for key in ("time", "command") if key in start}
        columns.append(about | start.get("hardware", {}) | revision | start.get("versions", {}))
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [Row(key, [str(column.get(key, "")) for column in columns]) for key in keys]
    heads = ["field", *(f"start {place}" for place, _ in enumerate(columns, start=1))]
    return Table("Starts of this run", heads, rows, words=True)


def _fingerprints(found: Mapping[str, Any]) -> Table:
    named = {f"teacher {name}": value for name, value in found.get("teachers", {}).items()}
    named |= {key: value for key, value in found.items() if key != "teachers"}
    rows = [Row(key, [value or "not taken"]) for key, value in named.items()]
    return Table("SHA-256 of what was read", ["of", "fingerprint"], rows, words=True)
