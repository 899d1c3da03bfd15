"""``kava calibrate``: layer maps and projectors fitted in closed form, before any training.

Training rows are streamed once through student and teacher. Six of eight rows are fitted on, one
chooses layers, one scores. Memory does not depend on the number of rows (``alignment.grams``).
What is found lies in ``<run.dir>/calibration``; a run of the same models and data uses it again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kava_jax.alignment.closed_form import (
    choose_by_cka,
    choose_layers,
    fit,
    linear_cka,
    r_squared,
)
from kava_jax.alignment.grams import Grams
from kava_jax.alignment.layer_map import CALIBRATED_MAPS, LayerMap, window
from kava_jax.alignment.projector import KVDimensionProjector
from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.run import Config
from kava_jax.data.dataset import Dataset, HeldOut
from kava_jax.data.text import Encoded
from kava_jax.errors import KavaError
from kava_jax.journal.lock import alone
from kava_jax.journal.manifest import Fingerprints, check_manifest, config_hash, fields_of
from kava_jax.models.decoder import Params
from kava_jax.parallel.hosts import from_first
from kava_jax.runs.cutting import settled
from kava_jax.runs.evaluate import batches_of, evaluate
from kava_jax.runs.moments import Candidates, moments
from kava_jax.runs.prepare import Run, fingerprints_of, load_dataset, prepare
from kava_jax.runs.reopen import calibration_path, read_measured_maps
from kava_jax.runs.resume import FREE_FIELDS, PATH_FIELDS
from kava_jax.storage import Place, check_target, local_file

# Of every eight rows: six to fit on, one to choose layers by, one to score.
SPLITS = {"fit": (0, 1, 2, 3, 4, 5), "dev": (6,), "score": (7,)}
LEAST_ROWS = 8
# Only caches are calibrated.
PARTS = ("k", "v")
# At most so many training rows are read; teacher layers that are mixed for a student layer; and the
# ridge, as a share of the mean variance of the inputs.
ROWS, LAYERS, RIDGE = 512, 4, 1e-4
# What a calibration depends on, apart from the content of the files: a change anywhere else leaves
# it as it is.
IDENTITY = ("teachers", "student", "projector", "data")
FRAME_FIELDS = ("key_space", "remove_key_bias", "sink_tokens")


@dataclass(frozen=True)
class Calibration:
    """What was found: a layer map per teacher, the projector's weights, and the scores."""

    maps: dict[str, LayerMap]
    projector: Params | None
    report: dict[str, Any]


def calibrated(
    config: Config, run: Run, dataset: Dataset, fingerprints: Fingerprints
) -> Calibration | None:
    """What the config needs measured: read from the run directory, or measured and written there.

    None when it needs nothing. ``run`` is that of the ``unmeasured`` config, with its data set and
    fingerprints. Raises KavaError for whatever does not fit together.
    """
    if not config.needs_calibration:
        return None
    path, identity = calibration_path(config.run.directory), _identity(config, fingerprints)
    # All processes measure or none: on a shared disk one of them may see the file later.
    known = path.is_file() and _written_identity(path) == identity
    if from_first(known, "calibration"):
        return _read(config)
    found = _measure(config, run, dataset, identity)
    if jax.process_index() == 0:
        _write(config, found)
    return found


def calibrate(config: Config) -> Calibration:
    """Measure what the config asks for, write it to the run directory, and return it.

    Raises KavaError when the config asks for nothing that is measured, for a combination that has
    no closed form, and for a run directory that belongs to another run or that one is at work in.
    """
    if not config.needs_calibration:
        raise KavaError(
            "the config measures nothing: set recipe=calibrated, projector.init=calibrated or a "
            "teacher's layer_map to cka or calibrated"
        )
    check_target(config.run.directory, "run.dir")
    with alone(config.run.directory, "run.dir"):
        run = prepare(unmeasured(config))
        dataset = load_dataset(run)
        fingerprints = fingerprints_of(run, dataset)
        if config.student.cut:
            cut, _ = settled(config, str(fingerprints.student), dataset.stream.rows)
            run = prepare(unmeasured(config), cut=cut)
        check_manifest(
            run.directory,
            config=dump_config(config),
            fingerprints=fingerprints,
            free=FREE_FIELDS,
            paths=PATH_FIELDS,
        )
        found = calibrated(config, run, dataset, fingerprints)
    assert found is not None
    return found


