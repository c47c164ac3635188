"""`memoir bench edit`: our training against the published loop, on the same edits in one run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import click

from memoir_retrieval.cli.common import echo_json, json_option, notes, threads_option
from memoir_retrieval.cli.options import FileOptions, ModelOptions, file_options, model_options
from memoir_retrieval.errors import ConfigError

__all__ = ["bench_edit"]


@click.command("edit")
@click.argument("file", type=click.Path(path_type=Path))
@file_options
@model_options(default="smollm2-135m", dtype=None)
@json_option
@threads_option
def bench_edit(file: Path, source: FileOptions, model: ModelOptions, as_json: bool) -> None:
    """Time edits of this library and of the published loop in turn, and measure how well they are answered.

    Both train raw prompts. The published loop takes about a minute per edit on a CPU, so without --limit only three
    edits are trained.

    \b
    Example:
      memoir bench edit examples/zsre-100.jsonl --json
    """
    edits = source._replace(limit=source.limit or 3).load(file, "first")

    import torch

    from memoir_index import unpack
    from memoir_retrieval.background import background_prompts
    from memoir_retrieval.editing.contexts import own_prefixes
    from memoir_retrieval.editing.editor import Editor
    from memoir_retrieval.evaluation.published_loop import PREFIXES, accuracy, train_published
    from memoir_retrieval.question.prompts import prompt_ids, target_ids

    base = model.load()

    def ids(text: str) -> list[int]:
        return prompt_ids(base.tokenizer, text, chat=False)

    answers = [target_ids(base.tokenizer, edit.target, chat=False) for edit in edits]
    prefixes = own_prefixes(base, PREFIXES, seed=0)
    unrelated = ids(background_prompts()[0])
    published = torch.zeros(base.h, base.d, device=base.device)
    seconds: dict[str, list[float]] = {"ours": [], "published": []}
    with tempfile.TemporaryDirectory() as folder, Editor(base, Path(folder) / "store", chat=False) as editor:
        masks: list[Any] = []
        for edit, answer in zip(edits, answers, strict=True):
            started = time.perf_counter()
            editor.add([edit], on_conflict="both", keep_failed=True)
            seconds["ours"].append(time.perf_counter() - started)
            if not editor.outcome.stored:
                raise ConfigError(f"{edit.prompt!r} cannot be measured: {editor.outcome.failed[0].reason}")
            masks.append(torch.as_tensor(unpack(editor.index.codes[-1:], base.d)[0], device=base.device))
            rows = [ids(edit.prompt), *(ids(f"{prefix} {edit.prompt}") for prefix in prefixes)]
            started = time.perf_counter()
            train_published(base, published, masks[-1], rows, answer, unrelated)
            seconds["published"].append(time.perf_counter() - started)
            notes.print(f"{len(masks)}/{len(edits)}: {', '.join(f'{k} {v[-1]:.2f} s' for k, v in seconds.items())}")
        ours = [editor.memories[stored.memory] for stored in editor.edits]
        questions = list(zip(masks, [ids(edit.prompt) for edit in edits], answers, strict=True))
        scores = {
            "ours": [accuracy(base, weight, *row) for weight, row in zip(ours, questions, strict=True)],
            "published": [accuracy(base, published, *row) for row in questions],
        }
    result = {
        "edits": len(edits),
        "ours_s": round(median(seconds["ours"]), 3),
        "published_s": round(median(seconds["published"]), 3),
        "ratio": round(median(b / a for a, b in zip(seconds["ours"], seconds["published"], strict=True)), 2),
        "ours_reliability": round(mean(scores["ours"]), 5),
        "published_reliability": round(mean(scores["published"]), 5),
    }
    if as_json:
        echo_json(result)
        return
    for key, value in result.items():
        click.echo(f"{key} {value}")
