"""Prompts that come with the library: those whose mean is taken off every fingerprint, others to measure with, and the
chats in which edits are trained."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

__all__ = [
    "background_prompts",
    "chat_contexts",
    "control_prompts",
    "reference_prompts",
    "shipped",
    "unrelated_prompts",
]


def shipped(name: str) -> str:
    """The text of a file of the library's `data` folder.

    name: of the file.
    """
    return files("memoir_retrieval").joinpath("data", name).read_text(encoding="utf-8")


def background_prompts() -> list[str]:
    """Return the 100 unrelated prompts that come with the library, in a fixed order."""
    return _texts("background.jsonl")


def unrelated_prompts() -> list[str]:
    """Return 100 other prompts that no edit should match; `calibration` measures tau on them."""
    return _texts("unrelated.jsonl")


def control_prompts() -> list[str]:
    """Return 256 prompts whose answers no edit should change: all of the above and 56 others."""
    return [*unrelated_prompts(), *background_prompts(), *_texts("controls.jsonl")]


def reference_prompts() -> list[str]:
    """Return the prompts by which stores set tau."""
    return control_prompts()


def chat_contexts() -> list[list[dict[str, Any]]]:
    """Return the eight contexts that come with the library: messages before the user's, in a fixed order."""
    contexts: list[list[dict[str, Any]]] = json.loads(shipped("contexts.json"))
    return contexts


def _texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in shipped(name).splitlines()]
