"""A student that answers from its teacher's prompt cache, on a real pretrained pair. The study.

    python docs/results/handoff_pair.py prepare GSM8K_DIR       questions and answers
    python docs/results/handoff_pair.py heal kl kl+mercator     the cut students to begin with
    python docs/results/handoff_pair.py arms kl/alone 'kl/*'    run some of the arms
    python docs/results/handoff_pair.py plan                    the arms, done and to do
    python docs/results/handoff_pair.py bench                   seconds of each step
    python docs/results/handoff_pair.py table                   what came out

Run it after ``real_pair.py prepare`` and ``correct gsm8k``, which make model, teacher and cut. All
but ``handoff_pair.jsonl`` and ``handoff_pair_seconds.json`` stays in ``build/real_pair``. An arm
goes on from a student that ``heal`` cut and healed (60 steps, as ``real_pair.py`` does), and learns
GSM8K's answers for 40 steps more. Rates are chosen by the run's evaluations on ``choose``; the
table tells the loss of answers on ``report``.

The contrast, declared before any of its runs: the student of ``both`` from its teacher's cache
minus the student of ``alone`` by itself, each after KL + Mercator healed it, loss of answers on
``report``, seeds 1 to 6; at equal steps, and with ``both`` stopped when the time of ``alone``'s 40
steps is over:

    python docs/results/handoff_pair.py arms kl+mercator/alone kl+mercator/both --seeds 1 2 3 4 5 6
    python docs/results/handoff_pair.py arms kl+mercator/both --in-time-of alone --seeds 1 2 3 4 5 6

A second one, declared after seed 0 of all of them and three seeds of ``both``, and before any fresh
seed of its own: the same two comparisons for ``handed``, in which the student reads no row by
itself.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from handoff_pair_table import HANDOFF_SECONDS, LONG, RESULTS, WAYS, handoff_pair, seconds
from lines import page
from real_pair import arm_config, in_turns, of_run, trained
from real_pair_measure import WORK, rounded
from real_pair_table import append, records

from kava_jax.cache import HandedOver
from kava_jax.config.file import dump_config, parse_config
from kava_jax.config.run import Config
from kava_jax.data.batches import Batch, eval_batches
from kava_jax.data.dataset import HeldOut
from kava_jax.data.text import Encoded
from kava_jax.journal.manifest import versions
from kava_jax.models.decoder import Params
from kava_jax.runs.prepare import Run, data_loader, prepare
from kava_jax.training.comparison import ForwardPass, forward

STEPS, ROWS, LENGTH, REPORTED = 40, 4, 256, 96
CUT = "15-middle"
TEXTS = WORK / "texts"
TEACHER = WORK / "teachers" / "gsm8k"

MODES = {
    "alone": ("teachers=[]",),
    "both": ("loss.handoff={alone_share: 0.5}",),
    "handed": ("loss.handoff={alone_share: 0}",),
    "both+kv": ("loss.handoff={alone_share: 0.5}", "loss.kv_weight=auto(0.2)"),
    "ratio map": ("loss.handoff={alone_share: 0.5, layer_map: ratio}",),
    "alone, KL": ("loss.kl_weight=1",),
    "both, KL": ("loss.kl_weight=1", "loss.handoff={alone_share: 0.5}"),
}


class Arm(NamedTuple):
    """One training: who begins, and how it goes on."""

    healed: str
    mode: str
    changes: tuple[str, ...] = ()


ARMS = {f"{healed}/{mode}": Arm(healed, mode) for healed in ("kl", "kl+mercator") for mode in MODES}
ARMS |= {
    f"rate/{rate}": Arm("kl", "alone", (f"optimizer.student_lr={rate}",)) for rate in (1e-4, 4e-4)
}


def prepare_rows(gsm8k: Path) -> None:
    """Questions with answers; held-out ones go to the two files in turns."""
    rows = {
        split: (gsm8k / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        for split in ("train", "test")
    }
    parts = {"train": rows["train"], "choose": rows["test"][::2], "report": rows["test"][1::2]}
    for name, lines in parts.items():
        text = "".join(f"{line}\n" for line in lines)
        (TEXTS / f"gsm8k_answers_{name}.jsonl").write_text(text, encoding="utf-8")


def heal(losses: str) -> None:
    """Cut and heal a student, and keep it; what it answers untrained is a line of its own."""
    config, out = arm_config(f"{CUT}/{losses}", 0, 60), WORK / "healed" / losses
    if not out.is_dir():
        directory, _ = trained(config, out)
        shutil.rmtree(directory / "checkpoints")
    record({"arm": f"{losses}/untrained", "seed": 0, "healed": losses, "mode": "", "steps": 0}, out)


def config_of(name: str, seed: int, steps: int = STEPS) -> Config:
    """The config of an arm."""
    arm = ARMS[name]
    raw: dict[str, Any] = {
        "teachers": [{"name": "smollm2", "path": str(TEACHER)}],
        "student": {"path": str(WORK / "healed" / arm.healed)},
        "projector": {"kind": "identity"},
        "loss": {"kv_weight": 0.0},
        "data": {
            "path": str(TEXTS / "gsm8k_answers_train.jsonl"),
            "eval_path": str(TEXTS / "gsm8k_answers_choose.jsonl"),
            "eval_rows": 32,
            "format": "{prompt}\n{answer}",
            "max_length": LENGTH,
            "bucket": LENGTH,
            "batch_size": ROWS,
        },
        "optimizer": {"student_lr": 2e-4, "b2": 0.95, "warmup_steps": 5},
        "train": {"log_every": 5, "eval_every": 20, "max_to_keep": 1, "diagnose_every": None},
        "eval": {"max_new_tokens": 0},
    }
    run = re.sub(r"[^\w.]+", "-", f"handoff-{name}-{steps}-{seed}")
    own = [f"run.seed={seed}", f"train.steps={steps}", *of_run(run)]
    return parse_config(raw, [*own, *MODES[arm.mode], *arm.changes])


def run_arm(name: str, seed: int, steps: int) -> None:
    """Train, measure, and append the line."""
    config = config_of(name, seed, steps)
    out = WORK / "exports" / config.run.name
    directory, facts = trained(config, out)
    line = {"arm": name, "seed": seed, **ARMS[name]._asdict(), "steps": steps}
    line |= {"changes_by": MODES[ARMS[name].mode], "rate": config.optimizer.student_lr, **facts}
    record(line, out)
    shutil.rmtree(out)
    shutil.rmtree(directory / "checkpoints")


def record(line: dict[str, Any], student: Path) -> None:
    """Measure a student, append its line, and say what came out.

    The controls are measured once, of seed 0: measuring takes as long as training.
    """
    alone = line["mode"].startswith("alone")
    once = line["seed"] == 0 and not line.get("changes")
    ways = (*WAYS, *LONG) if once else ("alone",) if alone else ("alone", "handed")
    figures = measured(student, ways)
    told = ", ".join(f"{way} {figures[way]}" for way in WAYS if way in figures)
    append(line | {"figures": figures}, told, RESULTS)


def measured(student: Path, ways: tuple[str, ...]) -> dict[str, Any]:
    """Losses of answers on ``report``, as a whole and by row, in nats a token.

    ``alone``: the student by itself; ``handed``: from the teacher's cache of the prompt; ``wrong``:
    from its cache of another row; ``none``: of the prompt's last token alone; ``teacher``: the
    teacher by itself; ``long alone`` and ``long handed``: with the two rows before it in the
    prompt. ``ways`` says which of them.
    """
    # With logit KL a teacher is loaded whole.
    config = dump_config(config_of("kl/both, KL", 0))
    run = prepare(parse_config(config, [f"student.path={student}"]))
    rows = HeldOut.of(
        data_loader(run)(str(TEXTS / "gsm8k_answers_report.jsonl"), split="test", rows=REPORTED),
        run.encoder,
    ).measured
    models = run.blueprint.load_student(), run.blueprint.load_teachers()
    losses = partial(losses_by_row, run, models)
    found = losses(rows, ways, LENGTH)
    if "none" in ways:
        bare = [Encoded(row.ids[row.prompt_length - 1 :], 1, False) for row in rows]
        found["none"] = losses(bare, ("alone",), LENGTH)["alone"]
    if LONG[0] in ways:
        long = losses(with_two_before(rows), ("alone", "handed"), 3 * LENGTH)
        found |= {way: long[way.removeprefix("long ")] for way in LONG}
    tokens = found.pop("tokens")
    return {
        "tokens": int(tokens.sum()),
        **{name: rounded(own.sum() / tokens.sum()) for name, own in found.items()},
        **{f"row_{name}": list(map(rounded, own / tokens)) for name, own in found.items()},
    }


def with_two_before(rows: list[Encoded]) -> list[Encoded]:
    """Each row with the two before it as a part of its prompt (before the first, the last two)."""
    behind = []
    for i, row in enumerate(rows):
        shown = np.concatenate([rows[i - 2].ids, rows[i - 1].ids])
        ids = np.concatenate([shown, row.ids])
        behind.append(Encoded(ids, len(shown) + row.prompt_length, row.truncated))
    return behind


def losses_by_row(
    run: Run, models: Any, rows: list[Encoded], ways: tuple[str, ...], length: int
) -> dict[str, Any]:
    """``by_row`` of all rows."""
    batches = eval_batches(rows, batch_size=ROWS, max_length=length, bucket=length)
    read, by_teacher = jax.jit(partial(by_row, run, ways)), jax.jit(partial(vectors, run))
    parts = []
    for batch in batches:
        known = None
        if "handed" in ways:
            known = on_disk(batch, partial(by_teacher, models[1], batch))
        parts.append(read(*models, known, batch))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def vectors(run: Run, teachers: dict[str, Params], batch: Batch) -> dict[str, Any]:
    """The teacher's keys and values of a batch."""
    ((name, link),) = run.blueprint.objective.teachers.items()
    return forward(link.graph, teachers[name], batch).vectors


