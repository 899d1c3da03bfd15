"""The tables of docs/performance.md, each from the JSON that ``kava bench NAME --json`` wrote."""

from typing import Any

from lines import head, row

NAMES = {
    "kava": "kava_jax",
    "read_modify": "a pass that reads both caches and writes one",
    "torch_eager": "PyTorch, eager",
    "torch_compiled": "PyTorch, torch.compile",
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
    for side, own in found["seconds"].items():
        cells = [NAMES[side], _seconds(own), f"{found['tokens_per_second'][side]:,.0f}"]
        cells += [f"{found['times_ours'][side]:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {found['facts'][side]['above_models'] / 1e9:.2f} |")
    lines += [f"| {NAMES[side]} | failed: {said} | | | |" for side, said in found["failed"].items()]
    ours, seconds = found["facts"]["kava"], found["seconds"]["kava"]["median"]
    floor = ours["flops"] / 1e9
    return [
        *lines,
        "",
        f"Same first loss ({ours['first_loss']:.6f}). The floor of {floor:.0f} GFLOP is done at "
        f"{floor / seconds:.0f} GFLOP/s.",
    ]


def bench_step_huge_pages(found: dict[str, Any]) -> list[str]:
    """The same with huge pages, in a sentence."""
    sides = [
        f"{NAMES[side]} {own['median']:.2f} s"
        + (f" ({found['times_ours'][side]:.2f} times ours)" if side != "kava" else "")
        for side, own in found["seconds"].items()
    ]
    return [f"A step with huge pages on every side: {'; '.join(sides)}."]


def bench_loss(found: dict[str, Any]) -> list[str]:
    """The KV loss beside PyTorch and bare memory."""
    ours = found["facts"]["kava"]
    rest = [
        f"Temporaries of the compiled loss and gradient: "
        f"{ours['temporaries'] / ours['inputs']:.3f} of its inputs' bytes."
    ]
    rest += [f"{words}." for words in found["failed"].values()]
    return [*_beside(found), "", " ".join(rest)]


def bench_ce(found: dict[str, Any]) -> list[str]:
    """The LM head's cross-entropy beside the plain form."""
    lines = head("counted |  | seconds (least to most) | >times ours | >temporaries, MB")
    for case, own in found["cases"].items():
        for name, seconds in own["seconds"].items():
            cells = [f"{case}", NAMES[name], _seconds(seconds), f"{own['times_ours'][name]:.2f}"]
            temporaries = own["facts"][name]["temporaries"] / 1e6
            lines.append(f"| {' | '.join(cells)} | {temporaries:.0f} |")
    return lines


def bench_decode(found: dict[str, Any]) -> list[str]:
    """Decoding beside transformers."""
    speed = found["tokens_per_second"]["kava"]
    return [*_beside(found), "", f"{speed:,.0f} tokens/s, tokens identical."]


def bench_handoff(found: dict[str, Any]) -> list[str]:
    """Answers from a handed-over cache beside either model by itself."""
    lines = head(
        "prompt + answer | >handed over | >of it before the answer | >teacher alone | >student "
        "alone | >MB handed over | >of the teacher's cache"
    )
    for case, own in found["cases"].items():
        sides = ("handed", "reading", "teacher", "student")
        cells = [case, *(f"{own['seconds'][side]['median']:.3f}" for side in sides)]
        carried, whole = (own["facts"]["handed"][f"{side}_bytes"] for side in ("handed", "teacher"))
        lines.append(row(*cells, f"{carried / 1e6:.2f}", f"{carried / whole:.2f}"))
    return lines


def bench_teacher(found: dict[str, Any]) -> list[str]:
    """The cut teacher beside the whole one."""
    words = {
        "cut": "keys and values of the mapped layers",
        "half": "the same, first half of the layers mapped",
        "whole": "whole forward pass with logits",
        "tunix": "the same by Tunix",
    }
    lines = head(" | seconds (least to most) | >of the whole")
    whole = found["seconds"]["whole"]["median"]
    for name, own in found["seconds"].items():
        lines.append(f"| {words[name]} | {_seconds(own)} | {own['median'] / whole:.2f} |")
    return lines


def bench_remat(found: dict[str, Any]) -> list[str]:
    """Recomputation: time against memory."""
    lines = head(
        "`student.remat` | seconds a step (least to most) | >times none | >temporaries, MB | "
        ">times none | >FLOPs, times none"
    )
    none = found["facts"]["none"]
    for policy, own in found["facts"].items():
        cells = [policy, _seconds(found["seconds"][policy]), f"{found['times_ours'][policy]:.2f}"]
        temporaries = own["temporaries"]
        cells += [f"{temporaries / 1e6:.0f}", f"{temporaries / none['temporaries']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {own['flops'] / none['flops']:.2f} |")
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


SPEED: dict[str, Any] = {
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
