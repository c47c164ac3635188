"""Plain text to measure perplexity on."""

from __future__ import annotations

import json
from pathlib import Path

from memoir_retrieval.errors import ConfigError

__all__ = ["read_texts"]

WORDS = (40, 160)
"""A shorter paragraph is a heading or a caption and is left out; a longer one is cut, which bounds time and memory."""


def read_texts(path: Path, most: int = 40) -> list[str]:
    """The first paragraphs of a file, at most 160 words of each.

    The file is UTF-8: one JSON object with a key `text` per line (a name that ends in .jsonl), or text in which blank
    lines part paragraphs.

    path: of the file.
    most: how many paragraphs.

    Raises ConfigError where it cannot be read or holds no paragraph of 40 words.
    """
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            paragraphs = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        else:
            paragraphs = content.split("\n\n")
        words = [paragraph.split() for paragraph in paragraphs]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a file of text") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f'{path}: is neither UTF-8 text nor JSONL with one {{"text": "..."}} per line') from None
    texts = [" ".join(paragraph[: WORDS[1]]) for paragraph in words if len(paragraph) >= WORDS[0]]
    if not texts:
        raise ConfigError(f"{path}: holds no paragraph of {WORDS[0]} words; part paragraphs by blank lines")
    return texts[:most]
