"""``kava demo``: the main job in miniature, on what ships with the package.

A teacher of under a million parameters, trained by ``configs/demo_teacher.yaml`` on generated word
problems, is distilled into a student of a tenth of its size (``configs/demo.yaml``). Beside it, a
student with the same start, data and steps learns by cross-entropy alone. The distilled student is
exported, imported again, and must answer exactly as before.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from kava_jax.config.file import dump_config, load_config, parse_config, shipped_config
from kava_jax.config.run import Config
from kava_jax.data.dataset import HeldOut
from kava_jax.evaluation.exact_match import ExactMatch
from kava_jax.experiments.pictures import alignment_chart, loss_chart, read_log
from kava_jax.hf.export import check_destination
from kava_jax.journal.metrics_file import METRICS_NAME
from kava_jax.models.decoder import Params
from kava_jax.runs.evaluate import answer, evaluate
from kava_jax.runs.export import export
from kava_jax.runs.prepare import Run, prepare
from kava_jax.runs.train import Trained, train
from kava_jax.storage import check_target

if TYPE_CHECKING:
    from rich.console import RenderableType

DISTILLED, CE_ONLY = "distilled", "ce_only"


class Row(NamedTuple):
    """One model of the table. Loss in nats per answer token, accuracy and its error in 0 to 1."""

    model: str
    parameters: int
    loss: float
    exact_match: float
    standard_error: float


class Demo(NamedTuple):
    """What the demo found and where it put things."""

    rows: tuple[Row, ...]
    questions: int
    steps: int
    cosine: float
    alignment_gap: float
    reimport_identical: bool
    export: Path
    pictures: tuple[Path, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "models": [row._asdict() for row in self.rows],
            "questions": self.questions,
            "steps": self.steps,
            "cosine": self.cosine,
            "alignment_gap": self.alignment_gap,
            "reimport_identical": self.reimport_identical,
            "export": str(self.export),
            "pictures": [str(picture) for picture in self.pictures],
            "seconds": round(self.seconds, 1),
        }


def run_demo(out: Path, command: Sequence[str]) -> Demo:
    """Train both students under ``out``, evaluate all models, export and draw.

    A second call with the same ``out`` continues where the first one stopped.
    """
    started = time.monotonic()
    check_target(out, "out")
    exported = out / "export"
    check_destination(exported)
    config = load_config(shipped_config("demo.yaml"))
    distilled = train(_placed(config, out / DISTILLED), command)
    ce_only = train(_placed(config, out / CE_ONLY, alone=True), command)
    run, held = distilled.run, distilled.dataset.held_out
    export(run, distilled.state.params["student"], int(distilled.state.step), exported)
    again = prepare(_of_directory(config, exported))
    answers = answer(run, held, distilled.state.params["student"])
    teacher = prepare(_of_directory(config, config.teachers[0].path))
    untrained = run.blueprint.fresh_state().params["student"]
    alone = {"student": untrained, "projector": {}}
    return Demo(
        rows=(
            _row("teacher", teacher, held, _only(teacher.blueprint.load_student())),
            _row("student before", ce_only.run, held, alone),
            _trained_row("student, cross-entropy only", ce_only),
            _trained_row("student, distilled (KV)", distilled),
        ),
        questions=len(held.examples),
        steps=config.train.steps,
        cosine=distilled.evaluation["eval_cos_sim"],
        alignment_gap=distilled.evaluation["eval_alignment_gap"],
        reimport_identical=_same(answers, answer(again, held, again.blueprint.load_student())),
        export=exported,
        pictures=_draw(out),
        seconds=time.monotonic() - started,
    )


def render(demo: Demo) -> "RenderableType":
    """The table, and where the pictures and the exported model are."""
    from rich.console import Group
    from rich.table import Table

    title = f"{demo.questions} unseen questions, {demo.steps} steps each, {demo.seconds:.0f} s"
    table = Table("model", title=title)
    for heading in ("parameters", "held-out loss", "exact match"):
        table.add_column(heading, justify="right")
    for row in demo.rows:
        accuracy = f"{row.exact_match:.1%} ± {row.standard_error:.1%}"
        table.add_row(row.model, f"{row.parameters:,}", f"{row.loss:.4f}", accuracy)
    same = "identical answers" if demo.reimport_identical else "DIFFERENT answers"
    lines = [
        f"held-out cosine {demo.cosine:.3f}, alignment gap {demo.alignment_gap:.3f}",
        f"Hugging Face directory: {demo.export} (imported again: {same})",
        *(f"picture: {picture}" for picture in demo.pictures),
    ]
    return Group(table, *lines)


def _placed(config: Config, directory: Path, *, alone: bool = False) -> Config:
    """The config in its own run directory; ``alone`` takes the teachers away, and nothing else."""
    raw = dump_config(config)
    raw["run"]["dir"] = str(directory)
    if alone:
        raw["student"]["tokenizer"] = raw["student"]["tokenizer"] or raw["teachers"][0]["path"]
        raw["teachers"] = []
    return parse_config(raw)


def _of_directory(config: Config, path: str | Path) -> Config:
    """A config whose student is a finished model and which has no teachers."""
    raw = dump_config(config) | {"student": {"path": str(path)}, "teachers": []}
    return parse_config(raw)


def _only(student: Params) -> dict[str, Params]:
    return {"student": student, "projector": {}}


def _row(name: str, run: Run, held: HeldOut, params: dict[str, Params]) -> Row:
    return _from_values(name, params["student"], evaluate(run, held, params, {}))


def _trained_row(name: str, trained: Trained) -> Row:
    return _from_values(name, trained.state.params["student"], trained.evaluation)


def _from_values(name: str, student: Params, values: dict[str, float]) -> Row:
    return Row(
        name,
        sum(leaf.size for leaf in jax.tree.leaves(student)),
        values["eval_loss"],
        values["exact_match_strict"],
        values["exact_match_stderr"],
    )


def _same(first: ExactMatch, second: ExactMatch) -> bool:
    return first.samples == second.samples


def _draw(out: Path) -> tuple[Path, ...]:
    logs = {name: read_log(out / name / METRICS_NAME) for name in (DISTILLED, CE_ONLY)}
    labels = {"distilled (KV)": logs[DISTILLED], "cross-entropy only": logs[CE_ONLY]}
    charts = {"learning": loss_chart(labels), "alignment": alignment_chart(logs[DISTILLED])}
    for name, chart in charts.items():
        chart.figure().savefig(out / f"{name}_curve.png")
    return out / "learning_curve.png", out / "alignment_curve.png"
