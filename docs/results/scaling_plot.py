"""Draw docs/results/scaling.png from bench_scaling.json: python docs/results/scaling_plot.py."""

import json
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
WORDS = {"length": "tokens of a row", "depth": "layers of both models", "rows": "rows of a batch"}


def main() -> None:
    """One panel an axis: measured time of a token, and its fitted power law."""
    found = json.loads((HERE / "bench_scaling.json").read_text(encoding="utf-8"))
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    for panel, (axis, curve) in zip(panels, found["curves"].items(), strict=True):
        sizes, costs = curve["sizes"], [1e6 * cost for cost in curve["seconds_per_token"]]
        of_size, of_cost = (sum(map(math.log, x)) / len(x) for x in (sizes, costs))
        fitted = [
            math.exp(of_cost + curve["exponent"] * (math.log(size) - of_size)) for size in sizes
        ]
        panel.plot(sizes, costs, "o", label="measured")
        panel.plot(sizes, fitted, "-", label=f"size to the power {curve['exponent']:+.2f}")
        panel.set(xscale="log", yscale="log", xlabel=WORDS[axis])
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.legend(frameon=False)
    panels[0].set_ylabel("microseconds a token")
    figure.savefig(HERE / "scaling.png", dpi=120)


if __name__ == "__main__":
    main()
