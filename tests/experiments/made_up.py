"""Made-up results of a grid, as ``kava ablate`` would leave them."""

import json

import numpy as np

from kava_jax.experiments.results import pack

BASE = {
    "teachers": [{"name": "big", "path": "builtin:demo_teacher"}],
    "student": {"geometry": {"model_type": "qwen2", "num_hidden_layers": 2}},
    "data": {"path": "builtin:word_problems"},
}
FIGURES = ("cos_sim", "cos_centered", "cka", "retrieval", "retrieval_centered", "cos_constant")
STEPS = (0, 10, 20)


def outcome(seed, **values):
    """One run's record with nothing in it but what is given."""
    empty = {"layers": {}, "curve": [], "correct": {}, "samples": []}
    none = {"step_seconds": None, "gradient_norm": None}
    return (
        {"seed": seed, "identity": "", "data": f"rows of {seed}", "values": {}}
        | empty
        | none
        | values
    )


def made_up_run(seed, level, *, cosine=None, questions=64):
    """A run whose score is about ``level``; with a cosine it has a teacher of two layers."""
    rng = np.random.default_rng([seed, round(1000 * level)])
    right = rng.random(questions) < level
    old = rng.random(questions // 2) < level / 2
    loss = round(2 - level + rng.normal(0, 0.02), 4)
    curve = [
        {"step": step, "eval_loss": loss + (1 - step / 20) * 3, "exact_match_strict": None}
        for step in STEPS
    ]
    for point, share in zip(curve[1:], (0.5, 1.0), strict=True):
        point["exact_match_strict"] = share * float(right.mean())
    values = {
        "eval_loss": loss,
        "exact_match_strict": float(right.mean()),
        "exact_match_rows": float(questions),
        "old/exact_match_strict": float(old.mean()),
        "old/eval_loss": loss + 1,
    }
    layers = {}
    if cosine is not None:
        near = cosine + rng.normal(0, 0.01)
        values |= {"eval_cos_sim": near, "eval_alignment_gap": near / 2}
        for point in curve:
            point |= {
                "eval_cos_sim": near * point["step"] / 20,
                "eval_alignment_gap": near / 2 * point["step"] / 20,
            }
        layers = {
            f"big/{figure}_{part}": rng.uniform(0.3, 0.9, 2).round(3).tolist()
            for figure in FIGURES
            for part in "kv"
        }
        for quantile, ratio in (("q10", 0.5), ("q50", 0.9), ("q90", 1.5)):
            layers |= {f"big/mag_ratio_{quantile}_{part}": [ratio, 1.1 * ratio] for part in "kv"}
    return outcome(
        seed,
        values=values,
        layers=layers,
        curve=curve,
        correct={"held_out": pack(right.tolist()), "old": pack(old.tolist())},
        step_seconds=0.02 if cosine is None else 0.03,
        gradient_norm={"median": 1.0, "log_std": 0.25 + level / 10, "intervals": 40},
        samples=[
            {
                "question": f"How many apples has child {place} of seed {seed}?",
                "generated": f" 2*{place}=<<2*{place}={2 * place}>>{2 * place}\n#### {2 * place}",
                "gold": str(2 * place),
            }
            for place in range(3)
        ],
    )


def write_results(directory, runs, *, seeds=(0, 1, 2), baseline="ce", fields=None, **grid):
    """``grid.json`` and ``runs.jsonl``; an arm may have an empty list of runs."""
    directory.mkdir(parents=True, exist_ok=True)
    arms = {arm: (fields or {}).get(arm, {}) for arm in runs}
    content = {
        "grid": {
            "name": "made-up",
            "config": "demo.yaml",
            "seeds": list(seeds),
            "baseline": baseline,
            "arms": arms,
            **grid,
        },
        "base": BASE,
        "versions": {"python": "3.11", "jax": "0.10.2"},
    }
    (directory / "grid.json").write_text(json.dumps(content))
    lines = [json.dumps({"arm": arm, **run}) for arm, own in runs.items() for run in own]
    (directory / "runs.jsonl").write_text("\n".join(lines))
    return directory


def write_made_up(directory, *, seeds=(0, 1, 2), arms=None, questions=64, **grid):
    """By default three arms: cross-entropy, logit KL, and one with a teacher's cache."""
    levels = arms or {"ce": (0.3, None), "kl": (0.4, None), "kv": (0.6, 0.9)}
    runs = {
        arm: [made_up_run(s, level, cosine=cosine, questions=questions) for s in seeds]
        for arm, (level, cosine) in levels.items()
    }
    return write_results(directory, runs, seeds=seeds, **grid)


def change_run(directory, arm, place, change):
    """Change a run's line in place, counted from 0 among its arm's."""
    path = directory / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    change([run for run in runs if run["arm"] == arm][place])
    path.write_text("\n".join(map(json.dumps, runs)))
