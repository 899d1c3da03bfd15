"""The student of a run as a Hugging Face directory with a model card."""

from pathlib import Path
from typing import Any, Literal

from kava_jax.config.weights import is_zero
from kava_jax.hf.card import model_card
from kava_jax.hf.config_json import FloatName
from kava_jax.hf.export import check_tokenizer, export_model
from kava_jax.hf.handoff_files import write_handoff
from kava_jax.hf.locate import read_json
from kava_jax.journal.manifest import read_manifest
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.models.decoder import Params
from kava_jax.runs.handed import restore_handoff
from kava_jax.runs.prepare import Run
from kava_jax.storage import Place


def export(
    run: Run, student: Params, step: int, out: Place, dtype: FloatName | Literal["auto"] = "auto"
) -> None:
    """The student at a step as a Hugging Face directory, of the run's student and directory alone.

    With it goes the handoff of a run that trains one. ``auto`` is the dtype it came in, or float32.
    """
    source, handed = run.blueprint.student_dir, restore_handoff(run, step)
    export_model(
        out,
        student,
        run.blueprint.student_spec,
        dtype=_export_dtype(source) if dtype == "auto" else dtype,
        tokenizer=_tokenizer(run),
        source_dir=source,
        card=_card(run, step),
        cut=run.blueprint.student_cut,
        more=None if handed is None else lambda place: write_handoff(place, *handed),
    )


def check_exportable(run: Run) -> None:
    """Refuse, before it is trained, a student that could not be exported with its tokenizer."""
    check_tokenizer(_tokenizer(run), run.blueprint.student_spec, run.blueprint.student_dir)


def _tokenizer(run: Run) -> Any:
    """The directory whose files are copied, else the tokenizer itself."""
    directory = Path(run.tokenizer_source)
    # Files are copied where there are some: other versions of transformers write them differently.
    return directory if directory.is_dir() else run.tokenizer


def _export_dtype(source: Path | None) -> FloatName:
    """The dtype that the student's own config.json names."""
    if source is None:
        return "float32"
    config = read_json(source / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    return name if name in ("bfloat16", "float16") else "float32"


def _card(run: Run, step: int) -> str:
    config, manifest, cut = run.config, read_manifest(run.directory), run.blueprint.student_cut
    start, local = manifest["starts"][-1], manifest.get("directories", ())

    def named(path: str) -> str:
        """A directory stays one in the card when it is gone, whatever hub id it looks like."""
        return str(Path(path).absolute()) if path in local else path

    loss, compared = config.loss, f"{config.loss.key_space} keys"
    followed = "attention keys and values"
    if loss.output:
        compared = followed = loss.output.replace("_", " ")
    weights = {followed: loss.kv_weight, "logits": loss.kl_weight}
    recipe = {
        "language loss": f"{loss.ce_weight} x cross-entropy, {loss.kl_weight} x logit KL",
        "KV loss": f"{loss.kv.kind} x {loss.kv_weight}, {compared}",
        "projector": f"{config.projector.kind}, {config.projector.direction}",
        "steps": f"{step} of {config.train.steps}, batch {config.data.batch_size}",
        "learning rates": f"student {config.optimizer.student_lr:g}, "
        f"projector {config.optimizer.projector_lr:g}",
    }
    return model_card(
        name=config.run.name,
        base_model=named(
            config.student.path or (cut.teacher if cut else "a student trained from random weights")
        ),
        teachers=[named(teacher.path) for teacher in config.teachers],
        recipe=recipe if config.teachers else {"steps": recipe["steps"]},
        metrics=_last_evaluation(run.directory, step),
        followed=[what for what, weight in weights.items() if not is_zero(weight)],
        reader=loss.handoff.reader if loss.handoff else None,
        dataset=config.data.path,
        command=start["command"],
        versions=start["versions"],
    )


def _last_evaluation(run_dir: Place, step: int) -> dict[str, float]:
    """The held-out figures logged at ``step``, but those by layer; none if there are none."""
    records = [r for r in read_metrics(run_dir / METRICS_NAME, "eval") if r["step"] == step]
    return {
        name.removeprefix("eval_"): value
        for record in records[-1:]
        for name, value in record.items()
        if name not in ("step", "kind", "layers")
    }
