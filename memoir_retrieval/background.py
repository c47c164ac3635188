"""Prompts that come with the library: those whose mean is taken off every fingerprint, and others to measure with."""

from __future__ import annotations

import json
from importlib.resources import files

__all__ = ["background_prompts", "control_prompts", "reference_prompts", "shipped", "unrelated_prompts"]


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


def _texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in shipped(name).splitlines()]
