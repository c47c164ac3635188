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

import msgspec

from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import HubError, Reason, StoreError, StoreMismatch
from memoir_retrieval.store.card import SCORES, model_card
from memoir_retrieval.store.files import store_lock
from memoir_retrieval.store.manifest import KINDS, MANIFEST, MOST_BYTES, FileEntry, read_manifest, without_files
from memoir_retrieval.store.read import EditStore
from memoir_retrieval.store.write import refuse_foreign, write_again

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Pulled", "Pushed", "pull", "push"]

CARD = "README.md"
_FILE = re.compile(r"(memory|codes|edits|added)-\d+\.(safetensors|jsonl)")
_ADDITION = re.compile(r"added-\d+\.safetensors")


class Pushed(NamedTuple):
    """Where a generation is now.

    repo: on the Hub.
    revision: the commit.
    sha256: of memoir.json, which holds the digests of the rest.
    generation: its number.
    edits: how many it has.
    """

    repo: str
    revision: str
    sha256: str
    generation: int
    edits: int


class Pulled(NamedTuple):
    """What a folder holds now.

    revision: the commit that it came from.
    sha256: of memoir.json as it was fetched.
    generation: its number here.
    edits: how many it has.
    changed: False where the folder had these edits already.
    """

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

    store: folder of the store.
    repo: "owner/name"; made where it does not exist.
    scores: a file with the JSON of `memoir eval`.
    licence: as in a model card, such as "cc-by-4.0".
    public: whether a new repository is for everybody.
    The endpoint is $HF_ENDPOINT, else the Hub itself.
    Raises StoreError for a store that cannot be opened, HubError where the Hub refuses, `repo` holds something
    else than a store, or `scores` are none.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    values = _read_scores(scores) if scores else None
    api = _api()
    with tempfile.TemporaryDirectory() as scratch:
        opened = _copy(Path(store), Path(scratch))  # a writer may replace the generation during a long upload
        generation = opened.manifest.generation
        manifest = (opened.path / MANIFEST).read_bytes()
        names = [getattr(opened.manifest, kind).name for kind in KINDS]
        add: dict[str, Any] = {name: str(opened.path / name) for name in names}
        add |= {MANIFEST: manifest, CARD: model_card(opened, repo, values, licence).encode()}
        if values is not None:
            add[SCORES] = json.dumps(values, indent=1).encode()
        with _hub_errors(repo):
            api.create_repo(repo, private=not public, exist_ok=True)
            now = api.model_info(repo)
            old = {file.rfilename for file in now.siblings or ()}
            if old - {".gitattributes"} and MANIFEST not in old:
                raise HubError(
                    f"{repo} holds files of something other than a store ({min(old - {'.gitattributes'})}): choose "
                    "another name"
                )
            stale = {name for name in old if _FILE.fullmatch(name)} | ({SCORES} & old)
            commit = api.create_commit(
                repo,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in add.items()]
                + [CommitOperationDelete(path_in_repo=name) for name in sorted(stale - set(add))],
                commit_message=f"Generation {generation}: {len(opened.edits)} edits",
                parent_commit=now.sha,  # refused where somebody else has pushed meanwhile
            )
    return Pushed(repo, commit.oid, hashlib.sha256(manifest).hexdigest(), generation, len(opened.edits))


def pull(
    repo: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    replace: bool = False,
) -> Pulled:
    """Fetch a store from the Hub into a folder, checked before the folder is touched.

    The manifest is fetched first, and checked; then the files that it names, of the sizes that it gives, and no other.

    A store that is in the folder gets the edits as its next generation, in one step, as any writer makes one; its
    readers see the old generation or the new one.

    repo: "owner/name".
    folder: of a store, or a new one.
    revision: a commit, tag or branch (default: the newest).
    sha256: what memoir.json must have, as `push` printed it; it holds the digests of all other files.
    replace: whether edits of the folder that the repository lacks are dropped.
    Raises HubError where the Hub refuses or the digest is another; StoreError for a store that is damaged, locked or
    cannot be written, and for a folder of something else; StoreMismatch where the folder has a store of another base
    model, or edits that would be lost (`replace` drops them). The folder is then what it was.
    """
    target = Path(folder)
    if not (target / MANIFEST).exists():
        refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".memoir-pull-") as scratch:
        with _hub_errors(repo):
            info = _api().model_info(repo, revision=revision)
        commit, names = str(info.sha), {file.rfilename for file in info.siblings or ()}
        if MANIFEST not in names:
            raise HubError(
                f"{repo} at {commit} is not a store: it has no {MANIFEST}; name a repository of `memoir push`"
            )
        try:
            data = _fetch(repo, commit, MANIFEST, scratch, MOST_BYTES).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if sha256 is not None and digest != sha256.lower():
                raise HubError(
                    f"{repo} at {commit} has a {MANIFEST} of sha256 {digest}, not {sha256}: do not use it before you "
                    "know why; nothing was changed"
                )
            manifest = read_manifest(Path(scratch))
            if additions := sorted(name for name in names if _ADDITION.fullmatch(name)):
                raise StoreError(f"it has {additions[0]}, which no push makes: push that store with `memoir push`")
            # The manifest's digest stands for these three files and for no other, so no other is fetched.
            for kind in KINDS:
                entry: FileEntry = getattr(manifest, kind)
                if entry.name not in names:
                    raise StoreError(f"it has no {entry.name}, which its manifest names")
                _fetch(repo, commit, entry.name, scratch, entry.size)
            fetched = EditStore.open(scratch)
        except StoreError as error:
            reason = str(error).replace(str(scratch), f"{repo}@{commit[:12]}")
            raise StoreError(f"what the Hub sent cannot be used, and nothing was changed: {reason}") from error
        generation, changed = _adopt(fetched, target, repo, replace)
    return Pulled(commit, digest, generation, len(fetched.edits), changed)


