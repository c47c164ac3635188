"""What to type against an error of the library, which itself names no option."""

from __future__ import annotations

from memoir_retrieval.errors import MemoirError, Reason

__all__ = ["message"]

_CURES = {
    Reason.CONFLICT: "choose with --on-conflict first (keep the first one) or last (the last one wins)",
    Reason.CORPUS: "name a folder that has WikiText with --data or MEMOIR_DATA, or leave these methods out (--method)",
    Reason.DATA: "name the folder of the data sets with --data or MEMOIR_DATA, or give the path of an edit file",
    Reason.MANY: "measure a store with the file it was made from, or with fewer of its edits (--limit)",
    Reason.METHODS: "leave these out (name the others with --method)",
    Reason.NO_CLUSTER: "start one, or leave out --ray",
    Reason.NO_TEMPLATE: "use raw prompts (--no-chat)",
    Reason.OTHER_EDITS: "choose a new folder, or --replace to drop them",
    Reason.RAW_STORE: "drop --no-chat",
    Reason.REPHRASES: "give those of FILE masks with --rephrase-masks, or leave its rephrasings out",
    Reason.RUN: "choose another --out, or look at a finished one with `memoir report`",
    Reason.WHOLE_PROMPTS: "leave out --span all, or 'requires'",
}


def message(error: MemoirError) -> str:
    """An error in one line, with the options of the command line in it where they are what helps.

    error: of the library.
    """
    if error.reason == Reason.SETTINGS and error.about[0] != "tau":
        return f"{error.fact}: leave out {_option(*error.about[::2])}, or choose a new folder"
    cure = _CURES.get(Reason(error.reason), error.cure) if error.reason else error.cure
    return f"{error.fact}: {cure}" if cure else str(error)


def _option(name: str, value: object) -> str:
    """The option that gave a setting of the library, which its name is but for a few."""
    section, _, field = name.rpartition(".")
    if name == "chat":
        return "--chat" if value else "--no-chat"
    if section and field != "context_masks":
        return f"--training {field}={value}"
    option = {"rule": "span"}.get(field, field).replace("_", "-")
    return f"--{option} {value}"
