"""A store as the benchmarks of servers take it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memoir_retrieval.cli.serve import server_command
from memoir_retrieval.model.base import load_tokenizer, resolve
from memoir_retrieval.question.prompts import Prompt, prompt_ids
from memoir_retrieval.store.read import EditStore

__all__ = ["BenchStore"]


class BenchStore:
    """A store that a server could serve, with the tokens of its questions.

    store: opened.
    model: the name of the served model.
    environment: of a server.
    settings: those that every such benchmark is given.
    """

    def __init__(self, folder: Path, model: str | None):
        """folder: of the store.
        model: the name of what is served; None: the store's.

        Raises what `server_command` does for what no server takes.
        """
        self.store = EditStore.open(folder)
        self.model = model or self.store.manifest.model
        _, self.environment = server_command(self.model, folder)
        where = resolve(self.model)
        self._tokenizer = load_tokenizer(where)
        self.settings: dict[str, Any] = {
            "store": str(folder.resolve()),
            "model": str(where),
            "dtype": self.store.manifest.dtype,
        }

    def rows(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts, asked as the store's edits are.

        prompts: text or messages.
        """
        return [prompt_ids(self._tokenizer, prompt, chat=self.store.manifest.chat) for prompt in prompts]
