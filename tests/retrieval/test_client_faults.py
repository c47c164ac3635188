"""What stands between a client and a server: proxies, balancers, a Hub that wants a login; and places that are none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from http_stand_in import JsonHandler, StandIn, running
from huggingface_hub.errors import GatedRepoError

from memoir_retrieval import AdminClient, MemoirError
from memoir_retrieval.cli.common import require_place
from memoir_retrieval.client import verify
from memoir_retrieval.client.server import Reply, Server, past_proxies
from memoir_retrieval.client.soak import _after_warm_up, _flat
from memoir_retrieval.client.traffic import SoakClient
from memoir_retrieval.errors import AdminError, ConfigError, ModelError
from memoir_retrieval.model.base import resolve

PAGE = b"<html>\n<body>hello world</body>\n</html>"
JOB = {"id": "j1", "kind": "add", "by": "ann", "created": "2026-01-01T00:00:00Z"}


class Served(JsonHandler):
    """A server of which `bad` polls fail as a balancer has it."""

    bad = 0

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply({"data": [{"id": "small"}]})
        elif self.path == "/metrics":
            self.send(PAGE, 200, {})
        elif type(self).bad:
            type(self).bad -= 1
            self.send(PAGE, 502, {})
        else:
            self.reply(JOB | {"state": "done", "finished": "2026-01-01T00:00:01Z", "edit": 0, "generation": 2})


class Proxy(JsonHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send(PAGE, 503, {})

    do_POST = do_GET


@pytest.fixture
def served() -> Iterator[StandIn]:
    with running(StandIn(Served)) as server:
        yield server


def test_a_server_of_this_machine_is_asked_past_the_proxies(served: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(StandIn(Proxy)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        assert Server(served.url).model == "small"
        assert asyncio.run(change_of(served.url)).state == "done"
        with pytest.raises(MemoirError, match="503"):
            asyncio.run(change_of("http://elsewhere.test:8000"))
        assert len(Proxy.asked) == 1 and "elsewhere.test" in Proxy.asked[0]


async def change_of(url: str) -> Any:
    async with AdminClient(url, "a-token") as client:
        return await client.change("j1")


@pytest.mark.parametrize(
    ("url", "mounts"),
    [
        ("http://127.0.0.1:8000", {"all://127.0.0.1": None}),
        ("http://localhost", {"all://localhost": None}),
        ("https://[::1]:8000", {"all://[::1]": None}),
        ("http://127.example.com", {}),
        ("http://10.0.0.1:8000", {}),
    ],
)
def test_other_machines_are_asked_through_them(url: str, mounts: dict[str, None]) -> None:
    assert past_proxies(url) == mounts


def test_one_failed_poll_ends_no_waiting(served: StandIn) -> None:
    async def wait(patience: float) -> Any:
        async with AdminClient(served.url, "a-token") as client:
            running_change = (await client.change("j1")).__class__(**JOB, state="running")
            Served.bad = 2
            return await client.wait(running_change, patience=patience)

    assert asyncio.run(wait(60)).generation == 2
    with pytest.raises(AdminError, match=r"change j1 was running when it was last seen: .* with 502"):
        asyncio.run(wait(0.05))
    Served.bad = 0


def test_a_page_in_place_of_metrics_is_none(served: StandIn) -> None:
    async def metrics() -> dict[str, float]:
        return await SoakClient(served.url, tokens=1, clients=1, near=0.1).metrics()

    assert asyncio.run(metrics()) == {}


def test_a_size_that_was_measured_twice_is_not_called_flat() -> None:
    (check,) = _flat({})
    assert check.state == "skip" and "fewer than 3 rounds" in check.detail
    (check,) = _flat({"process_resident_memory_bytes": _after_warm_up([1, 9, 9])})
    assert check.state == "ok"


def test_what_cannot_be_told_from_noise_is_not_called_right() -> None:
    class Noisy:
        def probe_together(self, asked: list[tuple[str, bool]], tokens: int) -> list[Reply]:
            return [Reply((1,), (-1.0,), "a", None) for _ in asked]

    def check(base: float) -> verify.Check:
        plain = {name: Reply((1,), (-1.0 - base,), "a", None) for name in "ab"}
        return verify._batchmates(Noisy(), ["a"], ["b"], plain, 1)  # type: ignore[arg-type]

    assert check(0.0).state == "ok" and check(1.0).state == "skip"


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """A rename would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError, match=f"the report cannot be written: .*{name} is no regular file; choose"):
            require_place(tmp_path / name, "the report", "--out")
    (tmp_path / "file").touch()
    require_place(tmp_path / "file", "the report", "--out")


def test_a_gated_model_is_called_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **how: Any) -> str:
        asked.append(how)
        if name == "who/gated":
            raise GatedRepoError.__new__(GatedRepoError)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"'who/gated' is gated on the Hub: accept its terms .* `hf auth login`"):
        resolve("who/gated")
    assert resolve("who/open") == tmp_path and "original/*" in asked[-1]["ignore_patterns"]
