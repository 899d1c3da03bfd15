"""The ``kava`` command itself: how it joins the processes of a run, and how commands speak."""

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

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
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Show what JAX, Orbax and others log; else warnings only."),
    ] = False,
) -> None:
    """Join the processes of a run; under srun and mpirun, and on GKE, they find each other."""
    from kava_jax.cli.logs import show_logs
    from kava_jax.parallel.cluster import find_cluster

    show_logs(verbose)

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


def first_process() -> bool:
    """Whether this process is the one that speaks."""
    import jax

    return jax.process_index() == 0


def command() -> list[str]:
    """The command line of this process, for records."""
    return ["kava", *sys.argv[1:]]


def say(text: str) -> None:
    """A line for people, beside what a program reads."""
    print(text, file=sys.stderr)


def print_values(values: Mapping[str, Any], as_json: bool) -> None:
    """Named values as aligned lines, or as JSON."""
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
