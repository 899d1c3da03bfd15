"""Does ``loss.kv_weight=auto(0.2)`` hold the KV gradient at a fifth of the cross-entropy gradient?

    python docs/results/auto_share.py > docs/results/auto_share.json

Runs ``configs/demo.yaml`` for 500 steps with a probe every 10 steps. The step measures its weight
every 20 steps, on its whole batch. A probe reads 8 rows of it, whose gradients are noisier, so the
median over every 50 steps is given, too.
"""

import json
import statistics
import tempfile

from kava_jax.config.file import load_config, shipped_config
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.runs.train import train

SHARE, STEPS, WINDOW = 0.2, 500, 50


def main() -> None:
    """Run, and print one JSON document."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.dir={folder}/run", f"loss.kv_weight=auto({SHARE})"]
        overrides += [f"train.steps={STEPS}", "train.diagnose_every=10", "train.eval_every=null"]
        config = load_config(
            shipped_config("demo.yaml"), [*overrides, "eval.max_new_tokens=0", "data.eval_rows=64"]
        )
        run = train(config, ["python", "docs/results/auto_share.py"])
        probes = read_metrics(run.run.directory / METRICS_NAME, "diagnostics")
    # At the first probe nothing has been measured yet, and the weight is 1.
    shares = {probe["step"]: probe["kv_gradient_share"] for probe in probes[1:]}
    windows = [
        statistics.median(value for step, value in shares.items() if first <= step < first + WINDOW)
        for first in range(0, STEPS, WINDOW)
    ]
    result = {
        "asked": SHARE,
        "steps": STEPS,
        "window_steps": WINDOW,
        "median_by_window": windows,
        "least_window": min(windows),
        "most_window": max(windows),
        "probes": len(shares),
        "probes_within_half_and_double": sum(
            SHARE / 2 <= value <= 2 * SHARE for value in shares.values()
        ),
        "share_by_step": shares,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
