"""Stores on the Hugging Face Hub: one commit a generation; pulled whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memoir_retrieval.errors import HubError, Reason, StoreError, StoreMismatch
from memoir_retrieval.store.card import SCORES, model_card
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.manifest import KINDS, without_files
from memoir_retrieval.store.read import MANIFEST, EditStore
from memoir_retrieval.store.write import write_again

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Pulled", "Pushed", "pull", "push"]

# What a store may consist of. Nothing else is fetched, and of that only what the manifest names is read.
PATTERNS = [MANIFEST, "*.safetensors", "*.jsonl"]
CARD = "README.md"


class Pushed(NamedTuple):
    """Where a generation is now. revision: the commit. sha256: of memoir.json, which holds the digests of the rest."""

    repo: str
    revision: str
    sha256: str
    generation: int
    edits: int


class Pulled(NamedTuple):
    """What a folder holds now. generation: its number here. changed: False where the folder had these edits already."""

    revision: str
    sha256: str
    generation: int
    edits: int
    changed: bool


def push(
    store: str | Path,
    repo: str,
    *,
    scores: str | Path | None = None,
    licence: str | None = None,
    public: bool = False,
) -> Pushed:
    """Put the current generation of a store on the Hub in one commit, which also removes the one before.

    repo: "owner/name"; made where it does not exist, private unless `public`. scores: the JSON of `memoir eval`.
    licence: as in a model card, such as "cc-by-4.0". The endpoint is $HF_ENDPOINT, else the Hub itself.
    Raises StoreError for a store that cannot be opened, HubError where the Hub refuses, `repo` holds something
    else than a store, or `scores` are none.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    told = _read_scores(scores) if scores else None
    api = _api()
    with tempfile.TemporaryDirectory() as scratch:
        opened = _copy(Path(store), Path(scratch))  # a writer may replace the generation during a long upload
        made = opened.manifest
        manifest = (opened.path / MANIFEST).read_bytes()
        names = [entry.name for entry in (made.memory, made.codes, made.edits)]
        add: dict[str, Any] = {name: str(opened.path / name) for name in names}
        add |= {MANIFEST: manifest, CARD: model_card(opened, repo, told, licence).encode()}
        if told is not None:
            add[SCORES] = json.dumps(told, indent=1).encode()
        with _hub_errors(repo):
            api.create_repo(repo, private=not public, exist_ok=True)
            now = api.model_info(repo)
            there = {file.rfilename for file in now.siblings or ()}
            if there - {".gitattributes"} and MANIFEST not in there:
                raise HubError(
                    f"{repo} holds something else than a store ({min(there - {'.gitattributes'})}): choose another name"
                )
            ours = re.compile(r"(memory|codes|edits|added)-\d+\.(safetensors|jsonl)")
            stale = {name for name in there if ours.fullmatch(name)} | ({SCORES} & there)
            commit = api.create_commit(
                repo,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in add.items()]
                + [CommitOperationDelete(path_in_repo=name) for name in sorted(stale - set(add))],
                commit_message=f"Generation {made.generation}: {len(opened.edits)} edits",
                parent_commit=now.sha,  # refused where somebody else has pushed meanwhile
            )
    return Pushed(repo, commit.oid, hashlib.sha256(manifest).hexdigest(), made.generation, len(opened.edits))


