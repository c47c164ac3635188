"""Data that comes with the library, such as the prompts whose mean fingerprint is taken off every fingerprint."""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["background_prompts", "shipped"]


def shipped(name: str) -> str:
    """Return the text of a file of the library's `data` folder."""
    return files("memoir_retrieval").joinpath("data", name).read_text(encoding="utf-8")


def background_prompts() -> list[str]:
    """Return the 100 unrelated prompts that come with the library, in a fixed order."""
    return [json.loads(line)["text"] for line in shipped("background.jsonl").splitlines()]
