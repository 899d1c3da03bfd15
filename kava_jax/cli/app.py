"""The ``kava`` command itself: how it joins the processes of a run, and how commands speak."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="KV-cache distillation in JAX: pull a student's keys and values towards a teacher's.",
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see configs/.")]
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
    # ``find_cluster`` needs no JAX: a single process imports it only if its command does.
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
    """A line for people, on stderr: stdout is for what a program reads."""
    print(text, file=sys.stderr)


def show(document: Any, words: "RenderableType", as_json: bool) -> None:
    """Print an answer: as one JSON document, or in words."""
    if as_json:
        print(json.dumps(document, indent=2))
    elif isinstance(words, str):
        print(words)
    else:
        from rich.console import Console

        Console().print(words)


def aligned(values: Mapping[str, Any]) -> str:
    """Named values in words, a line each."""
    width = max(map(len, values))
    shown = {n: f"{v:.4f}" if isinstance(v, float) else v for n, v in values.items()}
    return "\n".join(f"{name:{width}}  {value}" for name, value in shown.items())
