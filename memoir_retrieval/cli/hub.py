"""`memoir push` and `pull`: stores on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from memoir_retrieval.cli.common import echo, echo_json, json_option, notes, store_argument

__all__ = ["pull", "push"]


@click.command()
@store_argument
@click.argument("repo")
@click.option("--eval", "scores", type=click.Path(path_type=Path), help="The JSON of `memoir eval`, for the card.")
@click.option("--license", "licence", help="License of the edits, as in a model card, such as cc-by-4.0.")
@click.option("--public", is_flag=True, help="Make a new repository public (default: private).")
@json_option
def push(store: Path, repo: str, scores: Path | None, licence: str | None, public: bool, as_json: bool) -> None:
    """Put a store on the Hugging Face Hub as REPO (owner/name), with a generated model card.

    One commit holds one generation. Prompts and targets are in it as text.

    \b
    Example:
      memoir push edits example/corrections --eval edits.eval.json --license cc-by-4.0
    """
    from memoir_retrieval.store import hub

    notes.print(f"pushing {store} to {repo}")
    done = hub.push(store, repo, scores=scores, licence=licence, public=public)
    if as_json:
        echo_json(done._asdict())
        return
    echo(f"{repo}: generation {done.generation}, {done.edits} edits, at commit {done.revision}")
    echo(f"memoir pull {repo} DIR --revision {done.revision} --sha256 {done.sha256}")


@click.command()
@click.argument("repo")
@store_argument
@click.option("--revision", help="Commit, tag or branch (default: the newest commit of main).")
@click.option("--sha256", help="The sha256 that memoir.json must have, as `memoir push` printed it.")
@click.option("--replace", is_flag=True, help="Drop edits of DIR that REPO does not have.")
@json_option
def pull(repo: str, store: Path, revision: str | None, sha256: str | None, replace: bool, as_json: bool) -> None:
    """Fetch a store from the Hugging Face Hub into DIR, every file checked before DIR is touched.

    A store that is in DIR gets what was fetched as its next generation, in one step.

    \b
    Example:
      memoir pull example/corrections edits --revision 3f1c2a9
    """
    from memoir_retrieval.store import hub

    notes.print(f"pulling {repo}")
    done = hub.pull(repo, store, revision=revision, sha256=sha256, replace=replace)
    if as_json:
        echo_json({**done._asdict(), "store": str(store)})
        return
    state = f"generation {done.generation}" if done.changed else f"is up to date, generation {done.generation}"
    echo(f"{store}: {state}, {done.edits} edits, commit {done.revision}, sha256 {done.sha256}")
