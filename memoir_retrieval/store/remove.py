"""Taking edits out of a store: unreachable at once, erased by training the others again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memoir_retrieval.edits.judge import judge_named, shipped_judge
from memoir_retrieval.edits.record import prompt_key
from memoir_retrieval.errors import StoreError
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.threshold import set_tau
from memoir_retrieval.store.write import sweep, write_again

__all__ = ["find_prompts", "remove_edits"]


def find_prompts(store: EditStore, prompts: Sequence[str]) -> list[int]:
    """The ids of the edits of these prompts; white space does not count.

    >>> from memoir_retrieval import EditStore, find_prompts
    >>> find_prompts(EditStore.open("edits"), ["Who is the CEO  of Example Corp?"])
    [0]

    store: which holds them.
    prompts: of the edits.

    Raises StoreError where a prompt has no edit.
    """
    # In a large store each edit is decoded for this.
    stored = {prompt_key(edit.prompt): edit.id for edit in store.edits} if prompts else {}
    for prompt in prompts:
        if prompt_key(prompt) not in stored:
            raise StoreError(f"store {store.path} has no edit of {prompt!r}: `memoir list {store.path}` shows all")
    return [stored[prompt_key(prompt)] for prompt in prompts]


def remove_edits(folder: str | Path, ids: Sequence[int]) -> Manifest:
    """Publish a generation in which no prompt reaches these edits. Returns its manifest.

    The masks and the text of the edits are gone then. What they changed in the residual memory is still there, out of
    reach, since edits that were trained later share columns with them: `Editor.compact` erases it. A store that sets
    its own tau sets it again, unless its judge is another one than the library's.

    >>> import shutil
    >>> from memoir_retrieval import EditStore, remove_edits
    >>> _ = shutil.copytree("edits", "fewer")
    >>> remove_edits("fewer", [1]).generation, [edit.id for edit in EditStore.open("fewer").edits]
    (2, [0, 2])

    folder: the store's.
    ids: of the edits.

    Raises StoreError, and changes nothing, for an id that the store does not have, or where it is locked.
    """
    folder = Path(folder)
    EditStore.open(folder, check=False)  # a folder that is no store must not get a lock file
    with store_lock(folder):
        store = EditStore.open(folder)
        gone = {edit_id: store.edit(edit_id) for edit_id in ids}
        untrained = store.manifest.untrained - sum(not edit.trained for edit in gone.values())
        tau, threshold = store.manifest.tau, store.manifest.threshold
        if threshold and store.manifest.judge in ("", shipped_judge().name):
            index = store.index()
            index.remove(list(gone))
            judge = judge_named(store.manifest.judge, store.path)
            tau, threshold = set_tau(index, store.edits, store.references, judge, len(store.manifest.masked_contexts))
        # Else tau stays: with fewer edits its bound holds all the more, and a removal must not wait for another judge.
        manifest = write_again(
            folder,
            store,
            edits=(edit for edit in store.edits if edit.id not in gone),
            rows=np.flatnonzero(~np.isin(store.ids, list(gone))),
            tau=tau,
            threshold=threshold,
            generation=store.manifest.generation + 1,
            untrained=untrained,
        )
        del store
        sweep(folder)
    return manifest
