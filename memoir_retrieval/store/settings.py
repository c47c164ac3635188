"""How a store is made: what its maker may choose, in one place, with defaults and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import msgspec
from msgspec import Meta

from memoir_retrieval.background import chat_contexts
from memoir_retrieval.errors import ConfigError, Reason, StoreError
from memoir_retrieval.model.places import Place
from memoir_retrieval.model.presets import preset_for

if TYPE_CHECKING:
    from memoir_retrieval.model.base import BaseModel
    from memoir_retrieval.store.manifest import Manifest

__all__ = ["Contradiction", "Settings", "Training", "require_made_with", "training_of"]

_UNSET: Any = None  # so that a field has the type of what may be given, and mypy takes a resolved one as it is


class Training(msgspec.Struct, frozen=True):
    """How edits are trained. Raises ConfigError for a value out of its range.

    An edit is trained on the bare prompt, after some contexts and on prompts with random words in them, a stand-in for
    rephrasings. What the edit requires (see `edits.requires`) stands in all of them.

    >>> from memoir_retrieval import Training
    >>> training = Training(variants=16)
    >>> training.variants, training.contexts
    (16, 1)

    contexts: after so many contexts a prompt is trained too: in chats after those of the library, which has 8, else
        after any number that the model writes.
    context_masks: after so many of them a question has a mask of its own, which finds the edit in chats that have
        begun; none for raw prompts and under the span rule "all", where what is pooled is not the question alone.
    variants: so many prompts with random words are made up; one less where `json_strings` is 1.
    json_strings: 1 trains the answers of chats in a JSON object too, where a grammar forbids the token that ends them.
    other_questions: so many made-up other questions about an edit's subject, in chats, are little changed where they
        match; 0 to 4. A few rephrasings fewer are then answered exactly.
    noise: how likely each token of the question is replaced in them.
    max_steps: training ends after so many gradient steps.
    stop_loss: training ends below this mean loss, in nats per target token.
    ridge: what a direction costs that no earlier edit uses; small values keep earlier edits more exactly.
    edits_per_memory: a new residual memory is opened after so many; 0 leaves it to the editor.
    """

    contexts: Annotated[int, Meta(ge=0)] = 1
    context_masks: Annotated[int, Meta(ge=0)] = 1
    variants: Annotated[int, Meta(ge=0)] = 2
    json_strings: Annotated[int, Meta(ge=0, le=1)] = 0
    other_questions: Annotated[int, Meta(ge=0, le=4)] = 0
    noise: Annotated[float, Meta(ge=0, le=1)] = 0.25
    max_steps: Annotated[int, Meta(ge=0)] = 60
    stop_loss: Annotated[float, Meta(gt=0, le=100)] = 0.02
    ridge: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    edits_per_memory: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Training, include_extras=True).items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError:
                raise ConfigError(f"training {name}={value!s:.40} is out of range: choose {_range(kind)}") from None


def _range(kind: Any) -> str:
    (meta,) = kind.__metadata__
    number = "a whole number" if kind.__origin__ is int else "a number"
    if meta.le is None:
        return f"{number} of {meta.ge} or more"
    least = f"above {meta.gt}, at most" if meta.ge is None else f"from {meta.ge:g} to"
    return f"{number} {least} {meta.le:g}"


_LAST_SEED = (1 << 64) - 1


# What stores were made without before there was a choice.
_LATER: dict[str, float | int | str] = {"context_masks": 0, "json_strings": 0, "other_questions": 0}


def training_of(manifest: Manifest) -> Training:
    """How the edits of a store are trained.

    manifest: the store's.

    Raises StoreError where it names what cannot be.
    """
    try:
        return msgspec.convert(_LATER | manifest.training, Training)
    except msgspec.ValidationError as error:
        raise StoreError(
            f"a store of {manifest.model} has training settings out of range ({error}): restore it from a backup, or "
            "train its edits into a new store"
        ) from None


class Contradiction(NamedTuple):
    """A setting that a store cannot take any more.

    name: of the field of `Settings`, or of `Training` behind "training.".
    stored: what the store was made with.
    other: what is asked for now.
    """

    name: str
    stored: Any
    other: Any


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a store is made with and keeps. None: not given; `resolved` and `of` leave none.

    layer: the block that is edited.
    place: the projection in it, the FFN's or attention's.
    dtype: of the model's weights, such as "float32".
    chat: whether a plain prompt is asked through the chat template.
    rule: which tokens are pooled, the question's or all.
    k: ones in every mask.
    tau: least overlap that matches, 0 < tau <= 1. One that is given stays; else the store sets it with every change.
    seed: of the permutation and of training.
    training: fields of `Training`, those that are given.
    """

    layer: int = _UNSET
    place: Place = _UNSET
    dtype: str = _UNSET
    chat: bool = _UNSET
    rule: Literal["question", "all"] = _UNSET
    k: int = _UNSET
    tau: float = _UNSET
    seed: int = _UNSET
    training: dict[str, float | int | str] = msgspec.field(default_factory=dict)

    @classmethod
    def from_options(cls, *, training: Training | Mapping[str, Any] | None = None, **options: Any) -> Settings:
        """The settings of a caller, of which each may be None.

        training: all of it, or some fields by name.
        options: the other fields.
        Raises ConfigError for a field of training that does not exist or is out of its range, and such a seed.
        """
        seed = options.get("seed")
        if seed is not None and not (isinstance(seed, int) and 0 <= seed <= _LAST_SEED):
            raise ConfigError(f"seed is {seed!s:.40}: choose a whole number from 0 to {_LAST_SEED}")
        fields = msgspec.structs.asdict(training) if isinstance(training, Training) else dict(training or {})
        for name in fields:
            if name not in Training.__struct_fields__:
                known = ", ".join(Training.__struct_fields__)
                raise ConfigError(f"training {name}={fields[name]}: no setting has that name; choose one of {known}")
        Training(**fields)
        return cls(training=fields, **options)

    @classmethod
    def of(cls, manifest: Manifest) -> Settings:
        """What a store was made with.

        manifest: the store's.
        """
        fields = {name: getattr(manifest, name) for name in cls.__struct_fields__ if hasattr(manifest, name)}
        fields["training"] = _LATER | manifest.training
        return cls(**fields, rule=manifest.span.rule)

    def resolved(self, base: BaseModel) -> Settings:
        """These settings, with the preset of a model or a default for each that is None.

        base: the model that is edited.

        Raises ConfigError for settings that cannot work on the model.
        """
        preset = preset_for(base.model.config).at(base.place, base.d)
        chat = True if self.chat is None else self.chat
        rule = self.rule or "question"
        usual = preset.tau_chat if chat else preset.tau
        k = preset.k if self.k is None else self.k
        tau = usual if self.tau is None else self.tau
        if not 0 < k <= base.d:
            raise ConfigError(f"k is {k}, but {base.module} has D={base.d} inputs: choose 0 < k <= {base.d}")
        if not 0 < tau <= 1:
            raise ConfigError(f"tau is {tau}: choose 0 < tau <= 1, such as the preset's {usual}")
        if base.d % 8:
            raise ConfigError(
                f"{base.module} has D={base.d} inputs, which is not a multiple of 8: masks cannot be packed"
            )
        if chat and not getattr(base.tokenizer, "chat_template", None):
            raise ConfigError(
                f"{base.name} has no chat template", cure="ask raw prompts (chat=False)", reason=Reason.NO_TEMPLATE
            )
        fields: dict[str, Any] = dict(self.training)
        training = Training(**fields)
        most = len(chat_contexts())
        if chat and training.contexts > most:
            raise ConfigError(
                f"training contexts={training.contexts}, but the library has {most} contexts for chats: "
                f"choose 0 to {most}"
            )
        masks = min(training.context_masks, training.contexts) if chat and rule == "question" else 0
        # Elsewhere the residual acts on the subject's own tokens, of which an edit is made.
        others = training.other_questions if chat and rule == "question" else 0
        return Settings(
            layer=base.layer,
            place=base.place,
            dtype=base.dtype,
            chat=chat,
            rule=rule,
            k=k,
            tau=tau,
            seed=self.seed or 0,
            training=msgspec.structs.asdict(training)
            | {"context_masks": masks, "json_strings": training.json_strings if chat else 0, "other_questions": others},
        )

    def contradiction(self, other: Settings) -> Contradiction | None:
        """The first setting that differs from these, which are a store's; None where none does.

        other: what is wanted; None there asks for nothing.
        """
        for name in self.__struct_fields__:
            stored, wanted = getattr(self, name), getattr(other, name)
            if name != "training" and wanted is not None and stored != wanted:
                return Contradiction(name, stored, wanted)
        for name, wanted in other.training.items():
            stored = self.training.get(name, wanted)
            if name in ("context_masks", "other_questions") and not (self.chat and self.rule == "question"):
                wanted = 0  # as `resolved` has it
            if name == "json_strings" and not self.chat:
                wanted = 0
            if stored != wanted:
                return Contradiction(f"training.{name}", stored, wanted)
        return None

    def require(self, other: Settings, store: str | Path) -> None:
        """Raise ConfigError, with the `Contradiction` as `about`, where a store of these settings has not the others.

        other: what is wanted; None there asks for nothing.
        store: its folder, for the message.
        """
        if differs := self.contradiction(other):
            raise _contradicted(differs, store)


def require_made_with(manifest: Manifest, other: Settings, store: str | Path) -> None:
    """Raise ConfigError where a store has not these settings, or sets its own tau and one is given.

    manifest: the store's.
    other, store: see `Settings.require`.
    """
    if manifest.threshold is None or other.tau is None:
        Settings.of(manifest).require(other, store)
        return
    Settings.of(manifest).require(msgspec.structs.replace(other, tau=_UNSET), store)
    raise _contradicted(Contradiction("tau", f"{manifest.tau:g} (which it sets itself)", other.tau), store)


def _contradicted(differs: Contradiction, store: str | Path) -> ConfigError:
    section, _, field = differs.name.rpartition(".")
    setting = f"{section} {field}=" if section else f"{field} "
    cure = "choose a new folder"
    if differs.name == "tau":  # the one setting that a store can be given later
        cure = f"fix it with `memoir calibrate {store} --tau {differs.other} --write`"
    return ConfigError(
        f"store {store} was made with {setting}{differs.stored}, not {differs.other}",
        cure=f"leave that setting out, or {cure}",
        reason=Reason.SETTINGS,
        about=differs,
    )
