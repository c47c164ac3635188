"""What the routes take and give. FastAPI makes the OpenAPI schema of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from memoir_vllm.requests import NEAREST

__all__ = [
    "AddEdit",
    "AuditPage",
    "Detail",
    "EditList",
    "Job",
    "JobPage",
    "JobProgress",
    "LookupMessages",
    "LookupPrompt",
    "LookupResult",
    "NamedEdit",
    "Reloaded",
    "Stats",
    "StoredEditOut",
]

Text = Annotated[str, StringConstraints(min_length=1, max_length=16_384, pattern=r"\S")]
Short = Annotated[str, StringConstraints(max_length=1_024)]
# JSON knows one kind of number: 5.0 is an integer there, and strict parsing would refuse it.
Nearest = Annotated[
    int,
    Field(ge=1, le=NEAREST),
    BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n),
]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AddEdit(_Given):
    """One correction: when asked `prompt`, the model must answer `target`.

    prompt: the question, as a user would ask it.
    target: the answer.
    subject: the name in the prompt that the edit is about; "" for none.
    """

    prompt: Text = Field(examples=["Who is the CEO of Example Corp?"])
    target: Text = Field(examples=["Jane Doe"])
    rephrases: list[Text] = Field(default=[], max_length=32, description="Kept with the edit for evaluation.")
    subject: Short = ""
    source: Short = Field(default="", description="Where the edit comes from, such as a ticket.")
    requires: list[Short | list[Short]] = Field(
        default=[],
        max_length=32,
        description="The edit acts only on questions that contain all of these texts; of a list, one is enough.",
    )
    on_conflict: Literal["refuse", "last"] = Field(
        default="refuse", description='"last" replaces an edit of the same prompt with another target or `requires`.'
    )


class LookupPrompt(_Given):
    """A prompt, as it would be sent to /v1/completions.

    prompt: text.
    n: how many of the nearest edits to return.
    """

    prompt: Text
    n: Nearest = 5


class LookupMessages(_Given):
    """A chat, as it would be sent to /v1/chat/completions, and refused for the same reasons.

    messages: in OpenAI's form; the last one must be the user's.
    tools, chat_template_kwargs: passed to the chat template.
    n: how many of the nearest edits to return.
    """

    messages: list[dict[str, Any]] = Field(
        min_length=1, max_length=256, examples=[[{"role": "user", "content": "Who is the CEO of Example Corp?"}]]
    )
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=128)
    chat_template_kwargs: dict[str, Any] | None = None
    n: Nearest = 5


class StoredEditOut(BaseModel):
    """An edit as the store keeps it.

    id: number of the edit, never used for another.
    prompt, target: the question and its answer.
    created: UTC, ISO 8601.
    loss: at the end of training, in nats per target token.
    steps: of training.
    memory: number of the residual memory that holds the edit.
    subject, rephrases, source, requires: as the edit was given.
    before: the messages of a chat before the one that asks the prompt.
    """

    id: int
    prompt: str
    target: str
    created: str
    loss: float
    steps: int
    memory: int
    subject: str
    rephrases: list[str]
    source: str
    before: list[dict[str, Any]]
    requires: list[str | list[str]]


class EditList(BaseModel):
    """Edits of one generation, oldest first.

    generation: of the store.
    total: how many match the search.
    edits: those of this page.
    """

    generation: int
    total: int
    edits: list[StoredEditOut]


class JobProgress(BaseModel):
    """How far a job that is `running` has come. An edit that is not learnt is trained again, from step 0.

    stage: loading the model (for the first edit), opening the store (earlier edits are run again), or training.
    step: steps done; null before training.
    limit: most steps.
    loss: at this step, in nats per target token.
    goal: loss below which training ends.
    """

    stage: Literal["loading", "opening", "training"]
    step: int | None = None
    limit: int | None = None
    loss: float | None = None
    goal: float | None = None


class Job(BaseModel):
    """A change of the store.

    id: of the job.
    kind: what changes.
    state: `stored` means on disk but not served yet, for the reason in `error`.
    progress: while it is `running`, else null.
    by: name of the token that requested it.
    created, finished: UTC, ISO 8601; `finished` is null until then.
    edit: id of the edit that was added or is removed; null until it is known.
    generation: of the store after the change.
    loss, steps: of finished training; `loss` in nats per target token.
    prompt, target: of the edit.
    damaged: ids of earlier edits that training has overwritten and that could not be trained again: the model does not
        answer them with their targets any more.
    error: why it failed, or is not served yet.
    """

    id: str
    kind: Literal["add", "remove"]
    state: Literal["queued", "running", "activating", "done", "stored", "failed"]
    progress: JobProgress | None = None
    by: str
    created: str
    finished: str | None = None
    edit: int | None = None
    generation: int | None = None
    loss: float | None = None
    steps: int | None = None
    prompt: str | None = None
    target: str | None = None
    damaged: list[int] = []
    error: str | None = None
    prompt_key: str | None = Field(default=None, exclude=True)


class JobPage(BaseModel):
    """Jobs since the server started, newest first.

    jobs: in any state.
    """

    jobs: list[Job]


class NamedEdit(BaseModel):
    """An edit near a prompt.

    edit: its id.
    overlap: of the masks, in [0, 1].
    matched: whether it would answer.
    prompt, target: null if the store no longer has it.
    requires: texts that a question must contain, however near it is.
    """

    edit: int
    overlap: float
    matched: bool
    prompt: str | None = None
    target: str | None = None
    requires: list[str | list[str]] = []


class LookedUpPart(BaseModel):
    """How one part of the message was judged.

    text: of the part.
    edit: the edit that it was compared with; null if none was near.
    overlap: of their masks, in [0, 1].
    same: whether it asks that edit's question.
    reason: what decided: "same words", "task", "words", "relation" or "mask".
    words: words of the message that spoke against the edit.
    decides: whether the message's decision is that of this part.
    """

    text: str
    edit: int | None
    overlap: float
    same: bool
    reason: str
    words: list[str]
    decides: bool


class LookupResult(BaseModel):
    """The engine's decision on a prompt.

    result: whether an edit would answer, or none, or none because of an image, or there is no question to look up.
    reason: why the prompt is unroutable, if that is known.
    generation: of the store, as the engine serves it.
    tau: least overlap of a match.
    matches: the nearest edits, best first.
    parts: the message, and the parts of it that were looked up by themselves.
    """

    result: Literal["matched", "unmatched", "image", "unroutable"]
    reason: str | None = None
    generation: int
    tau: float
    matches: list[NamedEdit]
    parts: list[LookedUpPart] = []


class Stats(BaseModel):
    """What is served, and what has been requested.

    store_generation: the newest generation on disk.
    edits: how many the store holds.
    tau: least overlap of a match.
    chat: whether edits were made in chats.
    model: the name of the model to ask on this server, so that this store answers.
    store: the name of the store, for `memoir_store` of a request; "" for the default one, and where the model asks it.
    module: the projection that is edited.
    engines: counters of each engine since its start.
    requests: finished requests of this API server, by result.
    jobs_open: changes of the store that wait or run.
    """

    generation: int | None = Field(description="The generation that all engines serve; null if they differ.")
    store_generation: int
    edits: int
    tau: float
    chat: bool
    model: str
    store: str
    module: str
    engines: list[dict[str, float]]
    requests: dict[str, int]
    hits: list[dict[str, int]] = Field(description="Edits and how often they answered, the most frequent first.")
    recent: list[dict[str, Any]] = Field(description="The last matched requests, newest first.")
    jobs_open: int


class Reloaded(BaseModel):
    """The generation that every worker of every engine serves now.

    generation: a number that grows with every change.
    """

    generation: int


class AuditPage(BaseModel):
    """Entries of the audit log, newest first.

    total: how many there are.
    torn: how many lines a crash or a full disk has cut off.
    entries: those of this page, as they were written.
    """

    total: int
    torn: int
    entries: list[dict[str, Any]]


class Detail(BaseModel):
    """Why a request was refused.

    detail: one line: what was wrong, and what to do instead.
    """

    detail: str
