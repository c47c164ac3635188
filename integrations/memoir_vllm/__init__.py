"""The vLLM plugin: serves a store's edits from any vLLM server.

Configured by `--additional-config '{"memoir": {"store": DIR}}'` and nothing else. Without that section one function
is wrapped, `EngineArgs.create_engine_config`, which then calls through; with it, everything else is handed to vLLM
through its own configuration: the worker class, the scheduler class, the splitting ops. The scheduler wraps one more
function, which hashes KV blocks. The map of the modules, by the process in which each runs, is in CONTRIBUTING.md.
"""

__all__ = ["register"]


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process, possibly more than once."""
    from memoir_vllm.front.engine import install

    install()