def pull(
    repo: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    replace: bool = False,
) -> Pulled:
    """Fetch a store from the Hub into a folder, checked before the folder is touched.

    revision: a commit, tag or branch (default: the newest). sha256: what memoir.json must have, as `push` told it;
    it holds the digests of all other files. A store that is in the folder gets the edits as its next generation, in
    one step, as any writer makes one; its readers see the old generation or the new one.
    Raises HubError where the Hub refuses or the digest is another; StoreError for a store that is damaged, locked or
    cannot be written; StoreMismatch where the folder has a store of another base model, or edits that would be lost
    (`replace` drops them). The folder is then what it was.
    """
    from huggingface_hub import snapshot_download

    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".memoir-pull-") as scratch:
        with _hub_errors(repo):
            commit = str(_api().model_info(repo, revision=revision).sha)
            snapshot_download(repo, revision=commit, local_dir=scratch, allow_patterns=PATTERNS, endpoint=_endpoint())
        manifest = Path(scratch) / MANIFEST
        if not manifest.is_file():
            raise HubError(f"{repo} at {commit} is no store: it has no {MANIFEST}; name a repository of `memoir push`")
        found = hashlib.sha256(manifest.read_bytes()).hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise HubError(
                f"{repo} at {commit} has a {MANIFEST} of sha256 {found}, not {sha256}: do not use it before you know "
                "why; nothing was changed"
            )
        try:
            fetched = EditStore.open(scratch)
        except StoreError as error:
            said = str(error).replace(str(scratch), f"{repo}@{commit[:12]}")
            raise StoreError(f"what the Hub gave cannot be used, nothing was changed: {said}") from error
        generation, changed = _adopt(fetched, target, repo, replace)
    return Pulled(commit, found, generation, len(fetched.edits), changed)


def _adopt(fetched: EditStore, folder: Path, repo: str, replace: bool) -> tuple[int, bool]:
    """Publish what was fetched; returns the generation in the folder, and whether it is new."""
    theirs = fetched.manifest
    with store_lock(folder):
        if not (folder / MANIFEST).exists():
            return write_again(folder, fetched, generation=theirs.generation).generation, True
        here = EditStore.open(folder)
        ours = here.manifest
        here.require(theirs.base, f"the store of {repo}")
        digests = [[getattr(manifest, kind).sha256 for kind in KINDS] for manifest in (ours, theirs)]
        if digests[0] == digests[1] and without_files(ours, generation=0) == without_files(theirs, generation=0):
            return ours.generation, False
        has = [{(e.prompt, e.target, e.requires) for e in store.edits} for store in (here, fetched)]
        lost = {prompt for prompt, *_ in has[0] - has[1]}
        if lost and not replace:
            raise StoreMismatch(
                f"store {folder} has {len(lost)} edits that {repo} has not, such as {min(lost)!r}",
                cure="choose a new folder, or replace it and lose them",
                reason=Reason.OTHER_EDITS,
            )
        next_id = max(ours.next_id, theirs.next_id)  # ids are never used twice, here either
        made = write_again(folder, fetched, generation=ours.generation + 1, next_id=next_id)
        return made.generation, True


def _read_scores(path: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise HubError(f"{path} cannot be read ({error}): give the JSON that `memoir eval` wrote") from error
    if not isinstance(found, dict) or "reliability" not in found:
        raise HubError(f"{path} holds no scores: give the JSON that `memoir eval` wrote")
    return found


def _copy(folder: Path, scratch: Path) -> EditStore:
    """A copy of one generation, checked. A writer that replaces it meanwhile costs another try."""
    for attempt in range(3):
        opened = EditStore.open(folder)
        names = [getattr(opened.manifest, kind).name for kind in ("memory", "codes", "edits")]
        to = scratch / str(attempt)
        to.mkdir()
        if opened.additions:
            write_again(to, opened, generation=opened.manifest.generation)
            return EditStore.open(to)
        try:
            for name in (*names, MANIFEST):
                shutil.copy(folder / name, to / name)
            return EditStore.open(to)
        except (FileNotFoundError, StoreError):
            continue
    raise StoreError(f"store {folder} changes faster than it can be read: try again when no editor runs")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


def _api() -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return HfApi(endpoint=_endpoint(), library_name="memoir-retrieval")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    import httpx
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def first(error: Exception) -> str:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]

    try:
        yield
    except RepositoryNotFoundError as error:
        raise HubError(f"the Hub shows no {repo} to you: check its name, and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} has no such revision ({first(error)}): give a commit, tag or branch it has") from error
    except HFValidationError as error:
        raise HubError(f"{repo!r} is no name of a repository: write owner/name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, ValueError) as error:
        raise HubError(f"the Hub refused {repo} ({first(error)}): check the network and `hf auth whoami`") from error
