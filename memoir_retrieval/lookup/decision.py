"""What became of one request: the plugin writes it into every response, and each client reads it from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from memoir_retrieval.errors import ServerError

__all__ = ["Decision", "JudgedPart", "Result", "decision_of"]

Result = Literal["matched", "unmatched", "off", "adapter", "image", "unroutable"]


class JudgedPart(msgspec.Struct, frozen=True):
    """What is said of one part of a message. It has no word of an edit: any client may ask for it.

    text: of the part, at most 200 characters.
    edit: the edit that it was judged beside; None where none was near enough.
    overlap: with that edit's mask, in [0, 1]; with the nearest mask where no edit was judged.
    same: whether the part asks that edit's question.
    reason: what decided: "same words", "task", "words", "relation", or "mask" where no judge looked.
    words: of the message, what spoke against the edit: the task, or words that the edit lacks, the heaviest first.
    decides: whether the message's decision is that of this part.
    """

    text: str
    edit: int | None
    overlap: float
    same: bool
    reason: str
    words: tuple[str, ...]
    decides: bool


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one request; `kv_transfer_params["memoir"]` of its response.

    edit: id of the edit that acts on it, or None.
    overlap: with the nearest edit that may act, matched or not, in [0, 1]; 0 where none was looked up. Where nothing
        matches in a store of thousands, it is the nearest edit that was looked at (`memoir_index.Hits`).
    result: "off" where the request opted out, "adapter" where a LoRA adapter answers, "image" where its prompt holds
        an image, a video or sound, "unroutable" where it holds no question.
    generation: of the store that answered.
    nearest: id and overlap of as many edits as the request wants named, best first.
    reason: why the result is "unroutable", where more is known than that the prompt holds no question.
    parts: of a request that wants edits named, what was looked up of its message and what was said of it: the message
        itself, then its parts.
    store: name of the store that was asked, on a server with several; "" for the default one.
    """

    edit: int | None
    overlap: float
    result: Result
    generation: int
    nearest: tuple[tuple[int, float], ...] = ()
    reason: str = ""
    parts: tuple[JudgedPart, ...] = ()
    store: str = ""


def decision_of(reply: Mapping[str, Any]) -> Decision | None:
    """The decision in a server's response; None where the server has no plugin.

    reply: the response, decoded JSON.

    Raises ServerError for a decision of another form than this version's.
    """
    decision = (reply.get("kv_transfer_params") or {}).get("memoir")
    if decision is None:
        return None
    try:
        return msgspec.convert(decision, Decision)
    except msgspec.ValidationError as error:
        raise ServerError(
            f"the server's decision is {decision!r}, which this version does not know ({error}): install the same "
            "memoir-retrieval here and there"
        ) from None
