"""The ``kava`` command. Bad input ends in one line on stderr and exit code 2.

Heavy modules are imported inside the commands, so that ``kava --help`` answers at once.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kava_jax.errors import KavaError, PreemptedError, StoppedError, is_full_disk

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="KV-cache distillation in JAX: pull a student's keys and values towards a teacher's.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.field=value, as many as you like.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.callback()
def join(
    coordinator: Annotated[
        str | None, typer.Option(envvar="KAVA_COORDINATOR", help="HOST:PORT of process 0.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(envvar="KAVA_PROCESSES", help="How many processes there are.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(envvar="KAVA_PROCESS", help="Which one this is, from 0.")
    ] = None,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Ask a TPU pod's metadata who the other processes are."),
    ] = False,
) -> None:
    """Join the processes of a run; under srun and mpirun, and on GKE, they find each other."""
    from kava_jax.parallel.cluster import find_cluster

    found = find_cluster(
        os.environ,
        coordinator=coordinator,
        processes=processes,
        process=process,
        detect=cluster,
    )
    if found is not None:
        from kava_jax.parallel.hosts import start

        start(found)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Overrides = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="A few steps with tiny random models, same heads."),
    ] = False,
) -> None:
    """Train one run, or continue it if its directory holds a checkpoint of the same config.

    Example: kava train configs/demo.yaml train.steps=200 run.dir=runs/short
    """
    from kava_jax.config_file import load_config
    from kava_jax.runs.train import train as train_run

    loaded = load_config(config, overrides or [])
    if smoke:
        from kava_jax.runs.smoke import smoke_config

        loaded = smoke_config(loaded)
    trained = train_run(loaded, _command())
    if _first_process():
        _say(f"run directory: {trained.run.directory}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Run directory, Hugging Face directory or hub id.")],
    data: Annotated[str, typer.Option(help="JSONL, parquet or text file, hub id or builtin:...")],
    checkpoint: Annotated[str, typer.Option(help="Of a run: last, best or a step.")] = "last",
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.field=value or eval.field=value.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Held-out loss and exact match; for a run also its alignment with the teachers.

    Example: kava eval runs/demo --data builtin:word_problems --json
    """
    from kava_jax.runs.assess import assess

    values = assess(model, data, checkpoint=checkpoint, rows=rows, overrides=overrides or [])
    if _first_process():
        _print_values(values, as_json)


@app.command()
def report(
    directory: Annotated[
        Path, typer.Argument(help="Directory of a run, or of a grid; it may still be running.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in the directory when absent.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Of a run: let student (before, after) and teachers answer so many."),
    ] = None,
) -> None:
    """Write one HTML file about a run (verdict, curves, layers) or a grid (arms compared).

    Example: kava report runs/demo/distilled --samples 3
    """
    from kava_jax.experiments.ablation import GRID_NAME
    from kava_jax.experiments.grid_report import write_grid_report
    from kava_jax.experiments.report import write_report
    from kava_jax.runs.samples import answer_all

    if (directory / GRID_NAME).is_file():
        if samples is not None:
            raise KavaError(
                f"samples={samples}: {directory} is a grid, whose records hold answers already; "
                f"leave --samples out"
            )
        written = write_grid_report(directory, out)
    else:
        answered = [] if samples is None else answer_all(directory, samples)
        written = write_report(directory, out, answered)
    _say(f"report: {written}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Option(help="Hugging Face directory to write.")],
    checkpoint: Annotated[str, typer.Option(help="last, best or a step.")] = "last",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write the student as a plain Hugging Face directory.

    Example: kava export runs/demo --out exported/demo --checkpoint best --dtype bfloat16
    """
    from kava_jax.runs.export import export as export_run
    from kava_jax.runs.prepare import reopen, restore

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise KavaError(f"--dtype={dtype!r} is unknown; use auto, float32, bfloat16 or float16")
    opened = reopen(run)
    export_run(opened, restore(opened, checkpoint), out, dtype)  # pyright: ignore[reportArgumentType]  (checked above)
    if _first_process():
        _say(f"exported to {out}")


@app.command()
def explain(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Overrides = None,
) -> None:
    """Say in words what a config will do: what is compared, in which frame, what learns.

    Example: kava explain configs/qwen2.5_14b_to_1.5b_gsm8k.yaml recipe=original
    """
    from kava_jax.config_file import load_config
    from kava_jax.runs.explain import explain as explain_config

    print(explain_config(load_config(config, overrides or [])))


@app.command()
def calibrate(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Fit projector and layer map in closed form, before training; kava train does so by itself.

    Example: kava calibrate configs/tinystories_260k.yaml recipe=calibrated student.path=DIR
    """
    from kava_jax.config_file import load_config
    from kava_jax.runs.calibrate import calibrate as calibrate_run
    from kava_jax.runs.calibrate import describe

    loaded = load_config(config, overrides or [])
    found = calibrate_run(loaded)
    if not _first_process():
        return
    if as_json:
        print(json.dumps(found.report, indent=2))
    else:
        print(describe(found))
    _say(f"written to {loaded.run.directory / 'calibration'}")


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(help="YAML file of a grid; see configs/grids/.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of its runs; runs/<name> when absent."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Runs at the same time, each with its share of the CPU cores.")
    ] = 1,
    overrides: Overrides = None,
) -> None:
    """Run an experiment grid, arms times seeds; finished runs are not repeated.

    Example: kava ablate configs/grids/scratch.yaml --jobs 2
    """
    from kava_jax.experiments.ablation import Ablation, Progress
    from kava_jax.experiments.grid import load_grid

    loaded, base = load_grid(grid, overrides or [])

    def say(progress: Progress) -> None:
        job = progress.job
        _say(f"{progress.done}/{progress.of}  {job.arm} seed {job.seed}: {progress.word}")

    where = out or Path("runs") / loaded.name
    failed = Ablation(loaded, base, where).run(jobs, say)
    _say(f"results: {where}/*.json; now: kava report {where}")
    if failed:
        names = ", ".join(f"{job.arm} (seed {job.seed})" for job in failed)
        _say(f"failed: {names}; their words are in {where}/logs")
        raise typer.Exit(1)


