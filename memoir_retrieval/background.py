"""Prompts that come with the library: those whose mean is taken off every fingerprint, and others to measure with."""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["background_prompts", "shipped", "unrelated_prompts"]


def shipped(name: str) -> str:
    """Return the text of a file of the library's `data` folder."""
    return files("memoir_retrieval").joinpath("data", name).read_text(encoding="utf-8")


def background_prompts() -> list[str]:
    """Return the 100 unrelated prompts that come with the library, in a fixed order."""
    return _texts("background.jsonl")


def unrelated_prompts() -> list[str]:
    """Return 100 other prompts that no edit should match; `calibration` measures tau on them."""
    return _texts("unrelated.jsonl")


def _texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in shipped(name).splitlines()]
