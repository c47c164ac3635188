"""The unrelated prompts whose mean fingerprint is taken off every fingerprint."""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["background_prompts"]


def background_prompts() -> list[str]:
    """Return the 100 unrelated prompts that come with the library, in a fixed order."""
    text = files("memoir_retrieval").joinpath("data/background.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.splitlines()]
