"""The routes below /memoir, as an application of their own with its own schema at /memoir/openapi.json."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from importlib.resources import files
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from memoir_retrieval.edits.formats import show
from memoir_retrieval.edits.record import StoredEdit
from memoir_retrieval.errors import MemoirError
from memoir_retrieval.question.prompts import not_utf8
from memoir_retrieval.store.manifest import library_version
from memoir_vllm.admin.guard import Guard
from memoir_vllm.admin.jobs import QueueFull
from memoir_vllm.admin.schema import (
    AddEdit,
    AuditPage,
    Detail,
    EditList,
    Job,
    JobPage,
    LookupMessages,
    LookupPrompt,
    LookupResult,
    Reloaded,
    Stats,
    StoredEditOut,
)
from memoir_vllm.admin.service import Conflict, Missing, Refused, Service
from memoir_vllm.admin.tokens import Tokens

__all__ = ["make_app"]

_CONSOLE = {"/": ("index.html", "text/html"), "/console.js": ("console.js", "text/javascript"),
            "/console.css": ("console.css", "text/css")}  # fmt: skip

EditId = Annotated[int, Path(ge=0, lt=1 << 63, description="Id of an edit.")]
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="Id of a job.")]
Offset = Annotated[int, Query(ge=0, lt=1 << 31)]
Limit = Annotated[int, Query(ge=1, le=200)]
Search = Annotated[str, Query(max_length=256, description="Words that an edit must all contain.")]


class _PlainRequest(Request):
    """A request whose body has one meaning: Python's parser takes the last of two equal keys, as if all was well.

    It takes half a surrogate pair too, which no file and no tokenizer does.
    """

    async def json(self) -> Any:
        body = json.loads(await self.body(), object_pairs_hook=_unique)
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            near = error.object[max(0, error.start - 20) : error.start + 20]
            raise HTTPException(400, f"the body cannot be used: {not_utf8(near)}") from None
        return body


class _PlainRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def run(request: Request) -> Response:
            return await handle(_PlainRequest(request.scope, request.receive))

        return run


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise HTTPException(400, f"key {show(key)} is given twice; keep one")
        values[key] = value
    return values


def make_app(tokens: Tokens, service: Callable[[], Service], schema: bool) -> FastAPI:
    """The routes below /memoir.

    tokens: which are known.
    service: gives the service once the engine runs.
    schema: whether /openapi.json is served.
    """
    public = [*_CONSOLE, *(["/openapi.json"] if schema else [])]
    app = FastAPI(
        title="memoir administration",
        version=library_version(),
        openapi_url="/openapi.json" if schema else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_said(401, 413, 429),
        dependencies=[Depends(HTTPBearer(auto_error=False))],  # for the schema: the guard has checked it by then
    )
    app.router.route_class = _PlainRoute
    app.add_middleware(Guard, tokens=tokens, public=public)
    _add_errors(app)
    _add_console(app)
    _add_reads(app, service)
    _add_changes(app, service)
    return app


def _said(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Detail} for status in statuses}


def _add_errors(app: FastAPI) -> None:
    statuses: dict[type[Exception], int] = {Missing: 404, Conflict: 409, Refused: 400, QueueFull: 429}

    @app.exception_handler(MemoirError)
    async def known(request: Request, error: MemoirError) -> JSONResponse:
        later = {"retry-after": "10"} if isinstance(error, QueueFull) else None
        return JSONResponse({"detail": str(error)}, statuses.get(type(error), 503), later)

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"detail": f"the store's folder cannot be used: {error.strerror}"}, 503)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        """FastAPI's own answer repeats the input, which may be no text at all."""
        faults = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
        return JSONResponse({"detail": faults}, 422)


def _add_console(app: FastAPI) -> None:
    folder = files("memoir_vllm.admin") / "console"

    def serve(name: str, kind: str) -> Callable[[], Response]:
        content = (folder / name).read_bytes()
        return lambda: Response(content, media_type=f"{kind}; charset=utf-8")

    for path, (name, kind) in _CONSOLE.items():
        app.add_api_route(path, serve(name, kind), include_in_schema=False)


def _add_reads(app: FastAPI, service: Callable[[], Service]) -> None:
    @app.get("/edits", summary="Edits of the store", response_model=EditList, responses=_said(503))
    async def list_edits(search: Search = "", offset: Offset = 0, limit: Limit = 50) -> Response:
        def read() -> EditList:
            generation, total, page = service().search(search, offset, limit)
            return EditList(generation=generation, total=total, edits=[_out(edit) for edit in page])

        return await _page(read)

    @app.get("/edits/{edit_id}", summary="One edit", responses=_said(404, 503))
    async def get_edit(edit_id: EditId) -> StoredEditOut:
        return _out(await asyncio.to_thread(service().edit, edit_id))

    @app.get("/jobs", summary="Changes since the server started", response_model=JobPage)
    async def list_jobs() -> Response:
        jobs = [job.model_copy() for job in service().jobs.all()]  # their worker goes on with them meanwhile
        return await _page(lambda: JobPage(jobs=jobs))

    @app.get("/jobs/{job_id}", summary="Progress of one change", responses=_said(404))
    async def get_job(job_id: JobId) -> Job:
        job = service().jobs.get(job_id)
        if job is None:
            raise HTTPException(404, f"there is no job {job_id}; the audit log keeps what became of older ones")
        return job

    @app.get("/audit", summary="Who changed what", response_model=AuditPage, responses=_said(503))
    async def read_audit(offset: Offset = 0, limit: Limit = 50) -> Response:
        def read() -> AuditPage:
            page = service().audit.page(offset, limit)
            return AuditPage(total=page.total, torn=page.torn, entries=page.lines)

        return await _page(read)

    @app.get("/stats", summary="Counters", responses=_said(503))
    async def stats() -> Stats:
        return await service().stats()

    @app.post("/lookup", summary="The edits nearest to a prompt", responses=_said(400, 503))
    async def lookup(prompt: LookupPrompt | LookupMessages) -> LookupResult:
        return await service().lookup(prompt)


def _add_changes(app: FastAPI, service: Callable[[], Service]) -> None:
    @app.post(
        "/edits",
        summary="Add an edit",
        status_code=202,
        response_model=Job,
        responses=_said(400, 409, 503)
        | {200: {"model": StoredEditOut, "description": "The store already has this edit."}},
    )
    async def add_edit(edit: AddEdit, request: Request) -> Any:
        answer = await service().add(request.scope["memoir_holder"], edit)
        if isinstance(answer, StoredEdit):
            return JSONResponse(_out(answer).model_dump())
        return answer

    @app.delete("/edits/{edit_id}", summary="Remove an edit", status_code=202, responses=_said(404, 409, 503))
    async def remove_edit(edit_id: EditId, request: Request) -> Job:
        return await service().remove(request.scope["memoir_holder"], edit_id)

    @app.post("/reload", summary="Serve the store's newest generation", responses=_said(503))
    async def reload(request: Request) -> Reloaded:
        return Reloaded(generation=await service().reload(request.scope["memoir_holder"]))


async def _page(read: Callable[[], BaseModel]) -> Response:
    """What may be megabytes is read and written as JSON beside the event loop."""
    content = await asyncio.to_thread(lambda: read().model_dump_json())
    return Response(content, media_type="application/json")


def _out(edit: StoredEdit) -> StoredEditOut:
    lists = {name: list(getattr(edit, name)) for name in ("rephrases", "before", "requires")}
    return StoredEditOut.model_validate(msgspec.structs.asdict(edit) | lists)
