"""Draw docs/results/handoff.png from bench_handoff.json: python docs/results/handoff_plot.py."""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
SIDES = {"teacher": "teacher alone", "handed": "handed over", "student": "student alone"}


def main() -> None:
    """Seconds of the longest answer, and bytes of a cache, over the length of the prompt."""
    cases = json.loads((HERE / "bench_handoff.json").read_text(encoding="utf-8"))["cases"].values()
    longest = max(own["answer"] for own in cases)
    shown = [own for own in cases if own["answer"] == longest]
    prompts = [own["prompt"] for own in shown]
    figure, (seconds, megabytes) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for side, words in SIDES.items():
        times = [own["seconds"][side] for own in shown]
        spread = [
            [own["median"] - own["least"] for own in times],
            [own["most"] - own["median"] for own in times],
        ]
        middle = [own["median"] for own in times]
        seconds.errorbar(prompts, middle, spread, marker="o", capsize=3, label=words)
    seconds.set(ylabel=f"seconds for {longest} tokens of answer", ylim=(0, None))
    for name, words in (("teacher_bytes", "teacher's own"), ("handed_bytes", "handed over")):
        sizes = [own["facts"]["handed"][name] / 1e6 for own in shown]
        megabytes.plot(prompts, sizes, "o-", label=words)
    megabytes.set(ylabel="MB of one prompt's cache", ylim=(0, None))
    for panel in (seconds, megabytes):
        panel.set(xlabel="tokens of the prompt")
        panel.set_xscale("log", base=2)
        panel.set_xticks(prompts, [str(prompt) for prompt in prompts])
        panel.legend(frameon=False)
    figure.savefig(HERE / "handoff.png", dpi=120)


if __name__ == "__main__":
    main()
