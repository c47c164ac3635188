"""The vLLM plugin: serves a store's edits from any vLLM server.

Configured by `--additional-config '{"memoir": {"store": DIR}}'` and nothing else. Without that section one function
is wrapped, `EngineArgs.create_engine_config`, which then calls through. With it, vLLM gets the worker class, the
scheduler class and the splitting ops through its own configuration; where it has no slot, functions are wrapped
(`patches.py`, docs/reference/compatibility.md). Folders go by the process in which a file runs:

config.py      our section of the configuration
refusals.py    what of vLLM's we refuse
requests.py    `InputProcessor.process_inputs`: options of one request, checked where a client can be answered
front/         the API server: `EngineArgs.create_engine_config`, the decision in streams and metrics
core/          the engine core: scheduling, the prefix cache, reloads
worker/        a worker: the edited layer, lookups, residual; GPU and CPU
admin/         `vllm.endpoint_plugins`: administration, in the API server
bench/         `memoir bench`; no part of a server
"""

__all__ = ["register"]


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process, possibly more than once."""
    from memoir_vllm.front.engine import install

    install()
