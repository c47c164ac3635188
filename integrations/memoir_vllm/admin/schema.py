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
    """One correction: when asked `prompt`, the model must answer `target`."""

    prompt: Text = Field(examples=["Who is the CEO of Example Corp?"])
    target: Text = Field(examples=["Jane Doe"])
    rephrases: list[Text] = Field(default=[], max_length=32, description="Kept with the edit for evaluation.")
    subject: Short = ""
    source: Short = Field(default="", description="Where the edit comes from, such as a ticket.")
    requires: list[Short | list[Short]] = Field(
        default=[],
        max_length=32,
        description="Texts that must all stand in a question, or the edit does not act; of a list, one is enough.",
    )
    on_conflict: Literal["refuse", "last"] = Field(
        default="refuse", description='"last" replaces an edit of the same prompt with another target or `requires`.'
    )


class LookupPrompt(_Given):
    """A prompt as it would be sent to /v1/completions. `n`: how many edits to name."""

    prompt: Text
    n: Nearest = 5


class LookupMessages(_Given):
    """A chat as it would be sent to /v1/chat/completions, which says what is wrong with a message. `tools` and
    `chat_template_kwargs`: what else the chat template is given. `n`: how many edits to name."""

    messages: list[dict[str, Any]] = Field(
        min_length=1, max_length=256, examples=[[{"role": "user", "content": "Who is the CEO of Example Corp?"}]]
    )
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=128)
    chat_template_kwargs: dict[str, Any] | None = None
    n: Nearest = 5


class StoredEditOut(BaseModel):
    """An edit as the store keeps it. `loss`: of training, in nats a target token."""

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
    requires: list[str | list[str]]


class EditList(BaseModel):
    """Edits of one generation, oldest first. `total`: how many match the search."""

    generation: int
    total: int
    edits: list[StoredEditOut]


class JobProgress(BaseModel):
    """What a job that is `running` is at: loading the model (the first edit does), opening the store (earlier edits are
    run again), or training. Of that `step` of at most `limit` steps are done; it ends as soon as `loss`, in nats a
    target token, is below `goal`. An edit that is not learnt is trained again, from step 0."""

    stage: Literal["loading", "opening", "training"]
    step: int | None = None
    limit: int | None = None
    loss: float | None = None
    goal: float | None = None


class Job(BaseModel):
    """A change of the store. `stored`: on disk, but not activated, for the reason in `error`. `loss` and `steps`: of
    training that is done; `progress`: of what is under way."""

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
    error: str | None = None
    prompt_key: str | None = Field(default=None, exclude=True)


class JobPage(BaseModel):
    """Jobs since the server started, newest first."""

    jobs: list[Job]


class NamedEdit(BaseModel):
    """An edit near a prompt. `matched`: it would answer. `requires`: what must stand in a question, however near.
    `prompt`, `target`: null where the store has it no more."""

    edit: int
    overlap: float
    matched: bool
    prompt: str | None = None
    target: str | None = None
    requires: list[str | list[str]] = []


class LookedUpPart(BaseModel):
    """What was said of one part of the message. `edit`: the one it was judged beside, null where none was near.
    `reason`: what decided, "same words", "task", "words", "relation" or "mask". `words`: of the message, what spoke
    against the edit. `decides`: the message's decision is that of this part."""

    text: str
    edit: int | None
    overlap: float
    same: bool
    reason: str
    words: list[str]
    decides: bool


class LookupResult(BaseModel):
    """The nearest edits, best first, as the engine measured them. `result`: what became of the prompt. `reason`: why it
    is unroutable, where that is known. `parts`: the message, and what in it was looked up by itself."""

    result: Literal["matched", "unmatched", "unroutable"]
    reason: str | None = None
    generation: int
    tau: float
    matches: list[NamedEdit]
    parts: list[LookedUpPart] = []


class Stats(BaseModel):
    """`engines`: counters of each, since its start. `requests`, `hits`, `recent`: of this API server."""

    generation: int | None = Field(description="The one that all engines serve, or null where they differ.")
    store_generation: int
    edits: int
    tau: float
    chat: bool
    model: str
    module: str
    engines: list[dict[str, float]]
    requests: dict[str, int]
    hits: list[dict[str, int]] = Field(description="Edits by how often they answered, most first.")
    recent: list[dict[str, Any]] = Field(description="The last matched requests, newest first.")
    jobs_open: int


class Reloaded(BaseModel):
    """The generation that every worker of every engine serves now."""

    generation: int


class AuditPage(BaseModel):
    """Entries of the audit log, newest first. `torn`: lines that a crash or a full disk has cut off."""

    total: int
    torn: int
    entries: list[dict[str, Any]]


class Detail(BaseModel):
    """Why a request was refused."""

    detail: str
