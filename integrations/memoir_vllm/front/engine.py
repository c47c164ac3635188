"""The hook on `EngineArgs.create_engine_config` (vllm/engine/arg_utils.py), where flags become a VllmConfig.

vLLM calls it in the front end of every engine (`LLM`, `AsyncLLM`, each API server), before any process of the
engine starts: the place where a wrong flag or a bad store can still stop the engine with a readable message. The
engine core and the workers get the finished VllmConfig and need no patch.

This module is imported wherever the plugin is registered, so it imports nothing heavy of ours before a section is seen.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memoir_vllm.patches import wrap_once

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

__all__ = ["install"]


def install() -> None:
    """Wrap `EngineArgs.create_engine_config` once. Without a `memoir` section the wrapper only calls through."""
    from vllm.engine.arg_utils import EngineArgs

    wrap_once(EngineArgs, "create_engine_config", _with_edits)


def _with_edits(original: Any) -> Any:
    from vllm.usage.usage_lib import UsageContext

    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        create = functools.partial(original, self, *args, **kwargs)
        if not isinstance(self.additional_config, dict) or "memoir" not in self.additional_config:
            return create()
        config = _create_with_edits(self, create)
        if UsageContext.OPENAI_API_SERVER in (*args, kwargs.get("usage_context")):
            from memoir_vllm.front import responses

            _require_routes(config.additional_config["memoir"].get("token_file"))
            responses.install()
        return config

    return create_engine_config


def _create_with_edits(args: EngineArgs, create: Callable[[], VllmConfig]) -> VllmConfig:
    """Raises ConfigError for flags that cannot work, StoreError for a store that cannot be served."""
    from memoir_vllm import config, refusals, requests
    from memoir_vllm.front import decisions

    refusals.check_version()
    ours = config.with_mode(config.parse_section(args.additional_config["memoir"]))
    config.prefer(ours, args)
    vllm_config = create()
    refusals.refuse(ours, vllm_config)
    stores = config.open_stores(ours, vllm_config)
    manifests = {name: store.manifest for name, store in stores.items()}
    refusals.warn_of_dtype(ours, vllm_config, manifests)
    config.apply(ours, vllm_config, manifests)
    requests.install()
    decisions.install()
    return vllm_config


def _require_routes(file: str | None) -> None:
    """Raises ConfigError where somebody has set a token, but vLLM will not ask us for routes."""
    from memoir_retrieval.errors import ConfigError
    from memoir_vllm.config import TOKEN_VARIABLE

    if (file is not None or TOKEN_VARIABLE in os.environ) and "VLLM_PLUGINS" not in os.environ:
        raise ConfigError(
            f"an admin token is set ({TOKEN_VARIABLE} or token_file), but vLLM adds only the routes of "
            "plugins that VLLM_PLUGINS names: set VLLM_PLUGINS=memoir (and your other plugins), or use `memoir serve`"
        )