def _measure(config: Config, run: Run, dataset: Dataset, identity: str) -> Calibration:
    """Stream the rows through student and every teacher, one after the other; fit; score."""
    rows = measured_rows(config, dataset, "calibrate")
    student = run.blueprint.student_start()
    dealt = {
        # In turn, because the rows of a file may be sorted.
        name: [row for i, row in enumerate(rows) if i % LEAST_ROWS in places]
        for name, places in SPLITS.items()
    }
    batches = {name: batches_of(run, own) for name, own in dealt.items()}
    maps, weights, report = {}, {}, {}
    for index, teacher in enumerate(config.teachers):
        candidates = _candidates(config, run, index)
        comparison = run.blueprint.teachers[teacher.name].link.comparison
        grams = moments(run, comparison, student, candidates, batches)
        if empty := [split for split in SPLITS if not grams[split]["k"].count]:
            raise KavaError(
                f"loss.sink_tokens={config.loss.sink_tokens}: of {len(rows)} rows none to "
                f"{empty[0]} on is longer; lower it, or give longer rows"
            )
        maps[teacher.name] = _layer_map(config, index, candidates, grams)
        found = _fit(config, maps[teacher.name], grams)
        weights[teacher.name], report[teacher.name] = found
    projector = {"pairs": weights} if config.projector.init == "calibrated" else None
    scored = {}
    if projector:
        # Built again: the maps, by which teachers are cut, are known only now.
        measured = prepare(config, maps, run.blueprint.student_cut)
        scored = _score(measured, projector, student, dealt["score"])
    teachers = {name: report[name] | scored.get(name, {}) for name in report}
    return Calibration(
        maps, projector, {"identity": identity, "rows": len(rows), "teachers": teachers}
    )


def unmeasured(config: Config) -> Config:
    """The same run with nothing left to measure: what can be built before a calibration."""
    if not config.needs_calibration:
        return config
    raw = dump_config(config)
    for teacher in raw["teachers"]:
        if teacher["layer_map"] in CALIBRATED_MAPS:
            teacher["layer_map"] = "ratio"  # it reaches the teacher's last layer, so none is cut
    if raw["projector"]["init"] == "calibrated":
        raw["projector"]["init"] = "xavier"
    return parse_config(raw)


def _candidates(config: Config, run: Run, index: int) -> Candidates:
    """The student layers that are mapped, and each one's candidates among the teacher's layers."""
    setting = config.teachers[index].layer_map
    teacher = run.blueprint.teachers[config.teachers[index].name]
    if setting in CALIBRATED_MAPS:
        students = run.blueprint.student_spec.num_layers
        return Candidates(tuple(range(students)), window(teacher.spec.num_layers, students))
    # The map is given and only the projector is fitted: every window is the layer itself.
    return Candidates(teacher.layer_map.student_layers, teacher.layer_map.teacher_layers)


Splits = Mapping[str, Mapping[str, Grams]]


def _layer_map(config: Config, index: int, candidates: Candidates, grams: Splits) -> LayerMap:
    """The map that is asked for: chosen by CKA or by fit, or as it was given."""
    setting = config.teachers[index].layer_map
    (fit_k, fit_v), (dev_k, dev_v) = (
        [grams[split][part] for part in PARTS] for split in ("fit", "dev")
    )

    def choose(p: int, row: tuple[int, ...]) -> tuple[int, ...]:
        if setting == "cka":
            return (choose_by_cka(fit_k, fit_v, p, row),)
        if setting != "calibrated":
            return row
        # A shallow teacher has fewer layers than that to choose from.
        known = (fit_k, fit_v, p, row, min(LAYERS, len(row)), RIDGE, config.projector.direction)
        return choose_layers(*known, dev_k=dev_k, dev_v=dev_v)

    rows = tuple(choose(p, row) for p, row in enumerate(candidates.windows))
    return LayerMap(candidates.student_layers, rows)


def _fit(config: Config, layer_map: LayerMap, grams: Splits) -> tuple[Any, dict[str, Any]]:
    """Weights of one teacher's adapters, and R^2 and CKA by layer on the scoring split."""
    rows, direction = layer_map.teacher_layers, config.projector.direction
    fitted = fit((grams["fit"]["k"], grams["fit"]["v"]), rows, direction, RIDGE)
    report: dict[str, Any] = {"layer_map": layer_map.as_dict()}
    for part in PARTS:
        maps, score = fitted[part]["out"], grams["score"][part]
        report[f"r2_{part}"] = [
            r_squared(maps["kernel"][p], maps["bias"][p], score, p, row, direction)
            for p, row in enumerate(rows)
        ]
        report[f"cka_{part}"] = [
            max(linear_cka(score, p, layer) for layer in row) for p, row in enumerate(rows)
        ]
    report["tokens"] = {split: grams[split]["k"].count for split in grams}
    return fitted, report


