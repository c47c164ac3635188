"""`memoir report`: the page of a run of `memoir bench quality`."""

from __future__ import annotations

from pathlib import Path

import click

from memoir_retrieval.cli.common import notes
from memoir_retrieval.store.files import publish

__all__ = ["PAGE", "report"]

PAGE = "report.html"
"""File in the folder of a run."""


@click.command()
@click.argument("run", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option(
    "--open/--no-open", "browse", default=True, help="Open it in a browser (default), or only print its path."
)
def report(run: Path, browse: bool) -> None:
    """Open the report of a run of `memoir bench quality`, drawn again from its figures.

    \b
    Example:
      memoir report run --no-open
    """
    from memoir_retrieval.evaluation.quality_run import read_run
    from memoir_retrieval.evaluation.report import run_page

    page = run / PAGE
    publish(page, run_page(read_run(run)).encode())
    click.echo(str(page.resolve()))
    if browse and click.launch(page.resolve().as_uri()):
        notes.print("no browser could be started: open the file above")
