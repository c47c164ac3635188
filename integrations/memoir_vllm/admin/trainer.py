"""The process that changes the store, outside the serving path: no step of an engine waits for it.

    python -m memoir_vllm.admin.trainer '{"store": DIR, "model": DIR, "device": "cpu"}'

reads one JSON object a line, `{"add": {EDIT}, "on_conflict": "refuse" | "last"}` or `{"remove": ID}`, and answers each
with one line, `{"generation": N, "edit": ID, ...}` or `{"error": TEXT}`. Before that come lines `{"progress": {...}}`
(see `schema.JobProgress`). It keeps the model for the next edit, takes the store's lock for each change alone, and ends
with its input: a server that dies takes it along.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from memoir_retrieval.editing.outcome import Outcome, TrainingStep

__all__ = ["main"]


def main() -> None:
    # Only answers go to the pipe; what libraries print goes where the server's own log goes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.nice(10)
    setting = json.loads(sys.argv[1])
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def say(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    trainer = _Trainer(Path(setting["store"]), setting["model"], setting["device"], lambda p: say({"progress": p}))
    try:
        threading.Thread(target=_listen, args=(sys.stdin, asked), daemon=True).start()
        while True:
            say(trainer.answer(json.loads(asked.get())))
    except KeyboardInterrupt:
        pass


def _listen(lines: IO[str], asked: queue.SimpleQueue[str]) -> None:
    for line in lines:
        asked.put(line)
    # A real signal, since the main thread may be asleep. Where an edit is being trained, it is not stored.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


class _Trainer:
    def __init__(self, store: Path, model: str, device: str, progress: Callable[[dict[str, Any]], None]):
        self._store, self._model, self._device = store, model, device
        self._progress = progress
        self._base: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        from memoir_retrieval.errors import MemoirError

        try:
            return self._remove(request["remove"]) if "remove" in request else self._add(request)
        except MemoirError as error:
            return {"error": " ".join(str(error).split())}
        except Exception as error:
            logging.exception("memoir: a change of the store failed")
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}; the server's log has more"}

    def _add(self, request: dict[str, Any]) -> dict[str, Any]:
        from memoir_retrieval.editing.editor import Editor
        from memoir_retrieval.editing.outcome import same_edit
        from memoir_retrieval.edits.record import Edit
        from memoir_retrieval.model.base import load_model
        from memoir_retrieval.store.read import EditStore

        if self._base is None:
            self._progress({"stage": "loading"})
            made = EditStore.open(self._store).manifest
            self._base = load_model(self._model, layer=made.layer, dtype=made.dtype, device=self._device)
        edit = msgspec.convert(request["add"], Edit)
        self._progress({"stage": "opening"})
        with Editor(self._base, self._store, watch=self._step) as editor:
            new = editor.add([edit], on_conflict=request["on_conflict"])
            same = [e for e in editor.edits if same_edit(e, edit)]
            if not new and not same:
                return {"error": _refusal(editor.outcome)}
            (stored,) = new or same
            return {
                "generation": editor.generation,
                "edit": stored.id,
                "loss": stored.loss,
                "steps": stored.steps,
            }

    def _step(self, step: TrainingStep) -> None:
        self._progress({"stage": "training", **asdict(step)})

    def _remove(self, edit_id: int) -> dict[str, Any]:
        from memoir_retrieval.store.remove import remove_edits

        return {"generation": remove_edits(self._store, [edit_id]).generation, "edit": edit_id}


def _refusal(outcome: Outcome) -> str:
    """Why the editor has not taken the edit up, as it reports it."""
    for failed in outcome.failed:
        return f"the edit was trained but failed its audit: {failed.reason}"
    for rival in outcome.conflicting:
        there = rival.stored
        return (
            f"edit {there.id} ({there.prompt!r}, overlap {rival.overlap}) answers the same question with "
            f'{there.target!r}: remove it first, or send on_conflict "last" to replace it'
        )
    return "the edit was not taken up"


if __name__ == "__main__":
    main()
