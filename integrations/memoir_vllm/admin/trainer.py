"""The process that changes the store, outside the serving path: no step of an engine waits for it.

    python -m memoir_vllm.admin.trainer '{"store": DIR, "model": DIR, "device": "cpu"}'

reads one JSON object per line, `{"add": {EDIT}, "on_conflict": "refuse" | "last"}` or `{"remove": ID}`, and answers
each with one line, a `TrainerAnswer`. Before that come lines of `progress` alone (see `schema.JobProgress`). No line is
longer than `LONGEST_LINE`. It keeps the model, and what it knows of the edits in open memories, for the next edit. It
takes the store's lock for each change alone, and ends with its input: a server that dies takes it along.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from memoir_retrieval.editing.outcome import Outcome, TrainingStep

__all__ = ["CURE", "LONGEST_LINE", "TrainerAnswer", "main"]

CURE = 'remove it first, or send on_conflict "last" to replace it'
"""What a client can do about an edit that answers the same question."""

LONGEST_LINE = 64 * 1024  # bytes
ALIVE_S = 1.0  # least seconds between two lines that say the same
LONGEST_REASON = 4_000  # characters: prompts that a reason quotes may be longer


class TrainerProgress(msgspec.Struct, frozen=True, omit_defaults=True):
    """See `schema.JobProgress`."""

    stage: str
    step: int | None = None
    limit: int | None = None
    loss: float | None = None
    goal: float | None = None


class TrainerAnswer(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One line of the trainer.

    generation: of the store, with the change.
    edit: its id.
    loss: of its training, in nats per target token.
    steps: of its training.
    damaged: ids of edits that the training has overwritten, and that could not be trained again.
    error: why the change is not made.
    progress: how far it is; the answer comes later.
    """

    generation: int | None = None
    edit: int | None = None
    loss: float | None = None
    steps: int | None = None
    damaged: tuple[int, ...] = ()
    error: str | None = None
    progress: TrainerProgress | None = None


def refusal(reason: str) -> TrainerAnswer:
    """An answer of one line, whatever a library or a prompt puts into it."""
    reason = " ".join(reason.split())
    return TrainerAnswer(error=reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…")


def main() -> None:
    """The trainer's process: reads requests from its standard input and writes answers to its standard output."""
    # Only answers go to the pipe; what libraries print goes where the server's own log goes.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.nice(10)
    # A server that a script started in the background ignores this signal, and so would we, by which `_listen` ends us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    setting = json.loads(sys.argv[1])
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def send(answer: TrainerAnswer) -> None:
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()

    trainer = _Trainer(Path(setting["store"]), setting["model"], setting["device"], send)
    try:
        threading.Thread(target=_listen, args=(sys.stdin, requests), daemon=True).start()
        while True:
            send(trainer.answer(json.loads(requests.get())))
    except KeyboardInterrupt:
        pass


def _listen(lines: IO[str], requests: queue.SimpleQueue[str]) -> None:
    for line in lines:
        requests.put(line)
    # A real signal, since the main thread may be asleep. Where an edit is being trained, it is not stored.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


class _Trainer:
    def __init__(self, store: Path, model: str, device: str, send: Callable[[TrainerAnswer], None]):
        self._store, self._model, self._device = store, model, device
        self._send = send
        self._base: Any = None
        self._wordings: Any = None
        self._progress, self._said = TrainerProgress("loading"), 0.0  # the last line of progress, and when it was sent

    def answer(self, request: dict[str, Any]) -> TrainerAnswer:
        from memoir_retrieval.errors import MemoirError

        try:
            return self._remove(request["remove"]) if "remove" in request else self._add(request)
        except MemoirError as error:
            return refusal(str(error))
        except Exception as error:
            logging.exception("memoir: a change of the store failed")
            return refusal(f"{type(error).__name__}: {error:.1000}; the server's log has more")

    def _add(self, request: dict[str, Any]) -> TrainerAnswer:
        from memoir_retrieval.editing.conflicts import same_edit
        from memoir_retrieval.editing.editor import Editor
        from memoir_retrieval.edits.record import Edit
        from memoir_retrieval.store.base_model import load_model_of
        from memoir_retrieval.store.read import EditStore

        if self._base is None:
            self._say(TrainerProgress("loading"))
            self._base = load_model_of(EditStore.open(self._store).manifest, self._model, device=self._device)
        edit = msgspec.convert(request["add"], Edit)
        self._say(TrainerProgress("opening"))
        with Editor(self._base, self._store, watch=self._step, alive=self._still, wordings=self._wordings) as editor:
            self._wordings = editor.wordings
            new = editor.add([edit], on_conflict=request["on_conflict"])
            same = [stored for stored in editor.edits if same_edit(stored, edit)]
            if not new and not same:
                return refusal(_refusal(editor.outcome))
            for failed in editor.outcome.failed:
                logging.warning("memoir: edit %r is not answered any more: %s", failed.prompt, failed.reason)
            (stored,) = new or same
            failed_texts = {(failed.prompt, failed.target) for failed in editor.outcome.failed}
            return TrainerAnswer(
                generation=editor.generation,
                edit=stored.id,
                loss=stored.loss,
                steps=stored.steps,
                damaged=tuple(edit.id for edit in editor.edits if (edit.prompt, edit.target) in failed_texts),
            )

    def _step(self, step: TrainingStep) -> None:
        self._say(TrainerProgress("training", step.step, step.limit, step.loss, step.goal))

    def _still(self) -> None:
        """Say the same again: whoever hears nothing for long takes this process for stuck."""
        if time.monotonic() - self._said >= ALIVE_S:
            self._say(self._progress)

    def _say(self, progress: TrainerProgress) -> None:
        self._progress, self._said = progress, time.monotonic()
        self._send(TrainerAnswer(progress=progress))

    def _remove(self, edit_id: int) -> TrainerAnswer:
        from memoir_retrieval.store.remove import remove_edits

        return TrainerAnswer(generation=remove_edits(self._store, [edit_id]).generation, edit=edit_id)


def _refusal(outcome: Outcome) -> str:
    """Why the editor has not taken the edit up, as it reports it."""
    for failed in outcome.failed:
        return f"the edit was trained but failed its audit: {failed.reason}"
    for rival in outcome.conflicting:
        return f"the edit conflicts: {rival.fact}: {CURE}"
    return "the edit was not stored"


if __name__ == "__main__":
    main()
