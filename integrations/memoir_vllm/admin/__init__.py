"""Administration of a running server: the routes under /memoir, its metrics, its console. In the API process only.

plugin.py    `vllm.endpoint_plugins`: what vLLM calls to add routes
tokens.py    who may call them
guard.py     the door: token, rate, size, headers
routes.py    the routes and their schema
schema.py    what they take and give
service.py   what they do
engines.py   every engine behind this server: counters, reload
jobs.py      changes, one after another
trainer.py   the process that makes them, outside the serving path
audit.py     who changed what
console/     the page at /memoir/
"""
