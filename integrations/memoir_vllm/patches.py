"""Functions of vLLM that the plugin wraps, each once in a process, and which they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["patched", "wrap_once"]

_PATCHED: dict[str, None] = {}


def wrap_once(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put a wrapper in the place of a function, unless that was done in this process before.

    owner: the class or module that holds the function.
    name: of the function.
    make: from the original to what calls it.
    """
    original = getattr(owner, name)
    if hasattr(original, "_memoir"):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper._memoir = True
    setattr(owner, name, wrapper)
    _PATCHED[f"{original.__module__.removeprefix('vllm.').replace('.', '/')}.py: {original.__qualname__}"] = None


def patched() -> tuple[str, ...]:
    """What is wrapped in this process, as "FILE: FUNCTION" of vLLM, in the order in which it was wrapped."""
    return tuple(_PATCHED)
