"""The vLLM plugin: serves a store's edits from any vLLM server.

Configured by `--additional-config '{"memoir": {"store": DIR}}'` and nothing else. Without that section one function
is wrapped, `EngineArgs.create_engine_config`, which then calls through; with it, everything else is handed to vLLM
through its own configuration: the worker class, the scheduler class, the splitting ops. The scheduler wraps one more
function, which hashes KV blocks. One module per seam:

engine.py      `EngineArgs.create_engine_config`: the only patch that is always there
config.py      our section of the configuration, and what of vLLM's we refuse
requests.py    `InputProcessor.process_inputs`: options of one request, checked where a client can be told
scheduler.py   scheduler classes: a question is not split, a decision is remembered and returned with the answer
core.py        the engine core: a new generation reaches workers and scheduler between the same two steps
blocks.py      the prefix cache: what a request may take, publish, and under which hash
worker.py      worker classes (`cpu_worker.py`, `gpu_worker.py`): attach after loading, prove it after warm-up
attach.py      the edited linear layer
runner.py      the model runner instance (V1 and V2): which rows of a step belong to which request
pipeline.py    decisions on their way from the stage that makes them to the last one
op.py          the opaque custom op in the model's graph
product.py     the product with a residual memory
residual.py    what the op does: pool, decide, add the residual
rows.py        which rows of a step an edit acts on
sums.py        sums per KV block, for questions that lie in the prefix cache
reload.py      a new generation of the store in a running worker
routing.py     from pooled activations to decisions
selftest.py    the dummy forward that must reach the op
stream.py      the OpenAI server's streams: the decision in a last chunk
metrics.py     `OutputProcessor.process_outputs`: what the API process sees of decisions
admin/         `vllm.endpoint_plugins`: administration of a running server
bench/         `memoir bench serve`; no part of a server
"""

__all__ = ["register"]


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process, possibly more than once."""
    from memoir_vllm.front.engine import install

    install()
