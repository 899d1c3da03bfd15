"""``record.yaml``: the experiment record of a run, filled in but for what only a person can say.

What was done with what, on what, and what came out, short enough to be read and kept. The
conclusion is left empty; once a person has written one, it stays when the run is called again.

Left out on purpose: fields that are the same in every record (``config.yaml`` has all of them), and
figures on the way (``metrics.jsonl``).
"""

import math
from collections.abc import Mapping
from typing import Any

import yaml

from kava_jax.config.file import dump_config
from kava_jax.config.run import Config
from kava_jax.data.dataset import Dataset
from kava_jax.errors import KavaError
from kava_jax.journal.manifest import read_manifest, write_atomically
from kava_jax.journal.verdict import verdict
from kava_jax.models.spec import DecoderSpec
from kava_jax.runs.parts import TeacherPart
from kava_jax.runs.prepare import Run
from kava_jax.storage import Place

RECORD_NAME = "record.yaml"
HEADER = "# Written by kava train at the end of a run; the conclusion is yours, and is kept.\n"
# Final figures by their names in metrics.jsonl.
FIGURES = {
    "held_out_loss": "eval_loss",
    "exact_match": "exact_match_strict",
    "cosine": "eval_cos_sim",
    "cosine_of_unrelated_examples": "eval_cos_shuffled",
    "alignment_gap": "eval_alignment_gap",
}


def write_record(run: Run, dataset: Dataset, evaluation: Mapping[str, float]) -> Place:
    """Write the record of a finished run into its directory and return its path.

    Versions, hardware, revision and command are those of the last start, the date is that of the
    first. Only one process of a run may call this, after its manifest was written.

    Args:
        run: what was trained.
        dataset: what it was trained on.
        evaluation: the last evaluation's figures; those that are missing or not finite are null.

    Raises:
        KavaError: the manifest, or a record that is there already, cannot be read.
    """
    path = run.directory / RECORD_NAME
    conclusion = _conclusion(path)
    manifest = read_manifest(run.directory)
    first, last = manifest["starts"][0], manifest["starts"][-1]
    record = {
        "name": run.config.run.name,
        "date": first["time"],
        **_setup(run, manifest["fingerprints"]),
        "data": {
            "path": run.config.data.path,
            "fingerprint": manifest["fingerprints"]["data"],
            "rows": len(dataset.stream.rows),
            "held_out_rows": len(dataset.held_out.measured),
        },
        **_training(run.config),
        "hardware": last["hardware"],
        "versions": last["versions"],
        "git": last["git"],
        "results": _results(evaluation),
        "command": last["command"],
        "conclusion": conclusion,
    }
    text = HEADER + yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
    write_atomically(path, text)
    return path


def check_record(run_dir: Place) -> None:
    """Find out before a run whether its record can be written without losing a conclusion.

    Raises KavaError when a record that is there already cannot be read.
    """
    _conclusion(run_dir / RECORD_NAME)


def _setup(run: Run, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """Models, and what stands between them."""
    config, blueprint = run.config, run.blueprint
    plain = dump_config(config)
    student = {
        "path": config.student.path,
        "fingerprint": fingerprints["student"],
        "geometry": _geometry(blueprint.student_spec),
    }
    teachers = [
        {
            "name": teacher.name,
            "path": teacher.path,
            "fingerprint": fingerprints["teachers"].get(teacher.name),
            "geometry": _geometry(blueprint.teachers[teacher.name].spec),
            "control": teacher.control,
            "layer_map": _layer_map(blueprint.teachers[teacher.name]),
        }
        for teacher in config.teachers
    ]
    if not teachers:
        weight = {"ce_weight": plain["loss"]["ce_weight"]}
        return {"teachers": [], "student": student, "recipe": None, "loss": weight}
    return {
        "teachers": teachers,
        "student": student,
        "recipe": config.recipe,
        "projector": plain["projector"],
        "loss": plain["loss"],
    }


def _geometry(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "family": spec.family,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocabulary": spec.vocab_size,
    }


def _layer_map(teacher: TeacherPart) -> dict[int, str]:
    """Student layer to teacher layers, as they are printed everywhere."""
    return dict(teacher.layer_map.rows())


def _training(config: Config) -> dict[str, Any]:
    rates = {"student": config.optimizer.student_lr}
    if config.teachers:
        rates["projector"] = config.optimizer.projector_lr
    return {
        "steps": config.train.steps,
        "batch_size": config.data.batch_size,
        "seed": config.run.seed,
        "learning_rates": rates,
    }


def _results(evaluation: Mapping[str, float]) -> dict[str, Any]:
    """Final figures to six digits, and the cosine's verdict."""
    values = {name: six_digits(evaluation.get(key)) for name, key in FIGURES.items()}
    sets = {
        key: six_digits(value)
        for key, value in evaluation.items()
        if key.endswith(("/eval_loss", "/exact_match_strict"))
    }
    cosine = values["cosine"]
    word = None if cosine is None else verdict(cosine, values["cosine_of_unrelated_examples"])
    return values | sets | {"verdict": word}


def six_digits(value: float | int | None) -> float | None:
    """As it is kept in a record: more digits would be noise. None where it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _conclusion(path: Place) -> str:
    """What a person has written into an earlier record."""
    if not path.exists():
        return ""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["conclusion"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise KavaError(
            f"record={str(path)!r} cannot be read ({type(error).__name__}), and its conclusion "
            f"shall not be lost; mend or remove it and run again"
        ) from None
    return "" if found is None else str(found)
