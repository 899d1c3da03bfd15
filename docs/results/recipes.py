"""Three recipes on a real pair: a student that knows the text already, before and after.

    python docs/results/recipes.py MODEL_DIR TEXT_FILE > docs/results/recipes.json

A student is trained on the text by cross-entropy alone (``configs/tinystories_260k.yaml`` without
its teacher), then goes on for 400 steps under each recipe, and once more by cross-entropy alone.
R^2 is that of a linear map fitted from one teacher layer to the student's, before and after. About
fifteen minutes on 2 CPU cores.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kava_jax.config.file import load_config, shipped_config
from kava_jax.config.run import Config
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.journal.verdict import verdict
from kava_jax.runs.calibrate import calibrate
from kava_jax.runs.student_export import export
from kava_jax.runs.train import train

STEPS, TEACHER = 400, "stories260k"
FITTED = ("projector.kind=linear", "projector.per_layer=true", "projector.init=calibrated")
FORWARD = ("projector.direction=teacher_to_student",)


def main(model: str, text: str) -> None:
    """Run everything, and print one JSON document."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        alone = ["teachers=[]", f"student.tokenizer={model}", f"data.path={text}"]
        base = distil(out, "base", alone)
        start = [
            f"student.path={out / 'base-export'}",
            "student.geometry=null",
            f"data.path={text}",
        ]
        start += [f"train.steps={STEPS}", "optimizer.student_lr=1e-3", "train.eval_every=null"]
        taught = [*start, f"teachers.0.path={model}", "loss.kv_weight=1.0"]
        result: dict[str, Any] = {
            "steps_before": base["steps"],
            "steps": STEPS,
            "loss_before": base["after"]["eval_loss"],
            "r2_before": r_squared(out, "base", model, text),
        }
        more = distil(out, "cross_entropy", [*start, "teachers=[]", f"student.tokenizer={model}"])
        result["cross_entropy"] = {"loss": more["after"]["eval_loss"]}
        result["recipes"] = {}
        for recipe in ("original", "anchored", "calibrated"):
            found = distil(out, recipe, [*taught, f"recipe={recipe}"])
            result["recipes"][recipe] = {
                "before": summary(found["before"]),
                "after": summary(found["after"]),
                "r2_after": r_squared(out, recipe, model, text),
            }
    print(json.dumps(result, indent=2))


def distil(out: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Train in a directory of its own and export; the first and the last evaluation."""
    config = tinystories([*overrides, f"run.dir={out / name}"])
    trained = train(config, ["python", "docs/results/recipes.py"])
    export(trained.run, trained.state.params["student"], config.train.steps, out / f"{name}-export")
    first, *_, last = read_metrics(out / name / METRICS_NAME, "eval")
    return {"steps": config.train.steps, "before": first, "after": last}


def r_squared(out: Path, name: str, model: str, text: str) -> dict[str, list[float]]:
    """How much of the student's cache one teacher layer explains linearly, by layer."""
    settings = [
        f"student.path={out / f'{name}-export'}",
        "student.geometry=null",
        *FITTED,
        *FORWARD,
    ]
    settings += [f"teachers.0.path={model}", f"data.path={text}", f"run.dir={out / name}-fit"]
    report = calibrate(tinystories(settings)).report["teachers"][TEACHER]
    return {part: report[f"r2_{part}"] for part in ("k", "v")}


def tinystories(overrides: list[str]) -> Config:
    """The shipped config with its paths, and whatever else, filled in."""
    return load_config(shipped_config("tinystories_260k.yaml"), overrides)


def summary(evaluation: dict[str, Any]) -> dict[str, Any]:
    """One evaluation: the whole, and cosines by layer."""
    names = ("loss", "cos_sim", "cos_shuffled", "alignment_gap", "cos_centered", "retrieval")
    figures = {name: evaluation[f"eval_{name}"] for name in (*names, "attention_cos", "cka")}
    layers = {
        f"{name}_{part}": evaluation["layers"][f"{TEACHER}/{name}_{part}"]
        for name in ("cos_sim", "cos_shuffled", "cos_centered", "retrieval")
        for part in ("k", "v")
    }
    word = verdict(figures["cos_sim"], figures["cos_shuffled"])
    return figures | {"verdict": word, "layers": layers}


if __name__ == "__main__":
    main(*sys.argv[1:])