def _score(
    run: Run, projector: Params, student: Params, rows: list[Encoded]
) -> dict[str, dict[str, Any]]:
    """Cosine, centred cosine and gap of the fitted projector on the scoring split.

    Without a baseline (batches of one row) there is no gap: it is left out, JSON has no NaN.
    """
    params = {"student": student, "projector": place(run, projector)}
    found = evaluate(run, HeldOut(rows, ()), params, run.blueprint.load_teachers())
    names = ("cos_sim", "cos_shuffled", "alignment_gap", "cos_centered", "retrieval")
    scored = {}
    for teacher in run.config.teachers:
        prefix = f"eval_{teacher.name}/" if len(run.config.teachers) > 1 else "eval_"
        own = {name: found[prefix + name] for name in names}
        scored[teacher.name] = {n: value for n, value in own.items() if math.isfinite(value)}
    return scored


def place(run: Run, projector: Params) -> Params:
    """A calibrated projector's weights where the run keeps them.

    Raises KavaError when they do not have the shapes of the run's projector.
    """
    part = run.blueprint.projector
    assert part is not None
    expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(part.abstract))
    if jax.tree.map(jnp.shape, projector) != expected:
        raise KavaError(
            f"calibration of run.dir={run.directory} has other shapes than its models; remove its "
            f"{calibration_path(run.directory).parent.name} directory to measure again"
        )
    return jax.device_put(projector, part.shardings)


def measured_rows(config: Config, dataset: Dataset, purpose: str) -> Sequence[Encoded]:
    """The training rows that a fit reads; KavaError, naming its ``purpose``, for too few."""
    rows = dataset.stream.rows[:ROWS]
    if len(rows) < LEAST_ROWS:
        raise KavaError(
            f"data.path={config.data.path}: {len(rows)} training rows are too few to {purpose} "
            f"with; give at least {LEAST_ROWS}"
        )
    return rows


def _identity(config: Config, fingerprints: Fingerprints) -> str:
    raw = dump_config(config)
    # Paths do not count, as the fingerprints say whether the files are the same. The seed does: it
    # draws the weights of a fresh student, and of a teacher under the control ``random``.
    fields: dict[str, Any] = dict(fields_of({name: raw[name] for name in IDENTITY}, PATH_FIELDS))
    fields |= {name: raw["loss"][name] for name in FRAME_FIELDS}
    fields |= {"seed": raw["run"]["seed"], "files": fingerprints._asdict()}
    return config_hash(fields)


def _projector_file(config: Config) -> Place:
    return calibration_path(config.run.directory).with_name("projector.safetensors")


def _write(config: Config, found: Calibration) -> None:
    path = calibration_path(config.run.directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    if found.projector is not None:
        part = prepare(config, found.maps).blueprint.projector
        assert part is not None
        module: KVDimensionProjector = nnx.merge(part.graph, found.projector)
        with local_file(_projector_file(config)) as file:
            module.save(file)
    # Last, so that a file that names maps is never next to another one's projector.
    path.write_text(json.dumps(found.report, indent=2) + "\n", encoding="utf-8")


def _written_identity(path: Place) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("identity")
    except (OSError, ValueError, AttributeError):
        return None  # not whole: measured again


def _read(config: Config) -> Calibration:
    """A calibration that was written for these models and this data."""
    path = calibration_path(config.run.directory)
    projector = None
    if config.projector.init == "calibrated":
        with local_file(_projector_file(config)) as file:
            module = KVDimensionProjector.load(file)
        projector = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    report = json.loads(path.read_text(encoding="utf-8"))
    return Calibration(read_measured_maps(config), projector, report)


def describe(found: Calibration) -> str:
    """Layer maps and scores as tables for a terminal."""
    parts = []
    for name, report in found.report["teachers"].items():
        field, headings, *layers = found.maps[name].table(name)
        scores = zip(layers, report["r2_k"], report["r2_v"], strict=True)
        rows = [f"{row}  R2 k {k:6.3f}  v {v:6.3f}" for row, k, v in scores]
        named = ("cos_sim", "alignment_gap", "cos_centered", "retrieval")
        scored = [f"{name} {report[name]:.3f}" for name in named if name in report]
        rows += [f"held out: {', '.join(scored)}"] if scored else []
        parts.append("\n".join([field, headings, *rows]))
    return "\n\n".join(parts)
