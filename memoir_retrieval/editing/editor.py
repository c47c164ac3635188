"""Turning edits into a store: train, audit, keep or refuse; one after another, or several memories side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from memoir_index import HammingIndex
from memoir_retrieval.editing.conflicts import Conflict, plan
from memoir_retrieval.editing.open_store import OpenStore
from memoir_retrieval.editing.outcome import Outcome, Progress, TrainingStep
from memoir_retrieval.editing.session import Checkpoints, Choices, NewEdit, Session
from memoir_retrieval.editing.trainer import MemoryTrainer, Trainer
from memoir_retrieval.editing.wordings import Wordings
from memoir_retrieval.edits.record import Edit, StoredEdit, edit_time, prompt_key
from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.store.manifest import MANIFEST, Manifest
from memoir_retrieval.store.settings import Settings, Training

__all__ = ["Editor"]


class Editor:
    """Trains edits on a model and writes them to a store.

    One editor at a time may write a store: use it as a context manager, which takes the store's lock. Used so again, it
    reads the store again.

    >>> from memoir_retrieval import Edit, Editor, load_model
    >>> with Editor(load_model("smollm2-135m"), "new-edits") as editor:
    ...     (stored,) = editor.add([Edit(prompt="Who founded Exampleton?", target="Ada Lind")])
    >>> stored.id, stored.loss < 0.1
    (0, True)

    outcome: what became of the edits of the last `add` or `compact`.
    """

    def __init__(
        self,
        base: BaseModel,
        store: str | Path,
        *,
        chat: bool | None = None,
        rule: Literal["question", "all"] | None = None,
        k: int | None = None,
        tau: float | None = None,
        seed: int | None = None,
        training: Training | Mapping[str, Any] | None = None,
        trainer: Callable[[Editor], MemoryTrainer] | None = None,
        watch: Callable[[TrainingStep], None] = lambda _: None,
        alive: Callable[[], None] = lambda: None,
        wordings: Wordings | None = None,
    ):
        """Settings are those of a new store; one that is there has its own, which they must not contradict.

        base: the loaded model.
        store: the folder, made if new.
        chat: ask each prompt through the chat template (default: yes).
        rule: which tokens are pooled (default: the question's).
        k: ones in every mask (default: the preset's).
        tau: least overlap that matches, which then stays (default: the store sets it with every change).
        seed: of the permutation and of training (default: 0).
        training: how edits are trained, or some fields of it by name.
        trainer: makes what trains, as the editor is entered (default: a `Trainer` in this process).
        watch: called before every gradient step of that default.
        alive: called by that default between earlier edits, as they are run again or asked, which may take long.
        wordings: of an editor that has been left: what that one knows of the edits in the store is not run again.
        Raises ConfigError for settings that cannot work; on entering also for those that contradict the store.
        """
        self.base = base
        self.path = Path(store)
        self._settings = Settings.from_options(
            layer=base.layer,
            place=base.place,
            dtype=base.dtype,
            chat=chat,
            rule=rule,
            k=k,
            tau=tau,
            seed=seed,
            training=training,
        )
        if not (self.path / MANIFEST).exists():
            self._settings.resolved(base)  # refused here, before the folder is made
        self._make_trainer = trainer
        self._watch = watch
        self._alive = alive
        self._store: OpenStore | None = None
        self._wordings = wordings
        self.outcome = Outcome()

    def __enter__(self) -> Editor:
        self._store = OpenStore(self.base, self.path, self._settings)
        try:
            self._begin(self._store)
        except BaseException:
            self._store.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self._session.trainer.stop()
        finally:
            self.store.close()

    def _trainer(self, wordings: Wordings) -> MemoryTrainer:
        if self._make_trainer:
            return self._make_trainer(self)
        return Trainer(self.base, wordings, self.store.training, self._watch, self._alive)

    def _begin(self, store: OpenStore) -> None:
        self._session = Session(store, self._trainer, self._wordings)
        self._wordings = self._session.wordings

    def _restart(self) -> None:
        """Have no memory open in the trainer."""
        self._session.trainer.stop()
        self._begin(self.store)

    @property
    def wordings(self) -> Wordings:
        """How the store's edits are asked, and what is known of them. Raises StoreError before it was entered."""
        if self._wordings is None:
            raise _closed(self.path)
        return self._wordings

    @property
    def store(self) -> OpenStore:
        """The store as it is, or was when the editor was left. Raises StoreError before the editor was entered."""
        if self._store is None:
            raise _closed(self.path)
        return self._store

    def _open(self) -> Session:
        """What trains. Raises StoreError unless the editor is entered."""
        if not self.store.is_open:
            raise _closed(self.path)
        return self._session

    @property
    def manifest(self) -> Manifest:
        """The store's manifest, with the settings that hold."""
        return self.store.manifest

    @property
    def generation(self) -> int:
        """The store's generation; 0 before the first is written."""
        return self.manifest.generation

    @property
    def edits(self) -> list[StoredEdit]:
        """The edits of the store, those included that are not written yet."""
        return self.store.edits

    @property
    def memories(self) -> list[torch.Tensor]:
        """The residual memories, float32 [H, D] each."""
        return self.store.memories

    @property
    def index(self) -> HammingIndex:
        """The masks of the edits."""
        return self.store.index

    def add(
        self,
        edits: Iterable[Edit],
        *,
        on_conflict: Conflict = "refuse",
        rephrase_masks: bool = False,
        keep_failed: bool = False,
        side_by_side: int | None = None,
        more: int = 0,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[StoredEdit]:
        """Train edits in order and commit them. Returns those that are new, with those that a later one of them has
        replaced; `outcome` has what became of the others.

        An edit that the store has already is skipped, so an interrupted run is resumed by running it again. Of one that
        comes twice the second is skipped.
        edits: what is added.
        on_conflict: what happens to a question that the store, or an edit before, answers differently. The same text:
            "refuse" and "both" raise EditFileError before the first edit is trained, "first" keeps the edit that was
            there first, "last" replaces it.
            Other words with nearly the same mask: "refuse" and "first" leave the new edit out, "last" replaces all
            stored ones that answer differently, "both" stores it beside them; each is reported.
        rephrase_masks: an edit's rephrasings are trained too and get masks of their own. One that is stored without
            these masks is trained again, and replaced.
        keep_failed: store edits that failed the audit as well, unless training gave NaN or infinite numbers.
        side_by_side: so many memories are trained at a time, and each edit goes to the emptiest of them. By default as
            many as the edits would fill one after the other, at most 4: so one for what fits into one.
        more: edits that are to be added after these, and count in that default.
        progress: called after every edit.
        Interrupted (KeyboardInterrupt, or any error), the edits that are done are committed first.
        Raises ConfigError, before the first edit is trained, where $SOURCE_DATE_EPOCH is no time, and for a
        `side_by_side` below 1.
        """
        session, store = self._open(), self.store
        if side_by_side is not None and side_by_side < 1:
            raise ConfigError(f"side_by_side is {side_by_side}: choose 1 or more, or leave it out")
        edit_time()  # refused before anything is trained
        wanted = list(edits)
        for edit in wanted:
            session.wordings.check(edit, len(edit.rephrases) * rephrase_masks)
        masks = Counter(store.index.ids.tolist())

        def masked(edit: StoredEdit) -> int:
            return session.wordings.rephrases(masks[edit.id])

        def masks_kept(old: StoredEdit | None) -> int:
            return masked(old) if old and not old.trained else 0

        todo, replaced = plan(wanted, store.edits, on_conflict, masked, rephrase_masks)
        for edit in todo:
            if kept := masks_kept(replaced.get(prompt_key(edit.prompt))):
                session.wordings.check(edit, kept)
        self.outcome = outcome = Outcome(skipped=len(wanted) - len(todo))
        n = min(side_by_side or self.side_by_side(len(wanted) + more), max(1, len(wanted)))

        def batch(done: int) -> list[NewEdit]:
            numbers = range(store.manifest.next_id, store.manifest.next_id + n)
            return [
                NewEdit(edit, number, len(edit.rephrases) if rephrase_masks else masks_kept(old), old)
                for number, edit in zip(numbers, todo[done : done + n], strict=False)
                for old in [replaced.get(prompt_key(edit.prompt))]
            ]

        choices = Choices(n, on_conflict, keep_failed, None if side_by_side else len(todo) + more)
        try:
            session.train_all(len(todo), batch, outcome, choices, progress, Checkpoints(store))
        finally:
            if store.changed:
                store.commit()
        return outcome.stored

    def compact(
        self,
        progress: Callable[[Progress], None] = lambda _: None,
        *,
        acts: Literal["first", "last"] | None = None,
    ) -> list[StoredEdit]:
        """Train the stored edits again, from an empty memory, in their order and under their ids, and publish that.

        progress: called after every edit.
        acts: "first": the residual acts from a question's first token on from now on; "last": from the token before
            the answer, as in new chat stores; by default as before.
        Returns them; one that fails the audit is kept, and named in `outcome`. Nothing is left of edits that were
        removed or replaced. Interrupted, store and editor are what they were, or, if the new generation
        was published already, what it is.
        Raises ConfigError for "last" where the span rule is "all", StoreError where training an edit gives NaN or
        infinite numbers; store and editor are then what they were, too.
        """
        self._open()
        store = self.store
        state = store.state
        self.outcome = outcome = Outcome()
        masks = Counter(state.index.ids.tolist())
        n = self.side_by_side(len(state.edits))

        def batch(done: int) -> list[NewEdit]:
            return self._session.stored_again(state.edits[done : done + n], masks)

        try:
            store.empty(acts)
            self._restart()
            choices = Choices(n, "both", keep_failed=True, left=len(state.edits))
            self._session.train_all(len(state.edits), batch, outcome, choices, progress)
            stored = {edit.id for edit in store.edits}
            for edit in state.edits:
                if edit.id not in stored:
                    raise StoreError(
                        f"edit {edit.id} of store {self.path} cannot be trained again, because that gives NaN or "
                        "infinite numbers: remove it first; nothing was changed"
                    )
            store.manifest = msgspec.structs.replace(store.manifest, next_id=state.manifest.next_id)
            store.commit()
        except BaseException:
            if not store.is_published(state):
                store.restore(state)
            self._restart()
            raise
        return outcome.stored

    def side_by_side(self, edits: int) -> int:
        """How many memories `add` trains at a time by default.

        edits: how many it is to add.
        """
        return self._open().places.side_by_side(edits)


def _closed(path: Path) -> StoreError:
    return StoreError(
        f"the editor of {path} is not open: write `with Editor(base, store) as editor:` and use it in there"
    )
