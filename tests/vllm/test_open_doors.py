"""Every way into a server with edits, and everything it reveals, has its row in docs/explanation/security-model.md; and
no row is about something that is gone."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from memoir_retrieval.errors import ConfigError
from memoir_retrieval.lookup.decision import Decision
from memoir_retrieval.store.manifest import KINDS, MANIFEST
from memoir_vllm.admin import guard
from memoir_vllm.admin.audit import AUDIT
from memoir_vllm.admin.routes import make_app
from memoir_vllm.admin.tokens import Tokens
from memoir_vllm.front import metrics
from memoir_vllm.requests import parse_options
from memoir_vllm.worker.mixin import MemoirWorker

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/security-model.md").read_text().split("## Open doors")[1]
TOKEN = "0123456789abcdef"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}


def rows(section: str) -> dict[str, str]:
    """What stands in backticks in the first column of a section's table, and the second column beside it."""
    (text,) = re.findall(rf"^### {re.escape(section)}\n(.*?)(?=^### |\Z)", PAGE, re.S | re.M)
    doors: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            first, second = line.split(" | ")[:2]
            doors |= dict.fromkeys(re.findall(r"`([^`]+)`", first), second)
    return doors


def sources(*folders: str) -> list[str]:
    return [file.read_text() for folder in folders for file in (ROOT / folder).rglob("*.py")]


@pytest.fixture(scope="module")
def app() -> Any:
    return make_app(Tokens({sha256(TOKEN.encode()).digest(): "ann"}), lambda: SimpleNamespace(), schema=True)  # type: ignore[arg-type, return-value]


def test_every_route_has_a_row(app: Any) -> None:
    routes = {
        f"{method} {route.path}"
        for route in app.routes
        for method in route.methods
        if method != "HEAD" or isinstance(route, APIRoute)
    }
    assert routes == rows("Routes below /memoir").keys()


def test_what_the_page_says_everybody_may_read_is_what_needs_no_token(app: Any) -> None:
    client = TestClient(app, raise_server_exceptions=False)
    for route, who in rows("Routes below /memoir").items():
        method, path = route.split(" ")
        path = path.replace("{edit_id}", "1").replace("{job_id}", "0" * 16)
        without = client.request(method, path)
        assert (without.status_code != 401) is who.startswith("everybody"), route
        assert client.request(method, path, headers=KNOWN).status_code != 401, route


def test_every_option_of_a_request_has_a_row() -> None:
    named = rows("Requests to /v1").keys() - {"cache_salt"}
    with pytest.raises(ConfigError) as refused:
        parse_options({"memoir_other": 1}, 1)
    assert named == set(re.findall(r"memoir\w*", str(refused.value).split(": use")[1]))


def test_every_field_of_a_decision_has_a_row() -> None:
    assert rows("Responses of /v1").keys() == {"memoir", "memoir_choices", *Decision.__struct_fields__}
    assert msgspec.to_builtins(Decision(None, 0.0, "off", 1)).keys() <= rows("Responses of /v1").keys()


def test_every_series_has_a_row() -> None:
    registry, collector = CollectorRegistry(), metrics.EngineCollector(metrics.Traffic())
    collector.engines = [{key: 1 for key, *_ in metrics._ENGINE_SERIES}]
    registry.register(collector)
    for series in (metrics._REQUESTS, metrics._OVERLAP):
        registry.register(series)
    named = {f.name + ("_total" if f.type == "counter" else "") for f in registry.collect()}
    assert named == rows("Metrics").keys()


def test_every_file_of_a_store_has_a_row(store_folder: Path) -> None:
    patterns = rows("Files").keys()
    kinds = {f"{kind}-*.{ending}" for kind, ending in KINDS.items()}
    assert patterns == {MANIFEST, AUDIT, ".lock", "added-*.safetensors", *kinds}
    assert all(any(file.match(pattern) for pattern in patterns) for file in store_folder.iterdir())


def test_every_header_has_a_row(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BURST", 1.0)
    client = TestClient(app, raise_server_exceptions=False)
    replies = [client.get("/"), client.get("/jobs"), *(client.get("/jobs/x", headers=KNOWN) for _ in range(3))]
    assert {200, 401, 429} <= {reply.status_code for reply in replies}
    sent = {name for reply in replies for name in reply.headers} - {"content-length", "content-type"}
    read = {name for text in sources("integrations") for name in re.findall(r'headers\.get\("([a-z-]+)"', text)}
    assert len(read) == 2 and sent | read == rows("Headers below /memoir").keys()


def test_every_call_to_a_worker_has_a_row() -> None:
    assert {name for name in vars(MemoirWorker) if name.startswith("memoir_")} == rows("Calls to the workers").keys()


def test_every_variable_has_a_row() -> None:
    named: set[str] = set()
    for text in sources("memoir_retrieval", "integrations", "index"):
        named |= set(re.findall(r"[\"$']?\b(MEMOIR_[A-Z_]+)\b", text))
        named |= set(re.findall(r"environ(?:\.get\(|\[)[\"']([A-Z_]+)[\"']", text))
        named |= set(re.findall(r"[\"']([A-Z_]+)[\"'] (?:not )?in os\.environ", text))
    assert named == rows("Environment").keys()
