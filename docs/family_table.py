"""The table of model families in docs/models.md, written from the code's own.

python docs/family_table.py    rewrite it
"""

import re
from pathlib import Path

from kava_jax.hf.families import FAMILIES, Family

PAGE = Path(__file__).resolve().parent / "models.md"
MARKS = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.S)
NORMS = {"before": "before", "after": "after", "both": "before and after"}


def listed() -> str:
    """One row for each family."""
    head = "| `model_type` | models | sliding window | rotation | norms | further |"
    rows = [_row(name, family) for name, family in FAMILIES.items()]
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *rows])


def filled(page: str) -> str:
    """The page with the table rewritten."""
    return MARKS.sub(lambda match: f"{match[1]}{listed()}\n{match[2]}", page)


def _row(name: str, family: Family) -> str:
    layers = family.layers
    window = "all layers" if family.slides is None else "by layer"
    rotation = "part of a head" if family.partial_rotary else "whole heads"
    rotation = "not every layer" if family.skips_rotation else rotation
    rotation = "two bases" if family.sliding_rope_theta else rotation
    norms = NORMS[layers.get("norm_places", "before")]
    if layers.get("qk_norm"):
        over = "all heads" if layers.get("qk_norm_over_heads") else "each head"
        norms += f"; queries and keys over {over}"
    further = ["fused projections"] if layers.get("projections") == "fused" else []
    further += ["mixture of experts"] if family.experts else []
    further += ["GELU"] if layers.get("activation") else []
    further += [f"`{key}`" for key in family.scales]
    window = "" if family.never_slides else window
    return (
        f"| `{name}` | {family.models} | {window} | {rotation} | {norms} | {', '.join(further)} |"
    )


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
