"""Errors a user can meet. Each message is one line: the value, why, what to do instead."""

from enum import StrEnum

from memoir_index.errors import CodeError, MemoirError

__all__ = [
    "AdminError",
    "CodeError",
    "ConfigError",
    "EditFileError",
    "HubError",
    "MemoirError",
    "ModelError",
    "Reason",
    "ServerError",
    "StoreError",
    "StoreMismatch",
]


class Reason(StrEnum):
    """Why an error was raised, where the command line and the HTTP API say in their own words what to do about it.

    CONFLICT: a prompt has two answers, in a file or in a file and the store.
    CORPUS: methods that are compared need statistics of more text.
    DATA: a data set is not where it was looked for.
    MANY: more edits are asked about than the store has.
    METHODS: some of the methods that are compared cannot edit the model.
    NO_CLUSTER: no Ray cluster answers.
    NO_TEMPLATE: the model has no chat template.
    OTHER_EDITS: a pull would drop edits of the folder.
    RAW_STORE: the store asks raw prompts, and the edit is part of a chat.
    REPHRASES: an edit was built with masks of other rephrasings.
    RUN: the folder of a quality run holds another one.
    SETTINGS: the store was made with other settings; `about` is a `Contradiction`.
    WHOLE_PROMPTS: the store pools whole prompts, and the edit requires words of a question.
    """

    CONFLICT = "conflict"
    CORPUS = "corpus"
    DATA = "data"
    MANY = "many"
    METHODS = "methods"
    NO_CLUSTER = "no_cluster"
    NO_TEMPLATE = "no_template"
    OTHER_EDITS = "other_edits"
    RAW_STORE = "raw_store"
    REPHRASES = "rephrases"
    RUN = "run"
    SETTINGS = "settings"
    WHOLE_PROMPTS = "whole_prompts"


class ConfigError(MemoirError, ValueError):
    """An option or a combination of options that cannot work."""


class EditFileError(MemoirError, ValueError):
    """An edit file, or one record of it, that cannot be used."""


class HubError(MemoirError):
    """A repository on the Hugging Face Hub that cannot be read or written, or is not what was asked for."""


class ModelError(MemoirError, ValueError):
    """A base model that cannot be found, read or edited."""


class ServerError(MemoirError):
    """A running server that cannot be reached, refuses a request, or answers in a form that is not known here."""


class AdminError(ServerError):
    """A running server that cannot be administered, or refuses a change or a question."""


class StoreError(MemoirError):
    """A store that is missing, damaged, half-written or locked."""


class StoreMismatch(StoreError):
    """A sound store that belongs to another model, layer, tokenizer or library version."""
