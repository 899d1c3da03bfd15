"""Tables of what the accelerators' compilers say of the named step; see accelerators.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lines import head, row

HERE = Path(__file__).resolve().parent


def accelerators(found: dict[str, Any]) -> list[str]:
    """Programs by chip and mesh, then the largest batches, then what the step cost before."""
    lines = head(
        "chips | mesh | >rows | >tokens | >arguments, GB | >temporaries, GB | >TFLOPs | "
        ">products in bf16 | >LM head's products | >attention kernels"
    )
    for one in found["programs"]:
        times = sum(one["products"].values())
        cells = [f"{one['devices']} x {one['chip']}", one["mesh"], one["rows"], one["length"]]
        cells += [_gigabytes(one["arguments"]), _gigabytes(one["temporaries"])]
        cells += ["" if one["tflops"] is None else f"{one['tflops']:.1f}"]
        cells += [f"{one['products']['bf16']} of {times}", sum(one["head"].values())]
        lines.append(row(*cells, one["attention_kernels"]))
    return [*lines, "", *_boundaries(found["plans"]), "", *_before(found["programs"])]


def _boundaries(plans: list[dict[str, Any]]) -> list[str]:
    lines = head(
        "chips | >of a device's memory | >most rows of 512 | >need, GB | >next | >needs, GB "
        "| >limit, GB | >estimated temporaries at 32 rows, GB | >compiled, GB"
    )
    for plan in plans:
        ends = (plan["estimated"][end] for end in ("least", "most"))
        estimate = " to ".join(map(_gigabytes, ends))
        for one in plan["boundaries"]:
            cells = [f"{plan['devices']} x {plan['chip']}", one["fraction"]]
            for tried in (one["fits"], one["beyond"]):
                cells += [tried["rows"], _gigabytes(tried["arguments"] + tried["temporaries"])]
            cells += [_gigabytes(one["limit"]), estimate, _gigabytes(plan["temporaries"]["most"])]
            lines.append(row(*cells))
    return lines


def _before(programs: list[dict[str, Any]]) -> list[str]:
    """One device, 32 rows of 512: the step as it was and as it is."""
    before = json.loads((HERE / "accelerators_before.json").read_text(encoding="utf-8"))["programs"]
    lines = head(
        "32 rows of 512 on one | >temporaries before, GB | >now | >TFLOPs before | >now | "
        ">LM head's logits before | >now"
    )
    for old in before:
        same = ("chip", "devices", "mesh", "rows", "length")
        (new,) = (one for one in programs if all(one[key] == old[key] for key in same))
        cells: list[Any] = [old["chip"]]
        cells += [_gigabytes(one["temporaries"]) for one in (old, new)]
        cells += [f"{one['tflops']:.1f}" for one in (old, new)]
        lines.append(row(*cells, *(f"{one['head']['logits']} times" for one in (old, new))))
    return lines


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


COMPILED: dict[str, Callable[[dict[str, Any]], list[str]]] = {"accelerators": accelerators}