def _fetch(repo: str, commit: str, name: str, folder: str, most: int) -> Path:
    """Download one file of a commit into a folder. Returns its path.

    repo: "owner/name".
    commit: its digest.
    name: of the file, in the repository and in the folder.
    folder: where it goes.
    most: bytes that it may have.
    Raises StoreError, before the download, where the Hub says that it has more, and
    during it where it turns out to.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.utils import tqdm

    def refuse(size: str) -> StoreError:
        return StoreError(f"{name} has {size} bytes, and may have {most} at most")

    class DownloadLimit(tqdm):
        """A progress bar sees every piece that is downloaded, shown or not."""

        received = 0
        monitor_interval = 0  # tqdm keeps a thread for each class of bars for as long as the process lives

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > most:
                raise refuse(f"{self.received} or more")
            return super().update(n)

    endpoint = _endpoint()
    with _hub_errors(repo):
        size = _api().get_hf_file_metadata(url=hf_hub_url(repo, name, revision=commit, endpoint=endpoint)).size
        if size is not None and size > most:
            raise refuse(str(size))
        path = hf_hub_download(
            repo, name, revision=commit, local_dir=folder, endpoint=endpoint, tqdm_class=DownloadLimit
        )
    return Path(path)


def _adopt(fetched: EditStore, folder: Path, repo: str, replace: bool) -> tuple[int, bool]:
    """Publish what was fetched; returns the generation in the folder, and whether it is new."""
    theirs = fetched.manifest
    with store_lock(folder):
        if not (folder / MANIFEST).exists():
            return write_again(folder, fetched, generation=theirs.generation).generation, True
        held = EditStore.open(folder)
        ours = held.manifest
        held.require(theirs.base, f"the store of {repo}")
        digests = [[getattr(manifest, kind).sha256 for kind in KINDS] for manifest in (ours, theirs)]
        if digests[0] == digests[1] and without_files(ours, generation=0) == without_files(theirs, generation=0):
            return ours.generation, False
        lost = _lost(held, fetched)
        if lost and not replace:
            raise StoreMismatch(
                f"store {folder} has {len(lost)} edits that {repo} does not have, or has untrained or in another chat, "
                f"such as {min(lost)!r}",
                cure="choose a new folder, or replace it and lose them",
                reason=Reason.OTHER_EDITS,
            )
        next_id = max(ours.next_id, theirs.next_id)  # ids are never used twice, here either
        return write_again(folder, fetched, generation=ours.generation + 1, next_id=next_id).generation, True


def _lost(held: EditStore, fetched: EditStore) -> list[str]:
    """The prompts of the edits that one store has and another lacks, or has not trained where the first has."""

    def key(edit: StoredEdit) -> bytes:
        return msgspec.json.encode((edit.prompt, edit.target, edit.requires, edit.before))

    there = {(key(edit), trained) for edit in fetched.edits for trained in {False, edit.trained}}
    return [edit.prompt for edit in held.edits if (key(edit), edit.trained) not in there]


def _read_scores(path: str | Path) -> dict[str, Any]:
    try:
        scores = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise HubError(f"{path} cannot be read ({error}): give the JSON that `memoir eval` wrote") from error
    if not isinstance(scores, dict) or "reliability" not in scores:
        raise HubError(f"{path} holds no scores: give the JSON that `memoir eval` wrote")
    return scores


def _copy(folder: Path, scratch: Path) -> EditStore:
    """A copy of one generation, checked. A writer that replaces it meanwhile costs another try."""
    for attempt in range(3):
        opened = EditStore.open(folder)
        names = [getattr(opened.manifest, kind).name for kind in KINDS]
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
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The base of its errors is that of the HTTP library it uses: httpx, or from huggingface_hub 2 on httpx2.
    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]

    def first(error: Exception) -> str:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]

    try:
        yield
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no {repo} that you may read: check its name, and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} has no such revision ({first(error)}): give a commit, tag or branch it has") from error
    except HFValidationError as error:
        raise HubError(f"{repo!r} is not a repository name: write owner/name") from error
    except (transport_error, LocalEntryNotFoundError, ValueError) as error:
        raise HubError(f"the Hub refused {repo} ({first(error)}): check the network and `hf auth whoami`") from error
    except OSError as error:
        raise HubError(f"{repo} was not transferred ({first(error)}): try again; nothing was changed") from error
