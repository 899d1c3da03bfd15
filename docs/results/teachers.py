"""Two and three teachers on the demo's data, under every router.

    python docs/results/teachers.py > docs/results/teachers.json

Beside the demo's teacher (expert) stand a novice (the demo's student after 300 steps by
cross-entropy alone) and a stranger (the expert's geometry with random weights). Each run is
``configs/demo.yaml`` for 400 steps. About eight minutes on 2 CPU cores.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kava_jax.config_file import load_config, shipped_config
from kava_jax.runs.export import export
from kava_jax.runs.train import train

STEPS, NOVICE_STEPS = 400, 300
EXPERT = "builtin:demo_teacher"


def main() -> None:
    """Run everything, and print one JSON document."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        paths = {
            "expert": EXPERT,
            "novice": model(
                out, "novice", "demo.yaml", ["teachers=[]", f"train.steps={NOVICE_STEPS}"]
            ),
            "stranger": model(
                out, "stranger", "demo_teacher.yaml", ["train.steps=1", "optimizer.student_lr=0"]
            ),
        }
        runs = [(["expert"], "fixed")]
        for names in (["expert", "stranger"], ["expert", "novice", "stranger"]):
            runs += [(names, router) for router in ("fixed", "similarity", "learned")]
        result = {
            "steps": STEPS,
            "runs": [distil(out, {name: paths[name] for name in names}, r) for names, r in runs],
        }
    print(json.dumps(result, indent=2))


def model(out: Path, name: str, config: str, overrides: list[str]) -> str:
    """Train without a teacher and export."""
    settings = [
        "student.tokenizer=builtin:tokenizer",
        "eval.exact_match=false",
        "optimizer.warmup_steps=0",
    ]
    settings += ["train.eval_every=null", "data.eval_rows=64", f"run.dir={out / name}"]
    run = train(load_config(shipped_config(config), settings + overrides), sys.argv)
    export(run.run, run.state, out / f"{name}-export")
    return str(out / f"{name}-export")


def distil(out: Path, teachers: dict[str, str], router: str) -> dict[str, Any]:
    """One run; how each teacher was weighted and matched on held-out rows, and the answers."""
    listed = json.dumps([{"name": name, "path": path} for name, path in teachers.items()])
    if router == "fixed":  # weights that sum to 1, as those of the other routers do
        listed = json.dumps(
            [{"name": n, "path": p, "weight": 1 / len(teachers)} for n, p in teachers.items()]
        )
    overrides = [f"teachers={listed}", f"router.kind={router}", f"train.steps={STEPS}"]
    overrides += ["train.eval_every=null", f"run.dir={out / router}-{len(teachers)}"]
    found = train(load_config(shipped_config("demo.yaml"), overrides), sys.argv).evaluation
    several = len(teachers) > 1

    def of(name: str, figure: str) -> float | None:
        return found.get(f"eval_{name}/{figure}" if several else f"eval_{figure}")

    return {
        "router": router,
        "loss": found["eval_loss"],
        "exact_match": found["exact_match_strict"],
        "router_entropy": found.get("eval_router_entropy"),
        "teachers": {
            name: {
                "share": of(name, "route") if router != "fixed" else 1 / len(teachers),
                "cos_sim": of(name, "cos_sim"),
                "alignment_gap": of(name, "alignment_gap"),
            }
            for name in teachers
        },
    }


if __name__ == "__main__":
    main()
