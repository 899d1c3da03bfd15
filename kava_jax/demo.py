"""``kava demo``: the main job in miniature, on what ships with the package.

A teacher of under a million parameters, trained by ``configs/demo_teacher.yaml`` on generated word
problems, is distilled into a student of a tenth of its size (``configs/demo.yaml``). A second
student with the same start, data and steps learns by cross-entropy alone. The distilled student is
exported, imported again, and must answer exactly as before.

``kava demo --handoff`` goes on from that student (``configs/demo_handoff.yaml``): it answers from
its teacher's prompt cache, its teacher answers from its own, and a twin trains on alone.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from kava_jax.config.file import (
    dump_config,
    load_config,
    parse_config,
    shipped_config,
    without_teachers,
)
from kava_jax.config.run import Config
from kava_jax.errors import KavaError
from kava_jax.experiments.pictures import alignment_chart, loss_chart, read_log
from kava_jax.hf.export import check_destination
from kava_jax.journal.metrics_file import METRICS_NAME
from kava_jax.models.decoder import Params
from kava_jax.runs.evaluate import answer, evaluate
from kava_jax.runs.handed import assess_handed, timed_answers
from kava_jax.runs.prepare import prepare_alone
from kava_jax.runs.student_export import export
from kava_jax.runs.train import train
from kava_jax.storage import check_target

if TYPE_CHECKING:
    from rich.console import RenderableType

DISTILLED, CE_ONLY = "distilled", "ce_only"
SCORES = ("exact_match_strict", "exact_match_stderr", "seconds_per_answer")


def run_demo(out: Path, command: Sequence[str]) -> dict[str, Any]:
    """Train both students under ``out``, evaluate all models, export and draw.

    A second call with the same ``out`` continues where the first one stopped. Returns plain data,
    as ``--json`` prints it: for each model its parameters, its held-out loss (nats per answer
    token), and its exact match with the standard error (0 to 1); then what was found of the
    distilled student, and where everything was put.
    """
    started = time.monotonic()
    # Both places are checked now, and not after the trainings.
    check_target(out, "out")
    exported = out / "export"
    check_destination(exported)
    config = load_config(shipped_config("demo.yaml"))
    distilled = train(_placed(config, out / DISTILLED), command)
    ce_only = train(_placed(config, out / CE_ONLY, alone=True), command)
    run, held = distilled.run, distilled.dataset.held_out
    learnt, alone = (trained.state.params["student"] for trained in (distilled, ce_only))
    export(run, learnt, int(distilled.state.step), exported)
    again = prepare_alone(config, exported)
    answered = [answer(run, held, learnt), answer(again, held, again.blueprint.load_student())]
    of_teacher = prepare_alone(config, config.teachers[0].path)
    teacher = of_teacher.blueprint.load_student()
    untrained = run.blueprint.fresh_state().params["student"]
    # Both students begin alike, so the run without teachers measures their start.
    values = [
        evaluate(of, held, {"student": params, "projector": {}}, {})
        for of, params in ((of_teacher, teacher), (ce_only.run, untrained))
    ]
    return {
        "models": [
            _row("teacher", teacher, values[0]),
            _row("student before", untrained, values[1]),
            _row("student, cross-entropy only", alone, ce_only.evaluation),
            _row("student, distilled (KV)", learnt, distilled.evaluation),
        ],
        "questions": len(held.examples),
        "steps": config.train.steps,
        "cosine": distilled.evaluation["eval_cos_sim"],
        "alignment_gap": distilled.evaluation["eval_alignment_gap"],
        "reimport_identical": answered[0].samples == answered[1].samples,
        "export": str(exported),
        "pictures": _draw(out),
        "seconds": round(time.monotonic() - started, 1),
    }


def run_handoff(out: Path, command: Sequence[str]) -> dict[str, Any]:
    """Go on from the student that ``run_demo`` left under ``out``, in three ways; plain data.

    For each who answers: held-out loss (nats per answer token), exact match with its standard
    error (0 to 1), and seconds per answer.

    Raises KavaError where ``run_demo`` has not ended yet.
    """
    started = time.monotonic()
    exported = out / "export"
    if not (exported / "config.json").is_file():
        raise KavaError(f"out={out} holds no student yet; run `kava demo --out {out}` first")
    raw = dump_config(load_config(shipped_config("demo_handoff.yaml")))
    config = parse_config(raw, [f"student.path={exported}"])
    reverse = parse_config(dump_config(config), ["loss.handoff.reader=student"])
    placed = {name: out / f"handoff_{name}" for name in ("alone", "to_student", "to_teacher")}
    alone = train(_placed(config, placed["alone"], alone=True), command)
    to_student = train(_placed(config, placed["to_student"]), command)
    to_teacher = train(_placed(reverse, placed["to_teacher"]), command)
    held = to_student.dataset.held_out
    values = []
    for trained in (to_student, to_teacher):
        run, params = trained.run, trained.state.params
        own = assess_handed(run, held, params, run.blueprint.load_teachers())
        values.append(trained.evaluation | own)
    further = alone.evaluation | timed_answers(alone.run, held, alone.state.params["student"])
    rows = (
        ("teacher", values[0], "teacher/eval_loss", "teacher/"),
        ("student, trained on alone", further, "eval_loss", ""),
        ("student, from the teacher's cache", values[0], "eval_loss_handed", "handed/"),
        ("the same student, alone", values[0], "eval_loss", ""),
        ("teacher, from the student's cache", values[1], "eval_loss_handed", "handed/"),
    )
    return {
        "models": [
            {"model": name, "eval_loss": own[loss]} | {key: own[prefix + key] for key in SCORES}
            for name, own, loss, prefix in rows
        ],
        "questions": len(held.examples),
        "steps": config.train.steps,
        "seconds": round(time.monotonic() - started, 1),
    }


def render_handoff(found: Mapping[str, Any]) -> "RenderableType":
    """The table of who answers how well, and how fast."""
    from rich.table import Table

    title = f"{found['questions']} unseen questions, {found['steps']} steps each, "
    table = Table("answers", title=f"{title}{found['seconds']:.0f} s")
    for heading in ("held-out loss", "exact match", "ms an answer"):
        table.add_column(heading, justify="right")
    for row in found["models"]:
        accuracy = f"{row['exact_match_strict']:.1%} ± {row['exact_match_stderr']:.1%}"
        time_each = f"{1000 * row['seconds_per_answer']:.1f}"
        table.add_row(row["model"], f"{row['eval_loss']:.4f}", accuracy, time_each)
    return table


def render(found: Mapping[str, Any]) -> "RenderableType":
    """The table, and where the pictures and the exported model are."""
    from rich.console import Group
    from rich.table import Table

    title = f"{found['questions']} unseen questions, {found['steps']} steps each, "
    table = Table("model", title=f"{title}{found['seconds']:.0f} s")
    for heading in ("parameters", "held-out loss", "exact match"):
        table.add_column(heading, justify="right")
    for row in found["models"]:
        accuracy = f"{row['exact_match']:.1%} ± {row['standard_error']:.1%}"
        table.add_row(row["model"], f"{row['parameters']:,}", f"{row['loss']:.4f}", accuracy)
    same = "identical answers" if found["reimport_identical"] else "DIFFERENT answers"
    lines = [
        f"held-out cosine {found['cosine']:.3f}, alignment gap {found['alignment_gap']:.3f}",
        f"Hugging Face directory: {found['export']} (imported again: {same})",
        *(f"picture: {picture}" for picture in found["pictures"]),
    ]
    return Group(table, *lines)


def _placed(config: Config, directory: Path, *, alone: bool = False) -> Config:
    """The config in its own run directory; ``alone`` takes the teachers away, and nothing else."""
    # A student from a geometry has its teacher's tokenizer, which is now to be named.
    tokenizer = config.student.tokenizer or config.teachers[0].path
    raw = without_teachers(config, tokenizer=tokenizer) if alone else dump_config(config)
    raw["run"]["dir"] = str(directory)
    return parse_config(raw)


def _row(name: str, student: Params, values: Mapping[str, float]) -> dict[str, Any]:
    return {
        "model": name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(student)),
        "loss": values["eval_loss"],
        "exact_match": values["exact_match_strict"],
        "standard_error": values["exact_match_stderr"],
    }


def _draw(out: Path) -> list[str]:
    """Write both pictures; returns their paths."""
    logs = {name: read_log(out / name / METRICS_NAME) for name in (DISTILLED, CE_ONLY)}
    labels = {"distilled (KV)": logs[DISTILLED], "cross-entropy only": logs[CE_ONLY]}
    charts = {"learning": loss_chart(labels), "alignment": alignment_chart(logs[DISTILLED])}
    for name, chart in charts.items():
        chart.figure().savefig(out / f"{name}_curve.png")
    return [str(out / f"{name}_curve.png") for name in charts]
