"""Errors a user can meet. Each message is one line: the value, why, what to type instead."""

from memoir_index.errors import CodeError, MemoirError

__all__ = [
    "AdminError",
    "CodeError",
    "ConfigError",
    "EditFileError",
    "HubError",
    "MemoirError",
    "ModelError",
    "StoreError",
    "StoreMismatch",
]


class AdminError(MemoirError):
    """A running server that cannot be administered, or refuses a change or a question."""


class ConfigError(MemoirError, ValueError):
    """An option or a combination of options that cannot work."""


class EditFileError(MemoirError, ValueError):
    """An edit file, or one record of it, that cannot be used."""


class HubError(MemoirError):
    """A repository on the Hugging Face Hub that cannot be read or written, or is not what was asked for."""


class ModelError(MemoirError, ValueError):
    """A base model that cannot be found, read or edited."""


class StoreError(MemoirError):
    """A store that is missing, damaged, half-written or locked."""


class StoreMismatch(StoreError):
    """A sound store that belongs to another model, layer, tokenizer or library version."""
