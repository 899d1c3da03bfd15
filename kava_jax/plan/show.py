"""A plan in words."""

from collections.abc import Sequence

from kava_jax.plan.chips import ASSUMPTIONS
from kava_jax.plan.gpus import GPUS
from kava_jax.plan.most_rows import Boundary
from kava_jax.plan.planning import NARROWEST, SHARE_VARIABLE, SHARES, Plan, Range

# Decimal, as makers give device memory; compilers' own messages use binary units.
GB = 1e9


def render(plan: Plan) -> str:
    """Everything about one mesh, as lines."""
    written = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    peak, speed = _gigabytes(plan.peak), _span(plan.tokens_per_second, 0)
    lines = [
        f"{plan.name} on {plan.devices} x {plan.chip} ({written}), "
        f"{plan.rows} rows x {plan.length} tokens a step",
        "",
        "memory of one device" + " " * 16 + "GB",
        *(_row(name, f"{size / GB:.2f}", "exact") for name, size in plan.held.items()),
        _row("gradients, activations", _gigabytes(plan.temporaries), _kind(plan)),
        _row("peak", peak, f"{_kind(plan)}; {plan.verdict} in {plan.hbm / GB:g} GB"),
        *(f"  {line}" for line in _largest(plan)),
        "",
        "one step of one device",
        _row("TFLOPs", f"{plan.flops / 1e12:.2f}", "exact, matrix products"),
        _row("over the floor", f"{plan.flops_over_floor:.2f}x", "the fewest that a step can do"),
        *(_row(f"{kind}, GB", f"{sent / GB:.2f}", "exact") for kind, sent in plan.messages.items()),
        *(
            _row(f"{name}, s", f"{plan.time[name]:.3f}", "estimate")
            for name in ("products", "memory", "messages")
        ),
        _row("step, s", _step_seconds(plan), f"estimate; {speed} tokens/s in all"),
        "",
        *_assumed(plan),
    ]
    return "\n".join(lines)


def render_search(plans: Sequence[Plan]) -> str:
    """The meshes that fit, the fastest first, and the first of them in full."""
    header = "  data  fsdp  tensor   peak, GB      step, s        largest batch"
    rows = [
        f"{plan.mesh['data']:6d}{plan.mesh['fsdp']:6d}{plan.mesh['tensor']:8d}   "
        f"{_gigabytes(plan.peak):12}  {_step_seconds(plan):15}"
        f"{plan.largest_batch[0]} to {plan.largest_batch[1]} rows"
        for plan in plans
    ]
    return "\n".join(["meshes that fit, the fastest first", header, *rows, "", render(plans[0])])


def _largest(plan: Plan) -> list[str]:
    if plan.boundaries:
        return [_most_rows(plan, boundary) for boundary in plan.boundaries]
    surely, at_best = plan.largest_batch
    where = f"{plan.devices} x {plan.hbm / GB:g} GB"
    if at_best == 0:
        return [f"no batch fits in {where} (estimate)"]
    return [
        f"largest batch in {where}: {surely} rows of {plan.length} tokens surely, {at_best} at "
        f"best (estimate)"
    ]


def _most_rows(plan: Plan, boundary: Boundary) -> str:
    how = (
        "as JAX takes by itself"
        if boundary.fraction == SHARES[0]
        else f"with {SHARE_VARIABLE}={boundary.fraction:.2g}"
    )
    tried = boundary.fits or boundary.beyond
    found = (
        f"most rows of {plan.length} tokens: {tried.rows}"
        if boundary.fits
        else f"not even {tried.rows} rows of {plan.length} tokens fit"
    )
    return (
        f"{found} ({tried.needed / GB:.2f} GB) in {boundary.limit / GB:.2f} GB, "
        f"{boundary.fraction:g} of a device's memory, {how}"
    )


def _assumed(plan: Plan) -> list[str]:
    about_memory = {
        "exact": "memory was laid out by the chip's own compiler",
        "compiled": "memory was laid out by the chip's own compiler, without autotuning, for which "
        "it needs the chip, and without the workspaces of cuBLAS and cuDNN",
        "estimate": "memory was laid out by the compiler for CPUs, in float32: an accelerator needs"
        f" at most that, and at least {NARROWEST} of the temporaries",
    }
    words = (*ASSUMPTIONS, about_memory[_kind(plan)])
    words = (*words, "1 GB is 1e9 bytes; nothing else is on the device")
    return ["assumed:", *(f"  * {line}" for line in words)]


def _kind(plan: Plan) -> str:
    if not plan.exact:
        return "estimate"
    return "compiled" if plan.chip in GPUS else "exact"


def _row(name: str, value: str, remark: str) -> str:
    return f"  {name:24}{value:>12}   {remark}"


def _gigabytes(size: Range) -> str:
    return _span(Range(size.least / GB, size.most / GB), 2)


def _step_seconds(plan: Plan) -> str:
    return _span(Range(plan.time["least"], plan.time["most"]), 3)


def _span(span: Range, digits: int) -> str:
    least, most = (f"{value:,.{digits}f}" for value in (span.least, span.most))
    return least if least == most else f"{least} to {most}"
