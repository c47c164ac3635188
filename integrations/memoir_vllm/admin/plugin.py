"""Entry point `vllm.endpoint_plugins`, named `memoir` as the general plugin is, so VLLM_PLUGINS names both at once."""

from __future__ import annotations

import asyncio
import functools
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from memoir_retrieval.errors import ConfigError, StoreError
from memoir_retrieval.model.adapter import split_adapter
from memoir_retrieval.model.base import resolve
from memoir_retrieval.store.manifest import read_manifest

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient

    from memoir_vllm.admin.service import Service
    from memoir_vllm.config import MemoirConfig

__all__ = ["MemoirEndpoints"]

logger = init_logger("vllm.memoir")

# Seconds between two questions to the engines for what /metrics shows of them.
POLL_S = 5.0


class MemoirEndpoints:
    """Engine series on /metrics for every server with a `memoir` section; routes below /memoir where a token is set."""

    name = "memoir"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._ours: MemoirConfig | None = None
        self._admin = False
        self._services: dict[str, Service] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def attach_router(self, app: FastAPI) -> None:
        """Mount the routes.

        app: the server's.

        Raises ConfigError for a bad token, for a server that cannot be administrated, and for a chat template under
        which no edit would act.
        """
        args = app.state.args
        section = (getattr(args, "additional_config", None) or {}).get("memoir")
        if section is None:
            return
        from vllm.renderers.chat_utils import load_chat_template

        from memoir_vllm import config
        from memoir_vllm.admin.routes import make_app
        from memoir_vllm.admin.tokens import Tokens

        self._ours = config.parse_section(section)
        config.require_template(self._ours, args.model, load_chat_template(args.chat_template))
        tokens = Tokens.read(self._ours.token_file)
        if not tokens:
            logger.info(
                "memoir: administration is off; set %s or token_file to serve it at /memoir/", config.TOKEN_VARIABLE
            )
            return
        if (getattr(args, "api_server_count", None) or 1) > 1:
            raise ConfigError(
                f"memoir administration needs one API server, not {args.api_server_count}, because each knows its own "
                "jobs only: use "
                f"--api-server-count 1, or unset {config.TOKEN_VARIABLE} and token_file"
            )
        schema = not args.disable_fastapi_docs
        for name in reversed(self._ours.folders):  # the default one last: its path begins the others'
            app.mount(_path(name), make_app(tokens, functools.partial(self._running, name), schema=schema))
        self._admin = True

    async def init_state(self, engine_client: EngineClient | None, state: Any, args: Namespace) -> None:
        """Begin to poll the engines, and with administration to run its jobs.

        engine_client: vLLM's; None in a server that has no engine.
        state: of the application, which holds vLLM's own handlers.
        args: the server's.
        """
        if self._ours is None or engine_client is None:
            return
        from prometheus_client import REGISTRY

        from memoir_vllm.admin.engines import Engines
        from memoir_vllm.front.metrics import TRAFFIC, EngineCollector

        collector = EngineCollector(TRAFFIC)
        REGISTRY.register(collector)
        self._tasks.append(asyncio.create_task(_poll(Engines(engine_client), collector)))
        if not self._admin:
            return
        if engine_client.vllm_config.parallel_config.local_engines_only:
            logger.warning(
                "memoir: an external or hybrid load balancer stands before several servers, and this one reaches its "
                "own engines only: after a change made here, send POST /memoir/reload to each of the others"
            )
        import socket

        from memoir_vllm.admin.audit import server_name
        from memoir_vllm.admin.service import Service

        server = server_name(socket.gethostname(), args.port)
        model = str(resolve(engine_client.model_config.model))
        for name, folder in self._ours.folders.items():
            _, adapter = split_adapter(read_manifest(Path(folder)).model)
            adapted = model if adapter is None else f"{model}+{adapter}"
            service = Service(self._ours, adapted, server, Engines(engine_client, name), state, name)
            self._services[name] = service
            try:
                await asyncio.to_thread(service.close_unfinished)
            except (OSError, StoreError) as error:
                logger.warning("memoir: the audit log cannot be written, changes will be refused: %s", error)
            self._tasks.append(asyncio.create_task(service.jobs.run()))
            logger.info("memoir: administration at %s/, audit log in %s", _path(name), service.folder)

    def _running(self, name: str) -> Service:
        service = self._services.get(name)
        assert service is not None, "vLLM serves no route before init_state"
        return service


def _path(name: str) -> str:
    """Where a store is administrated."""
    return f"/memoir/stores/{name}" if name else "/memoir"


async def _poll(engines: Any, collector: Any) -> None:
    while True:
        try:
            collector.engines = await engines.counters()
        except Exception as error:  # a dead engine stops the server itself; until then /metrics shows what was last
            logger.debug("memoir: no counters from the engines: %s", error)
        await asyncio.sleep(POLL_S)
