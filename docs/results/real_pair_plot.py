"""Draw docs/results/real_pair.png from real_pair.jsonl: python docs/results/real_pair_plot.py."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from real_pair_table import records

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
CUTS = {
    "15-evenly": "every second of 30 layers kept",
    "15-middle": "a block of 15 layers cut out",
    "1-kv-head": "three KV heads merged into one",
}
LOSSES = {"kl": ("C0", "KL"), "kl+mercator": ("C1", "KL + Mercator")}


def main() -> None:
    """One panel a cut: held-out loss while healing, thin by seed and thick in the mean."""
    figure, panels = plt.subplots(1, len(CUTS), figsize=(10, 3.4), layout="constrained")
    for panel, (cut, title) in zip(panels, CUTS.items(), strict=True):
        for losses, (color, words) in LOSSES.items():
            curves = [
                # The cut student's loss before step 1 would flatten all that follows.
                [(point["step"], point["eval_loss"]) for point in line["curve"] if point["step"]]
                for line in records()
                if line["arm"] == f"{cut}/{losses}" and line["steps"] == 60
            ]
            if not curves:
                continue
            for curve in curves:
                panel.plot(*zip(*curve, strict=True), color=color, alpha=0.3, linewidth=0.8)
            mean = np.mean(curves, axis=0)
            seeds = f"{len(curves)} seed{'s' * (len(curves) > 1)}"
            panel.plot(*mean.T, "o-", color=color, label=f"{words} ({seeds})")
        panel.set(title=title, xlabel="step", xticks=(20, 40, 60))
        panel.legend(frameon=False)
    panels[0].set_ylabel("held-out loss, nats a token")
    figure.savefig(HERE / "real_pair.png", dpi=120)


if __name__ == "__main__":
    main()
