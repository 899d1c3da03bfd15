"""Distil a real pretrained Llama on real text, and the same student by cross-entropy alone.

    python docs/results/tinystories_260k.py MODEL_DIR TEXT_FILE > docs/results/tinystories_260k.json

Runs ``configs/tinystories_260k.yaml`` twice (with its teacher and without), exports the distilled
student and imports it again. Needs about ten minutes on 2 CPU cores.
"""

import json
import sys
import tempfile
from pathlib import Path

from kava_jax.config.file import dump_config, load_config, parse_config, shipped_config
from kava_jax.config.run import Config
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.runs.assess import assess
from kava_jax.runs.student_export import export
from kava_jax.runs.train import Trained, train


def main(model: str, text: str) -> None:
    """Run, and print one JSON document."""
    overrides = [f"teachers.0.path={model}", f"data.path={text}"]
    config = load_config(shipped_config("tinystories_260k.yaml"), overrides)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        distilled = run(config, out / "distilled")
        alone = run(without_teacher(config), out / "cross_entropy")
        export(distilled.run, distilled.state.params["student"], config.train.steps, out / "export")
        again = assess(str(out / "export"), text, checkpoint="last", rows=None)
        first, *_, last = read_metrics(out / "distilled" / METRICS_NAME, "eval")
    result = {
        "steps": config.train.steps,
        "eval_loss_before": first["eval_loss"],
        "eval_loss_distilled": last["eval_loss"],
        "eval_loss_cross_entropy_only": alone.evaluation["eval_loss"],
        "cosine_before": first["eval_cos_sim"],
        "cosine_after": last["eval_cos_sim"],
        "cosine_shuffled_after": last["eval_cos_shuffled"],
        "alignment_gap_before": first["eval_alignment_gap"],
        "alignment_gap_after": last["eval_alignment_gap"],
        "export_loss_on_the_whole_text": again["eval_loss"],
    }
    print(json.dumps(result, indent=2))


def run(config: Config, directory: Path) -> Trained:
    """Train in a directory of its own."""
    raw = dump_config(config)
    raw["run"]["dir"] = str(directory)
    return train(parse_config(raw), ["kava", "train", "configs/tinystories_260k.yaml"])


def without_teacher(config: Config) -> Config:
    """The same run by cross-entropy alone; the tokenizer was the teacher's."""
    raw = dump_config(config)
    raw["student"]["tokenizer"] = raw["teachers"][0]["path"]
    raw["teachers"] = []
    return parse_config(raw)


if __name__ == "__main__":
    main(*sys.argv[1:])
