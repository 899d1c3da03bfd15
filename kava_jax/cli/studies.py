"""Commands about many runs, and about kava_jax itself."""

from pathlib import Path
from typing import Annotated

import typer

from kava_jax.cli.app import Json, Overrides, aligned, app, command, say, show
from kava_jax.errors import KavaError


@app.command()
def ablate(
    grid: Annotated[Path, typer.Argument(help="YAML file of a grid; see configs/grids/.")],
    out: Annotated[
        str | None,
        typer.Option(help="Directory of its runs, on a disk; runs/<name> when absent."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Runs at the same time, each with its share of the CPU cores.")
    ] = 1,
    overrides: Overrides = None,
) -> None:
    """Run an experiment grid, arms times seeds; finished runs are not repeated.

    Example: kava ablate configs/grids/scratch.yaml --jobs 2
    """
    from kava_jax.experiments.ablation import Ablation
    from kava_jax.experiments.grid import load_grid
    from kava_jax.experiments.results import RUNS_NAME
    from kava_jax.storage import check_target, local_path

    where = None if out is None else local_path(out, "out")
    loaded, base = load_grid(grid, overrides or [])

    where = where or Path("runs") / loaded.name
    check_target(where, "out")
    failed = Ablation(loaded, base, where).run(jobs, say)
    say(f"results: {where}/{RUNS_NAME}; now: kava report {where}")
    if failed:
        names = ", ".join(f"{arm} (seed {seed})" for arm, seed in failed)
        say(f"failed: {names}; their words are in {where}/logs")
        raise typer.Exit(1)


@app.command()
def report(
    directory: Annotated[
        str, typer.Argument(help="Directory of a run, or of a grid; it may still be running.")
    ],
    out: Annotated[
        str | None, typer.Option(help="HTML file; report.html in the directory when absent.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Of a run: let student (before, after) and teachers answer this many."),
    ] = None,
) -> None:
    """Write one HTML file about a run (verdict, curves, layers) or a grid (arms compared).

    Example: kava report runs/demo/distilled --samples 3
    """
    from kava_jax.experiments.report import REPORT_NAME, write_grid_report, write_report
    from kava_jax.experiments.results import GRID_NAME
    from kava_jax.runs.assess import answer_all
    from kava_jax.storage import check_access, check_target, place

    run = place(directory, "run")
    check_access(run, "run")
    target = run / REPORT_NAME if out is None else place(out, "out")
    if out is not None or run.is_dir():  # what is no run is told below
        check_target(target, "out", "file")
    if isinstance(run, Path) and (run / GRID_NAME).is_file():
        if samples is not None:
            raise KavaError(
                f"samples={samples}: {directory} is a grid, whose records hold answers already; "
                f"leave --samples out"
            )
        written = write_grid_report(run, target)
    else:
        answered = {} if samples is None else answer_all(run, samples)
        written = write_report(run, target, answered)
    say(f"report: {written}")


@app.command()
def verify(as_json: Json = False) -> None:
    """Check the three verification tables of the original method, row by row.

    Example: kava verify --json
    """
    from kava_jax.verify import as_dict, render, run_verification

    rows, notes = run_verification()
    show(as_dict(rows, notes), render(rows, notes), as_json)
    if not all(row.holds for row in rows):
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="step, loss, ce, teacher, decode, handoff, remat, scaling, input, startup or gpu."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file for gpu; by default that of Qwen2.5-14B to 1.5B."),
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            help="For step and gpu: torch (eager and compiled) or torch-eager; for teacher: tunix."
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory: warmed up, in alternating rounds, compared with other tools.

    docs/performance.md says what each of them measures. The screen shows the main figures; --json
    prints everything.

    Example: kava bench step --peer torch
    """
    from kava_jax.bench.catalog import run_benchmark, shown

    found = run_benchmark(name, config, overrides or [], peer)
    show(found, aligned(shown(found)), as_json)


@app.command()
def demo(
    out: Annotated[
        str, typer.Option(help="Directory for the runs, pictures and export, on a disk.")
    ] = "runs/demo",
    handoff: Annotated[
        bool, typer.Option("--handoff", help="Afterwards: answers from each other's cache.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Distil the built-in teacher into a small student and compare; no download, under 5 minutes.

    Example: kava demo --out runs/demo
    """
    from kava_jax.demo import render, render_handoff, run_demo, run_handoff
    from kava_jax.journal.lock import alone
    from kava_jax.storage import local_path

    where = local_path(out, "out")
    # Each training locks its own directory; this covers the export and the pictures.
    with alone(where, "out"):
        result = (run_handoff if handoff else run_demo)(where, command())
    show(result, (render_handoff if handoff else render)(result), as_json)