def on_disk(batch: Batch, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the teacher makes of a batch, kept for the next student: it is the same for all."""
    name = hashlib.sha256(np.asarray(batch.tokens).tobytes()).hexdigest()[:16]
    file, weights = WORK / "read" / f"{name}.npz", TEACHER / "model.safetensors"
    if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
        file.parent.mkdir(exist_ok=True)
        # Renamed when it is whole: another process may look for it.
        partly = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(partly, **read())
        partly.rename(file)
    return dict(np.load(file))


def by_row(
    run: Run,
    ways: tuple[str, ...],
    student: Params,
    teachers: dict[str, Params],
    known: Any,
    batch: Batch,
) -> dict[str, Any]:
    """Sums over each row's answer [B], and its tokens; ``known`` are the teacher's vectors."""
    objective = run.blueprint.objective
    term = objective.handoff
    assert term is not None
    ((name, link),) = objective.teachers.items()
    # The compiler leaves out what no way asks for.
    teacher = forward(link.graph, teachers[name], batch)
    everyone = jnp.ones(len(batch.tokens), bool)
    given = partial(term.past, {}, batch, everyone, {name: teacher._replace(vectors=known)})

    def wrong(rotation: Any) -> HandedOver:
        past = given(rotation)
        return past._replace(cache=jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), past.cache))

    asked = {"alone": None, "handed": given, "wrong": wrong}
    passes = {
        way: forward(objective.student, student, batch, handed=how)
        for way, how in asked.items()
        if way in ways
    }
    passes |= {"teacher": teacher} if "teacher" in ways else {}
    sums = {way: _answer_loss(one, batch) for way, one in passes.items()}
    return sums | {"tokens": batch.loss_mask[:, 1:].sum(-1)}


def _answer_loss(run: ForwardPass, batch: Batch) -> jax.Array:
    logits = jax.nn.log_softmax(run.model.logits(run.hidden[:, :-1]))
    losses = -jnp.take_along_axis(logits, batch.tokens[:, 1:, None], -1)[..., 0]
    return jnp.where(batch.loss_mask[:, 1:], losses, 0).sum(-1)


def bench() -> None:
    """Seconds of a step of every mode, in turns."""
    configs = {mode: config_of(f"kl/{mode}", 0) for mode in MODES}
    found = {"versions": versions(), "seconds": in_turns(configs)}
    HANDOFF_SECONDS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("gsm8k", type=Path)
    commands.add_parser("heal").add_argument("losses", nargs="+")
    several = commands.add_parser("arms")
    several.add_argument("patterns", nargs="+", metavar="NAME")
    several.add_argument("--seeds", type=int, nargs="+", default=[0])
    several.add_argument(
        "--in-time-of", metavar="MODE", help="as many steps as that mode's time has"
    )
    for name in ("plan", "bench", "table"):
        commands.add_parser(name)
    given = parser.parse_args()
    done = {(line["arm"], line["seed"], line["steps"]) for line in records(RESULTS)}
    if given.command == "prepare":
        prepare_rows(given.gsm8k)
    elif given.command == "heal":
        for losses in given.losses:
            if (f"{losses}/untrained", 0, 0) not in done:
                heal(losses)
    elif given.command == "arms":
        for name in ARMS:
            wanted = any(fnmatch(name, pattern) for pattern in given.patterns)
            ratio = (
                seconds()[given.in_time_of] / seconds()[ARMS[name].mode] if given.in_time_of else 1
            )
            steps = int(STEPS * ratio)
            for seed in given.seeds if wanted else ():
                if (name, seed, steps) not in done:
                    run_arm(name, seed, steps)
    elif given.command == "plan":
        known = {name for name, *_ in done}
        print("\n".join(f"{'done' if name in known else '    '}  {name}" for name in ARMS))
    elif given.command == "bench":
        bench()
    else:
        print(page(handoff_pair()))


if __name__ == "__main__":
    main()
