"""The tables of docs/performance.md, each from the JSON that ``kava bench NAME --json`` wrote."""

from typing import Any

from lines import head, row

NAMES = {
    "kava": "kava_jax",
    "ours": "kava_jax",
    "read_modify": "a pass that reads both caches and writes one",
    "torch_eager": "PyTorch, eager",
    "torch_compiled": "PyTorch, torch.compile",
    "torch": "PyTorch, eager",
    "torch_compile": "PyTorch, torch.compile",
    "naive": "all logits at once",
    "transformers": "transformers `generate`",
    "transformers_one_thread": "transformers `generate`, one thread",
}


def bench_step(found: dict[str, Any]) -> list[str]:
    """The step beside the original's loop."""
    lines = head(
        " | seconds a step (least to most) | >tokens/s | >times ours | >memory beyond the "
        "models, GB"
    )
    for side, own in found["sides"].items():
        if "failed" in own:
            lines.append(f"| {NAMES[side]} | failed: {own['failed']} | | | |")
            continue
        cells = [NAMES[side], _seconds(own["seconds"])]
        cells += [f"{found['tokens_per_second'][side]:,.0f}"]
        cells += [f"{found['times_faster_than'].get(side, 1.0):.2f}"]
        lines.append(f"| {' | '.join(cells)} | {own['above_models'] / 1e9:.2f} |")
    ours = found["sides"]["ours"]
    floor, seconds = found["floor_flops"] / 1e9, ours["seconds"]["median"]
    return [
        *lines,
        "",
        f"Same first loss ({ours['first_loss']:.6f}). The floor of {floor:.0f} GFLOP is done at "
        f"{floor / seconds:.0f} GFLOP/s.",
    ]


def bench_step_huge_pages(found: dict[str, Any]) -> list[str]:
    """The same with huge pages, in a sentence."""
    sides = [
        f"{NAMES[side]} {own['seconds']['median']:.2f} s"
        + (f" ({found['times_faster_than'][side]:.2f} times ours)" if side != "ours" else "")
        for side, own in found["sides"].items()
        if "failed" not in own
    ]
    return [f"A step with huge pages on every side: {'; '.join(sides)}."]


def bench_loss(found: dict[str, Any]) -> list[str]:
    """The KV loss beside PyTorch and bare memory."""
    rest = [
        f"Temporaries of the compiled loss and gradient: {found['temporaries_of_inputs']:.3f} of "
        f"its inputs' bytes."
    ]
    rest += [f"{words}." for words in found["failed"].values()]
    return [*_beside(found), "", " ".join(rest)]


def bench_ce(found: dict[str, Any]) -> list[str]:
    """The LM head's cross-entropy beside the plain form."""
    lines = head("counted |  | seconds (least to most) | >times ours | >temporaries, MB")
    for case, own in found["cases"].items():
        for name, seconds in own["seconds"].items():
            cells = [f"{case}", NAMES[name], _seconds(seconds), f"{own['times_ours'][name]:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {own['temporary_bytes'][name] / 1e6:.0f} |")
    return lines


def bench_decode(found: dict[str, Any]) -> list[str]:
    """Decoding beside transformers."""
    return [*_beside(found), "", f"{found['tokens_per_second']:,.0f} tokens/s, tokens identical."]


def bench_teacher(found: dict[str, Any]) -> list[str]:
    """The cut teacher beside the whole one."""
    words = {
        "cut": "keys and values of the mapped layers",
        "half": "the same, first half of the layers mapped",
        "whole": "whole forward pass with logits",
        "tunix": "the same by Tunix",
    }
    lines = head(" | seconds (least to most) | >of the whole")
    for name, own in found["seconds"].items():
        lines.append(f"| {words[name]} | {_seconds(own)} | {found['of_whole'][name]:.2f} |")
    return lines


def bench_remat(found: dict[str, Any]) -> list[str]:
    """Recomputation: time against memory."""
    lines = head(
        "`student.remat` | seconds a step (least to most) | >times none | >temporaries, MB | "
        ">times none | >FLOPs, times none"
    )
    times = found["times_none"]
    for policy, own in found["seconds"].items():
        cells = [policy, _seconds(own), f"{times['seconds'][policy]:.2f}"]
        cells += [
            f"{found['temporaries'][policy] / 1e6:.0f}",
            f"{times['temporaries'][policy]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {times['flops'][policy]:.2f} |")
    return lines


def bench_scaling(found: dict[str, Any]) -> list[str]:
    """Exponents of the cost of a token."""
    words = {
        "length": "tokens of a row",
        "depth": "layers of both models",
        "rows": "rows of a batch",
    }
    lines = head("over | sizes | microseconds a token | >fitted exponent | >of the floor's FLOPs")
    for axis, curve in found["curves"].items():
        sizes, costs = curve["sizes"], curve["seconds_per_token"]
        cells = [words[axis], f"{sizes[0]} to {sizes[-1]}"]
        cells += [", ".join(f"{1e6 * cost:.0f}" for cost in costs)]
        cells += [f"{curve['exponent']:+.2f}", f"{curve['floor_exponent']:+.2f}"]
        lines.append(row(*cells))
    return lines


def bench_startup(found: dict[str, Any]) -> list[str]:
    """Waiting."""
    first = found["first_step_seconds"]
    return [
        "| | seconds |",
        "| --- | ---: |",
        f"| `kava --help` | {found['seconds']['help']['median']:.2f} |",
        f"| importing a class of the package | {found['seconds']['import']['median']:.2f} |",
        f"| the demo's first step, nothing compiled yet | {first['cold']:.1f} |",
        f"| the same with the cache of compiled programs | {first['warm']:.1f} |",
    ]


def bench_input(found: dict[str, Any]) -> list[str]:
    """Rows."""
    words = {"encode": "text to ids", "batch": "rows to batches", "put": "batches to devices"}
    return [
        "| | tokens/s |",
        "| --- | ---: |",
        *(f"| {words[n]} | {speed:,.0f} |" for n, speed in found["tokens_per_second"].items()),
    ]


def bench_import(found: dict[str, Any]) -> list[str]:
    """Weights."""
    words = {"import": "imported", "read": "only read"}
    return [
        f"| {found['bytes'] / 1e9:.2f} GB of weights | GB/s |",
        "| --- | ---: |",
        *(f"| {words[n]} | {s / 1e9:.2f} |" for n, s in found["bytes_per_second"].items()),
    ]


SPEED = {
    name: made for name, made in globals().items() if name.startswith("bench_") and callable(made)
}


def _beside(found: dict[str, Any]) -> list[str]:
    lines = head(" | seconds (least to most) | >times ours")
    for name, own in found["seconds"].items():
        lines.append(f"| {NAMES[name]} | {_seconds(own)} | {found['times_ours'][name]:.2f} |")
    return lines


def _seconds(own: dict[str, float]) -> str:
    digits = 4 if own["median"] < 0.1 else 2
    return f"{own['median']:.{digits}f} ({own['least']:.{digits}f} to {own['most']:.{digits}f})"
