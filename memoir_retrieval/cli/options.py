"""Options that several commands take, by subject: each decorator adds them and hands them on as one value.

@model_options()
def command(model: ModelOptions) -> None: ...
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from memoir_retrieval.cli.common import notes, refuse_idle
from memoir_retrieval.edits.files import FORMATS, Keep, check_duplicates, limit_distinct_subjects, read_edits
from memoir_retrieval.edits.record import Edit, StoredEdit, prompt_key
from memoir_retrieval.edits.requires import require_subjects
from memoir_retrieval.errors import ConfigError
from memoir_retrieval.evaluation.contexts import CONTEXTS
from memoir_retrieval.evaluation.texts import read_texts
from memoir_retrieval.model.places import PLACES, Place
from memoir_retrieval.store.manifest import Manifest
from memoir_retrieval.store.settings import Settings

if TYPE_CHECKING:
    from memoir_retrieval.model.base import BaseModel

__all__ = [
    "FileOptions",
    "MeasuringOptions",
    "ModelOptions",
    "RayOptions",
    "StoreSettings",
    "TrainingOptions",
    "context_masks_option",
    "data_folder_option",
    "file_options",
    "measuring_options",
    "model_options",
    "place_option",
    "ray_options",
    "require_subject_option",
    "require_typed_subjects",
    "store_settings_options",
    "training_options",
]

R = TypeVar("R")
Decorator = Callable[[Callable[..., R]], Callable[..., R]]


def bundle(name: str, kind: Callable[..., Any], options: Sequence[Decorator]) -> Decorator:
    """A decorator that adds options to a command, which gets their values as one `kind` under `name`.

    Fields of `kind` that no option sets keep their defaults.
    """
    names = signature(kind).parameters

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> R:
            fields = {field: kwargs.pop(field) for field in names if field in kwargs}
            return command(*args, **{name: kind(**fields)}, **kwargs)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


require_subject_option = click.option(
    "--require-subject", is_flag=True, help="Edits with a subject act only on questions that contain it."
)


def require_typed_subjects(edits: list[Edit], where: str) -> list[Edit]:
    """The edits as --require-subject has them, with a note on those that require nothing still.

    edits: as read.
    where: they come from.

    Raises ConfigError where the option changes none of them, EditFileError where a subject is not in its prompt.
    """
    restricted = require_subjects(edits)
    if restricted == edits:
        reason = f"no record of {where} has a subject"
        if any(edit.subject for edit in edits):
            reason = f'each record of {where} that has a subject has "requires" already'
        raise ConfigError(
            f'--require-subject does nothing: {reason}; add "subject", or "requires", or leave the option out'
        )
    lacking = sum(not edit.requires for edit in restricted)
    if lacking:
        notes.print(f"{lacking} of {len(edits)} edits have no subject and require no words")
    return restricted


place_option = click.option(
    "--place",
    type=click.Choice(PLACES),
    help="Projection of the block that is edited: the second of its FFN, or the output of its attention (default: "
    "ffn; attention in a mixture of experts).",
)
data_folder_option = click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    envvar="MEMOIR_DATA",
    default="data",
    show_default=True,
    help="Folder of the published data sets; the variable MEMOIR_DATA sets it too.",
)
context_masks_option = click.option(
    "--context-masks",
    type=click.IntRange(0, 1),
    metavar="N",
    help="Further masks of each question, made after an earlier turn. With one, edits match more often in chats, and "
    "the index is twice as large (default: 1; 0 for raw prompts).",
)


class FileOptions(NamedTuple):
    """How an edit file is read.

    file_format: by its name; None: it is recognised.
    limit: only the first so many records with distinct subjects.
    """

    file_format: str | None = None
    limit: int | None = None

    def load(self, file: Path, keep: Keep) -> list[Edit]:
        """The edits of a file, each prompt once.

        file: its path.
        keep: which edit of a prompt counts where there are several.

        Raises EditFileError.
        """
        return self._once(read_edits(file, self.file_format, note=notes.print), keep)

    def load_stored(self, file: Path, stored: Sequence[StoredEdit]) -> list[Edit]:
        """The edits of a file, each prompt once: with the target that is stored, or else its first.

        file: its path.
        stored: the edits of the store that was made from it.

        Raises EditFileError.
        """
        edits = read_edits(file, self.file_format, note=notes.print)
        there = {(prompt_key(edit.prompt), edit.target) for edit in stored}
        keys = [(prompt_key(edit.prompt), edit.target) for edit in edits]
        kept = {prompt for prompt, target in keys if (prompt, target) in there}
        wanted = [edit for edit, key in zip(edits, keys, strict=True) if key in there or key[0] not in kept]
        return self._once(wanted, "first")

    def _once(self, edits: list[Edit], keep: Keep) -> list[Edit]:
        edits = check_duplicates(edits, keep)
        return limit_distinct_subjects(edits, self.limit) if self.limit else edits


file_options = bundle(
    "source",
    FileOptions,
    (
        click.option(
            "--format", "file_format", type=click.Choice(list(FORMATS)), help="Format of FILE (default: detected)."
        ),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first N records with distinct subjects."),
    ),
)


class ModelOptions(NamedTuple):
    """Which model, and where and in which precision it runs. None: the store's own.

    model_name: a name or a folder.
    device: of torch.
    dtype: of the weights.
    """

    model_name: str | None = None
    device: str = "cpu"
    dtype: str | None = None

    def load(
        self, manifest: Manifest | None = None, *, layer: int | None = None, place: Place | None = None
    ) -> BaseModel:
        """Load the model.

        manifest: of a store whose model, layer and dtype count where none is named.
        layer: the block that is edited.
        place: the projection in it.

        Raises ModelError.
        """
        from memoir_retrieval.model.base import load_model

        name = self.model_name or (manifest.model if manifest else None)
        if name is None:
            raise ConfigError("no model is named: add --model NAME, such as smollm2-135m")
        notes.print(f"loading {name}")
        return load_model(
            name,
            layer=manifest.layer if manifest and layer is None else layer,
            place=manifest.place if manifest and place is None else place,
            dtype=self.dtype or (manifest.dtype if manifest else "float32"),
            device=self.device,
        )


def model_options(
    *, default: str | None = None, required: bool = False, dtype: str | None = "float32, bfloat16 or float16."
) -> Decorator:
    """--model, --device and, unless its help is None, --dtype.

    default: of --model.
    required: whether --model is.
    dtype: help of --dtype.
    """
    default_note = "" if default or required else " (default: the store's own)"
    options = [
        click.option(
            "--model",
            "-m",
            "model_name",
            default=default,
            required=required,
            show_default=default is not None,
            help=f"Folder, embedded model or Hub id; +FOLDER behind it adds a LoRA adapter{default_note}.",
        ),
        click.option("--device", default="cpu", show_default=True, help="Where the model runs, such as cuda."),
    ]
    if dtype is not None:
        options.append(click.option("--dtype", help=dtype))
    return bundle("model", ModelOptions, options)


class StoreSettings(NamedTuple):
    """What a store is made with; None where it was not typed.

    chat, layer, place, k, tau, span, seed: see `Settings`.
    """

    chat: bool | None = None
    layer: int | None = None
    place: Place | None = None
    k: int | None = None
    tau: float | None = None
    span: str | None = None
    seed: int | None = None

    def to_settings(self, training: TrainingOptions, dtype: str | None = None) -> Settings:
        """These and other options as the library judges them.

        training: how edits are trained.
        dtype: of the model.

        Raises ConfigError for what cannot be.
        """
        return Settings.from_options(
            layer=self.layer,
            place=self.place,
            dtype=dtype,
            chat=self.chat,
            rule=self.span,
            k=self.k,
            tau=self.tau,
            seed=self.seed,
            training=training.fields(),
        )

    def for_editor(self, *, chat: bool | None = None) -> dict[str, Any]:
        """Arguments of `Editor`.

        chat: where neither --chat nor --no-chat was typed.
        """
        usual = chat if self.chat is None else self.chat
        return {"chat": usual, "rule": self.span, "k": self.k, "tau": self.tau, "seed": self.seed}


def store_settings_options(*, chat: bool = True) -> Decorator:
    """--chat, --layer, --place, --k, --tau, --span and --seed.

    chat: whether prompts go through the template by default.
    """
    usual = "through the chat template (default), or raw" if chat else "through the chat template, or raw (default)"
    return bundle(
        "settings",
        StoreSettings,
        (
            click.option("--chat/--no-chat", default=None, help=f"Ask prompts {usual}."),
            click.option("--layer", type=int, help="Block that is edited (default: the preset's)."),
            place_option,
            click.option("--k", type=int, help="Ones in every mask (default: the preset's)."),
            click.option(
                "--tau",
                type=float,
                help="Least overlap that matches, in (0, 1], for good (default: the store sets it with every change).",
            ),
            click.option(
                "--span", type=click.Choice(["question", "all"]), help="Which tokens are pooled (default: question)."
            ),
            click.option("--seed", type=int, help="Seed of the permutation and of training (default: 0)."),
        ),
    )


class TrainingOptions(NamedTuple):
    """How edits are trained, as it was typed.

    training: pairs NAME=VALUE.
    context_masks: see `Training`.
    side_by_side: see `Editor.add`.
    """

    training: tuple[str, ...] = ()
    context_masks: int | None = None
    side_by_side: int | None = None

    def fields(self) -> dict[str, int | float | str]:
        """The fields of `Training` that were given; the library judges them.

        Raises ConfigError for what is no NAME=VALUE, and for a name that is given twice.
        """
        fields: dict[str, int | float | str] = {}
        for text in self.training:
            name, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"--training {text}: write NAME=VALUE such as contexts=3")
            if name in fields:
                raise ConfigError(f"--training {text}: {name} is {fields[name]} already; leave one of the two out")
            fields[name] = _number(value)
        if self.context_masks is None:
            return fields
        if "context_masks" in fields:
            typed = f"--context-masks {self.context_masks}"
            raise ConfigError(
                f"{typed}: context_masks is {fields['context_masks']} by --training already; leave one of the two out"
            )
        return fields | {"context_masks": self.context_masks}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


training_options = bundle(
    "training",
    TrainingOptions,
    (
        context_masks_option,
        click.option(
            "--training",
            multiple=True,
            metavar="NAME=VALUE",
            help="A setting of training. With variants=16, for example, each edit is trained in more wordings: "
            "rephrasings are answered better, and training takes longer.",
        ),
        click.option(
            "--side-by-side",
            type=click.IntRange(min=1),
            metavar="N",
            help="Residual memories that are trained at the same time (default: as many as the file fills, at most 4).",
        ),
    ),
)


class RayOptions(NamedTuple):
    """A Ray cluster that does the work, or none.

    address: as `ray.init` takes it.
    workers: how many processes work.
    """

    address: str | None = None
    workers: int = 2

    def check(self) -> None:
        """Raise click.UsageError where workers of no cluster were typed."""
        if self.address is None:
            refuse_idle("without a cluster", "add --ray ADDRESS, or leave it out", "workers")


ray_options = bundle(
    "ray",
    RayOptions,
    (
        click.option("--ray", "address", help="Ray cluster that does the work: its address, `auto` or `local`."),
        click.option(
            "--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes on the cluster."
        ),
    ),
)


class MeasuringOptions(NamedTuple):
    """What is measured beside the edits.

    context: None where it was not typed.
    controls: how many unrelated prompts are answered freely.
    text_file: of unrelated texts.
    """

    context: str | None = None
    controls: int = 256
    text_file: Path | None = None

    def texts(self, default: Path | None = None) -> list[str]:
        """Texts whose perplexity is compared.

        default: a file to take where none was typed and this one exists.
        """
        file = self.text_file or (default if default and default.is_file() else None)
        return read_texts(file) if file else []


def measuring_options(*, usual: str, text: str = "none") -> Decorator:
    """--context, --controls and --text.

    usual: what the help calls the default context.
    text: what the help calls the default text.
    """
    return bundle(
        "measuring",
        MeasuringOptions,
        (
            click.option(
                "--context",
                type=click.Choice([*CONTEXTS, "all"]),
                help="What stands before a question: nothing (plain), a long system prompt, two earlier turns, "
                "passages "
                "in a system message, or passages in the user's message (inline). all: each of them but inline. "
                "Training "
                f"uses none of these contexts (default: {usual}).",
            ),
            click.option(
                "--controls",
                type=click.IntRange(0, 256),
                default=256,
                show_default=True,
                help="Unrelated prompts whose free answers are compared with the unedited model's.",
            ),
            click.option(
                "--text",
                "text_file",
                type=click.Path(path_type=Path),
                help=f"Text or JSONL whose perplexity is compared (default: {text}).",
            ),
        ),
    )