@app.command()
def verify(as_json: Json = False) -> None:
    """Check the three verification tables of the original method, row by row.

    Example: kava verify --json
    """
    from kava_jax.experiments.verify import render, run_verification

    verification = run_verification()
    if as_json:
        print(json.dumps(verification.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(render(verification))
    if not verification.holds:
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="What to measure: diagnostics or arms.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file; when absent, the demo's, and for arms grids/scratch.yaml."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure speed: warmed up, in alternating rounds, with medians and spread.

    diagnostics: what looking at gradients and layers costs beside the step. arms: the step of every
    arm of a grid.

    Example: kava bench diagnostics --json
    """
    from kava_jax.bench import bench_arms, bench_diagnostics
    from kava_jax.config_file import load_config, shipped_config
    from kava_jax.experiments.grid import load_grid

    if name == "diagnostics":
        path = config or shipped_config("demo.yaml")
        found = bench_diagnostics(load_config(path, overrides or []))
        seconds = {key: found[key]["median"] for key in ("step_seconds", "probe_seconds")}
        values = seconds | {"share_of_step": found["share_of_step"]}
    elif name == "arms":
        path = config or shipped_config("grids/scratch.yaml")
        found = bench_arms(*load_grid(path, overrides or []))
        values = found["relative"]
    else:
        raise KavaError(f"name={name!r} is not a benchmark; use diagnostics or arms")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_values(values, as_json=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the runs, pictures and export.")] = Path(
        "runs/demo"
    ),
    as_json: Json = False,
) -> None:
    """Distil the built-in teacher into a small student and compare; no download, under 5 minutes.

    Example: kava demo --out runs/demo
    """
    from kava_jax.demo import render, run_demo

    result = run_demo(out, _command())
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(render(result))


def main() -> None:
    """Entry point: 0 done, 1 a check failed or a run stopped, 2 bad input, 75 preempted."""
    # Else transformers says on stderr, at every command, that there is no PyTorch; none is needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Compiled programs are kept from run to run; JAX reads this when it is imported.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "kava_jax" / "compiled"))
    # Orbax warns through absl of what is meant so (a directory opened for reading is read only),
    # and logs errors with a traceback that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        app()
    except (KavaError, StoppedError, PreemptedError) as error:
        word = "preempted" if isinstance(error, PreemptedError) else "error"
        print(f"{word}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if not is_full_disk(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: no space is left on the disk{where}; make room and call again; what was "
            f"written before is whole",
            file=sys.stderr,
        )
        raise SystemExit(StoppedError.exit_code) from None


def _first_process() -> bool:
    """Whether this process is the one that speaks."""
    import jax

    return jax.process_index() == 0


def _command() -> list[str]:
    return ["kava", *sys.argv[1:]]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_values(values: Mapping[str, Any], as_json: bool) -> None:
    if as_json:  # JSON has no NaN
        finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
        print(json.dumps(finite, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        print(
            f"{name:{width}}  {value:.4f}"
            if isinstance(value, float)
            else f"{name:{width}}  {value}"
        )
