"""Commands about one run: before it, the run itself, and what comes of it."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kava_jax.cli.app import (
    ConfigFile,
    Json,
    Overrides,
    aligned,
    app,
    command,
    first_process,
    say,
    show,
)
from kava_jax.errors import KavaError

if TYPE_CHECKING:
    from kava_jax.hf.config_json import FloatName


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="A few steps with tiny random models, same heads."),
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Trace these steps into RUN/profile."),
    ] = None,
) -> None:
    """Train one run, or continue it if its directory holds a checkpoint of the same config.

    Example: kava train configs/demo.yaml train.steps=200 run.dir=runs/short
    """
    from kava_jax.config.file import load_config
    from kava_jax.runs.profiling import first_and_last
    from kava_jax.runs.train import train as train_run

    loaded = load_config(config, overrides or [])
    if smoke:
        from kava_jax.runs.smoke import smoke_config

        loaded = smoke_config(loaded)
    trained = train_run(loaded, command(), first_and_last(profile, loaded.train.steps))
    if first_process():
        say(f"run directory: {trained.run.directory}")


@app.command()
def explain(config: ConfigFile, overrides: Overrides = None) -> None:
    """Say in words what a config will do: what is compared, in which frame, what learns.

    Example: kava explain configs/qwen2.5_14b_to_1.5b_gsm8k.yaml recipe=original
    """
    from kava_jax.config.file import load_config
    from kava_jax.runs.explain import explain as explain_config

    print(explain_config(load_config(config, overrides or [])))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    mesh: Annotated[
        str | None, typer.Option(help="data=..,fsdp=..,tensor=..; the config's when absent.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many there are to be.")] = 1,
    chip: Annotated[str, typer.Option(help="v5e, v5p, v6e, a100, h100, h200 or b200.")] = "h100",
    hbm: Annotated[
        float | None, typer.Option(min=0.1, help="GB of one device; the chip's when absent.")
    ] = None,
    every_mesh: Annotated[
        bool, typer.Option("--search", help="Rank all meshes of these devices that fit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say whether a run will fit and what a step will cost, without weights or devices.

    Example: kava plan configs/qwen2.5_14b_to_1.5b_gsm8k.yaml --devices 8 --mesh fsdp=8 --chip h100
    """
    from kava_jax.config.file import load_config
    from kava_jax.plan.chips import find_chip
    from kava_jax.plan.planning import make_plan, search, virtual_devices
    from kava_jax.plan.show import render, render_search

    found = find_chip(chip)
    memory = found.memory if hbm is None else 1e9 * hbm
    sizes = [f"mesh.{part.strip()}" for part in mesh.split(",")] if mesh else []
    loaded = load_config(config, [*(overrides or []), *sizes])
    # Before anything looks at a device: their number cannot be changed after that.
    virtual_devices(devices)
    if every_mesh:
        plans = search(loaded, found, memory, say)
        show([asdict(one) for one in plans], render_search(plans), as_json)
        return
    one = make_plan(loaded, found, memory, say)
    show(asdict(one), render(one), as_json)


@app.command()
def calibrate(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Fit projector and layer map in closed form, before training; kava train does so by itself.

    Example: kava calibrate configs/tinystories_260k.yaml recipe=calibrated student.path=DIR
    """
    from kava_jax.config.file import load_config
    from kava_jax.runs.calibrate import calibrate as calibrate_run
    from kava_jax.runs.calibrate import describe

    loaded = load_config(config, overrides or [])
    found = calibrate_run(loaded)
    if first_process():
        show(found.report, describe(found), as_json)
        say(f"written to {loaded.run.directory / 'calibration'}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run directory, Hugging Face directory or hub id.")],
    data: Annotated[
        str, typer.Option(help="JSON(L), parquet or text file, -, hub id or builtin:...")
    ],
    checkpoint: Annotated[str, typer.Option(help="Of a run: last, best or a step.")] = "last",
    rows: Annotated[
        int | None, typer.Option(min=1, help="Only this many rows, from the start.")
    ] = None,
    handoff: Annotated[
        bool, typer.Option("--handoff", help="Also answers from handed-over caches, all timed.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.field=value or eval.field=value.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Held-out loss and exact match; for a run also its alignment with the teachers.

    Example: kava eval runs/demo --data builtin:word_problems --json
    """
    from kava_jax.runs.assess import assess

    def note(text: str) -> None:
        if first_process():
            say(text)

    values = assess(
        model,
        data,
        checkpoint=checkpoint,
        rows=rows,
        handoff=handoff,
        overrides=overrides or [],
        say=note,
    )
    if first_process():
        # JSON has no NaN.
        finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
        show(finite, aligned(values), as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run directory, or gs://bucket/folder.")],
    out: Annotated[
        str, typer.Option(help="Hugging Face directory to write, or gs://bucket/folder.")
    ],
    checkpoint: Annotated[str, typer.Option(help="last, best or a step.")] = "last",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write the student as a plain Hugging Face directory.

    Example: kava export runs/demo --out exported/demo --checkpoint best --dtype bfloat16
    """
    from kava_jax.hf.export import check_destination
    from kava_jax.runs.evaluate import choice_note
    from kava_jax.runs.reopen import reopen_student, restore_student
    from kava_jax.runs.student_export import export as export_run
    from kava_jax.storage import place

    chosen_dtype = float_or_auto(dtype)
    target = place(out, "out")
    # Before weights are read, which can take long, so that a refusal comes at once.
    check_destination(target)
    opened = reopen_student(place(run, "run"))
    step, student = restore_student(opened, checkpoint)
    export_run(opened, student, step, target, chosen_dtype)
    if first_process():
        chosen = choice_note(opened.config)
        if checkpoint == "best" and chosen:
            say(chosen)
        say(f"exported to {out}")


def float_or_auto(dtype: str) -> "FloatName | Literal['auto']":
    """Raises KavaError for the name of another dtype."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise KavaError(f"--dtype={dtype!r} is unknown; use auto, float32, bfloat16 or float16")
    return dtype


@app.command()
def cut(
    teacher: Annotated[str, typer.Argument(help="Hugging Face directory, hub id or builtin:...")],
    out: Annotated[
        str, typer.Option(help="Hugging Face directory to write, or gs://bucket/folder.")
    ],
    layers: Annotated[str | None, typer.Option(help="Layers to keep: 0,1,2 or all.")] = None,
    keep: Annotated[int | None, typer.Option(help="How many layers to keep, by --rule.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="middle (default), evenly, best_layers or best_block.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="KV heads left, each merged from neighbours.")
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(min=1, help="Feed-forward units left in each layer.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Calibration rows, where something is measured.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many calibration rows.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.field=value or mesh.field=value.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a smaller model out of a bigger one: fewer layers, KV heads, feed-forward units.

    Example: kava cut Qwen/Qwen2.5-0.5B --out small --keep 12 --kv-heads 1
    """
    from kava_jax.runs.cutting import cut as cut_model
    from kava_jax.storage import place

    if (layers is None) == (keep is None) or (rule is not None and keep is None):
        raise KavaError("layers: give --layers 0,1,2 (or all), or --keep N with or without --rule")
    kept = {
        "layers": keep if layers is None else None if layers == "all" else f"[{layers}]",
        "rule": rule,
        "kv_heads": kv_heads,
        "intermediate_size": intermediate_size,
    }
    found = cut_model(
        teacher,
        place(out, "out"),
        kept,
        data=data,
        rows=rows,
        overrides=overrides or [],
        dtype=float_or_auto(dtype),
        command=command(),
    )
    if first_process():
        show(found, aligned(found), as_json)
        say(f"written to {out}")
