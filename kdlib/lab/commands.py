"""The command line, `python -m kdlib` or `kdlib`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Knowledge distillation for named entity recognition: run the study, measure its speed.",
)
NOTEBOOKS = "Names of notebooks or runs, or beginnings of them, such as 03; all if none."
PROFILE = "default: each notebook's own parameters, on the demo corpus. quick: seconds, for tests. "
PROFILE += "full: real corpora, read from $KDLIB_DATA (see data/README.md)."


@app.command()
def study(
    notebooks: Annotated[list[str] | None, typer.Argument(help=NOTEBOOKS)] = None,
    profile: Annotated[str, typer.Option(help=PROFILE)] = "default",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter, for every notebook run."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Run again what has not changed.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Notebooks at a time; one a core by default."),
    ] = None,
) -> None:
    """Run the notebooks in batch; figures and tables go to figures/, the runs to build/.

    A notebook that ran before with the same code, data and parameters is skipped. One that fails is
    reported with its cell and error, the others still run, and the exit code is 1.

    Examples: kdlib study 03 --set seeds=5; KDLIB_DATA=/corpora kdlib study 03 --profile full
    """
    from kdlib.lab import notebooks as batch

    try:
        failures = batch.command(notebooks or [], profile, set_ or [], force, jobs)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    for failure in failures:
        typer.echo(f"FAILED {failure}", err=True)
    raise typer.Exit(1 if failures else 0)


@app.command()
def site(
    out: Annotated[str, typer.Argument(help="A folder.")] = "build/site",
    repository: Annotated[
        str, typer.Option(help="https://github.com/NAME/PROJECT, to link to Colab and Binder.")
    ] = "",
) -> None:
    """Write the executed notebooks, findings, gallery and API as pages that need no network.

    Run `kdlib study` first.
    """
    from kdlib.lab import pages

    _written(lambda: pages.site(Path(out), repository))


@app.command()
def teach(out: Annotated[str, typer.Argument(help="A folder.")] = "build/class") -> None:
    """Write what a class needs: notebooks with and without their solutions, a 90-minute path,
    slides of the findings."""
    from kdlib.lab import pages

    _written(lambda: pages.teach(Path(out)))


def _written(make: Callable[[], Path]) -> None:
    try:
        typer.echo(f"written: {make()}")
    except OSError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def evidence(
    name: Annotated[str, typer.Argument(help="An experiment of notebooks/evidence.yaml.")],
    method: Annotated[
        list[str] | None, typer.Option(help="Only this one, `teacher` for the teachers.")
    ] = None,
    updates: Annotated[list[int] | None, typer.Option(help="Only this budget.")] = None,
) -> None:
    """Make those runs of a long experiment on a real corpus that have no record in data/runs yet.

    A run is recorded as it ends; a stopped experiment goes on where it was. Experiments can run at
    once in several processes: on a CPU give each one thread (OMP_NUM_THREADS=1).

    Examples: KDLIB_DATA=/corpora OMP_NUM_THREADS=1 kdlib evidence ladder_wikiann;
    kdlib evidence ladder_wikiann --method pseudo-labels --method posterior --updates 4800
    """
    from kdlib.lab import evidence as experiments

    try:
        experiments.run(name, method or [], updates or [])
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
