"""What the routes do, without HTTP: reading the store, looking prompts up, handing changes to the queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from vllm.logger import init_logger

from memoir_retrieval.editing.conflicts import contradiction, same_edit
from memoir_retrieval.edits.record import Edit, Requires, StoredEdit, prompt_key
from memoir_retrieval.edits.requires import check_requires
from memoir_retrieval.errors import EditFileError, MemoirError, StoreError
from memoir_retrieval.store.manifest import MANIFEST
from memoir_retrieval.store.read import EditStore
from memoir_vllm.admin.audit import AuditLog
from memoir_vllm.admin.engines import Engines
from memoir_vllm.admin.jobs import Jobs, TrainerProcess
from memoir_vllm.admin.schema import AddEdit, Job, LookupMessages, LookupPrompt, LookupResult, NamedEdit, Stats
from memoir_vllm.admin.trainer import CURE, TrainerAnswer
from memoir_vllm.config import MemoirConfig
from memoir_vllm.front.metrics import LOOKUP_ID, TOP, TRAFFIC

__all__ = ["Conflict", "Missing", "Refused", "Service"]

logger = init_logger("vllm.memoir")

DEVICE_VARIABLE = "MEMOIR_EDIT_DEVICE"


class Missing(MemoirError):
    """There is no such edit or job."""


class Conflict(MemoirError):
    """The change contradicts the store or a change that waits."""


class Refused(MemoirError):
    """vLLM refused the prompt."""


class Unavailable(MemoirError):
    """vLLM takes no request now."""


class Service:
    """Administration of one store of a server."""

    def __init__(self, ours: MemoirConfig, model: str, server: str, engines: Engines, state: Any, name: str = ""):
        """ours: the section of the configuration.
        model: its name or folder.
        server: what this one is called, see `server_name`.
        engines: of this server, for this store.
        state: vLLM's own, with the handlers of /v1.
        name: of the store.
        """
        self._ours, self._state, self._name = ours, state, name
        self.folder = Path(ours.folders[name])
        self.engines = engines
        self.audit = AuditLog(self.folder, server)
        device = os.environ.get(DEVICE_VARIABLE, "cpu")
        trainer = TrainerProcess({"store": str(self.folder), "model": model, "device": device})
        self.jobs = Jobs(trainer, self.audit, self._activate, self.in_store)
        self._store: tuple[tuple[int, int], EditStore] | None = None

    def close_unfinished(self) -> None:
        """Say in the audit log what became of changes that a former process of this server has accepted."""
        for entry in self.audit.unfinished():
            change: Any = entry.get("change")
            try:
                stored = self.in_store(change)
            except (msgspec.ValidationError, EditFileError, AttributeError, LookupError, TypeError) as error:
                logger.warning(
                    "memoir: the audit log has an accepted change that cannot be read and stays open: job %r (%s)",
                    entry.get("job"),
                    error,
                )
                continue
            self.audit.write(
                "interrupted",
                entry.get("who", ""),
                entry.get("job", ""),
                stored=stored is not None,
                edit=stored.edit if stored else change.get("remove"),
                generation=self.store().manifest.generation,
            )

    def in_store(self, change: dict[str, Any]) -> TrainerAnswer | None:
        """What the trainer's process says of a change that is made, read from the store; None where it is not there.

        change: as it was requested.
        """
        store = self.store()
        generation = store.manifest.generation
        if "add" not in change:
            number = change.get("remove")
            known = isinstance(number, int) and 0 <= number < store.manifest.next_id
            gone = known and all(edit.id != number for edit in store.edits)
            return TrainerAnswer(generation=generation, edit=number) if gone else None
        added = msgspec.convert({k: v for k, v in change["add"].items() if k != "on_conflict"}, Edit)
        edit = next((edit for edit in store.edits if same_edit(edit, added)), None)
        if edit is None:
            return None
        return TrainerAnswer(generation=generation, edit=edit.id, loss=edit.loss, steps=edit.steps)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def store(self) -> EditStore:
        """The store's present generation, read again when a file came or went. Raises StoreError."""
        status = os.stat(self.folder / MANIFEST)
        stamp = (os.stat(self.folder).st_mtime_ns, status.st_ino)
        held = self._store
        if held is None or held[0] != stamp:
            self._store = held = (stamp, EditStore.open(self.folder, check=False))
        return held[1]

    async def _activate(self) -> int:
        """Have the engines serve the store's present generation, and let go of the files of older ones."""
        generation = await self.engines.reload()
        self._store = None
        return generation

    def search(self, text: str, offset: int, limit: int) -> tuple[int, int, list[StoredEdit]]:
        """Generation, how many edits have all words in them, and a page of those.

        text: the words.
        offset: how many edits are left out.
        limit: how many the page has.
        """
        store = self.store()
        words = text.casefold().split()
        edits = [edit for edit in store.edits if _has(edit, words)] if words else store.edits
        return store.manifest.generation, len(edits), list(edits[offset : offset + limit])

    def edit(self, edit_id: int) -> StoredEdit:
        """A stored edit.

        edit_id: its id.

        Raises Missing.
        """
        store = self.store()
        try:
            return store.edit(edit_id)
        except StoreError:
            raise Missing(f"there is no edit {edit_id} in generation {store.manifest.generation}") from None

    async def stats(self) -> Stats:
        """Counters of the store, the engines and this process."""
        engines = await self.engines.stats()
        store = await asyncio.to_thread(self.store)
        served = {int(engine["generation"]) for engine in engines}
        traffic = TRAFFIC.of(self._name)
        adapted = bool(store.manifest.base.adapter)
        return Stats(
            generation=served.pop() if len(served) == 1 else None,
            store_generation=store.manifest.generation,
            edits=len(store.edits),
            tau=self._tau(store),
            chat=store.manifest.chat,
            model=self._name if adapted else self._state.openai_serving_models.base_model_paths[0].name,
            store="" if adapted else self._name,
            module=store.manifest.module,
            engines=engines,
            requests=dict(traffic.results),
            hits=[{"edit": edit, "hits": hits} for edit, hits in traffic.hits.most_common(TOP)],
            recent=list(reversed(traffic.recent)),
            jobs_open=len(self.jobs.open()),
        )

    def _tau(self, store: EditStore) -> float:
        return store.manifest.tau if self._ours.tau is None else self._ours.tau

    async def lookup(self, prompt: LookupPrompt | LookupMessages) -> LookupResult:
        """Let vLLM render and the engine pool the prompt, exactly as a client's; one token is sampled and dropped.

        prompt: text or messages.

        Raises Refused where vLLM refuses the request; Unavailable where it takes none now.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        how: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "vllm_xargs": {"memoir_nearest": prompt.n}}
        how["request_id"] = f"{LOOKUP_ID}-{os.urandom(8).hex()}"
        if (await asyncio.to_thread(self.store)).manifest.base.adapter:
            how["model"] = self._name
        elif self._name:
            how["vllm_xargs"]["memoir_store"] = self._name
        reply: Any
        if isinstance(prompt, LookupMessages):
            chat = prompt.model_dump(exclude={"n"}, exclude_none=True)
            reply = await self._ask(
                self._state.openai_serving_chat.create_chat_completion, ChatCompletionRequest, how | chat
            )
        else:
            reply = await self._ask(
                self._state.openai_serving_completion.create_completion,
                CompletionRequest,
                how | {"prompt": prompt.prompt},
            )
        said = reply.kv_transfer_params["memoir"]
        store = await asyncio.to_thread(self.store)
        return LookupResult(
            result=said["result"],
            reason=said.get("reason"),
            generation=said["generation"],
            tau=self._tau(store),
            matches=[
                self._match(store, number, overlap, number == said["edit"])
                for number, overlap in said.get("nearest", ())
            ],
            parts=said.get("parts", []),
        )

    @staticmethod
    def _match(store: EditStore, number: int, overlap: float, matched: bool) -> NamedEdit:
        """Without prompt and target where the engine still serves an edit that the store has no more."""
        try:
            edit = store.edit(number)
        except StoreError:
            return NamedEdit(edit=number, overlap=overlap, matched=matched)
        return NamedEdit(
            edit=number,
            overlap=overlap,
            matched=matched,
            prompt=edit.prompt,
            target=edit.target,
            requires=_plain(edit.requires),
        )

    @staticmethod
    async def _ask(handler: Any, kind: Any, fields: dict[str, Any]) -> Any:
        from jinja2 import TemplateError
        from pydantic import ValidationError
        from vllm.exceptions import VLLMClientError, VLLMError

        try:
            reply = await handler(kind.model_validate(fields))
        except ValidationError as error:  # the whole text names every kind of message that it is not
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise Refused(f"{where}: {first['msg']}") from None
        except (VLLMClientError, ValueError, TypeError, OverflowError, TemplateError) as error:  # vLLM's own 400s
            raise Refused(" ".join(str(error).split())) from error
        except VLLMError as error:  # too many requests; from 0.33 on also an engine that is paused
            raise Unavailable(" ".join(str(error).split())) from error
        refusal = getattr(reply, "error", None)
        if refusal is not None:
            raise Refused(" ".join(refusal.message.split()))
        return reply

    # ---- changing --------------------------------------------------------------------------------------------------

    async def add(self, who: str, body: AddEdit) -> Job | StoredEdit:
        """Queue an edit; one that the store has already is returned as it is, once the engines serve it.

        who: the holder of the token.
        body: the edit.

        Raises Refused for an edit that could never act; Conflict for a prompt that the store, or a change that waits,
        answers differently; QueueFull; StoreError where the store has it and the engines do not take that up.
        """
        change = body.model_dump(exclude={"on_conflict"})
        edit, key, stored = await asyncio.to_thread(self._check, change)
        # From here to its place in the queue nothing else runs, so of several at once the first one has it.
        for job in self.jobs.open():
            if job.prompt_key == key:
                raise Conflict(f"job {job.id} is about the same prompt: wait until it is done")
        if stored is not None and same_edit(stored, edit):
            newest = (await asyncio.to_thread(self.store)).manifest.generation
            if {engine["generation"] for engine in await self.engines.stats()} != {newest}:
                await self.reload(who)
            return stored
        if stored is not None and body.on_conflict == "refuse":
            raise Conflict(f"{contradiction(stored, edit)}: {CURE}")
        request = {"add": change, "on_conflict": body.on_conflict}
        about = {"kind": "add", "prompt": body.prompt, "prompt_key": key, "target": body.target}
        return await self.jobs.submit(who, request, **about)

    async def remove(self, who: str, edit_id: int) -> Job:
        """Queue the removal of an edit.

        who: the holder of the token.
        edit_id: its id.

        Raises Missing; Conflict where it is queued already; QueueFull.
        """
        edit = await asyncio.to_thread(self.edit, edit_id)
        key = await asyncio.to_thread(prompt_key, edit.prompt)
        if any(job.kind == "remove" and job.edit == edit_id for job in self.jobs.open()):
            raise Conflict(f"edit {edit_id} is being removed already")
        about = {"kind": "remove", "edit": edit_id, "prompt": edit.prompt, "prompt_key": key, "target": edit.target}
        return await self.jobs.submit(who, {"remove": edit_id}, **about)

    async def reload(self, who: str) -> int:
        """Have the engines adopt the store's present generation. Returns its number.

        who: the holder of the token.

        Raises StoreError.
        """
        generation = await self._activate()
        try:
            await asyncio.to_thread(self.audit.write, "reloaded", who, "", generation=generation)
        except OSError as error:  # a replica may have its store mounted read-only; nothing in it has changed
            logger.warning(
                "memoir: generation %d is served at the request of %s, but the audit log cannot be written (%s)",
                generation,
                who,
                error.strerror,
            )
        return generation

    def _check(self, change: dict[str, Any]) -> tuple[Edit, str, StoredEdit | None]:
        """An edit, the key of its prompt, and the stored edit of that prompt. Raises Refused where it could never act.

        Runs beside the event loop: a store may hold many edits, and a text may be long.
        """
        edit = msgspec.convert(change, Edit)
        try:
            check_requires(edit)
        except EditFileError as error:
            raise Refused(str(error)) from None
        key = prompt_key(edit.prompt)
        return edit, key, next((stored for stored in self.store().edits if prompt_key(stored.prompt) == key), None)


def _plain(requires: Requires) -> list[str | list[str]]:
    return [entry if isinstance(entry, str) else list(entry) for entry in requires]


def _has(edit: StoredEdit, words: Iterable[str]) -> bool:
    text = " ".join((str(edit.id), edit.prompt, edit.target, edit.subject, edit.source)).casefold()
    return all(word in text for word in words)
