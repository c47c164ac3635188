"""`memoir bench`: how fast edits are trained, looked up and served here, and how good they are."""

from __future__ import annotations

import click

from memoir_retrieval.cli.bench.edit import bench_edit
from memoir_retrieval.cli.bench.index import bench_index
from memoir_retrieval.cli.bench.latency import bench_latency
from memoir_retrieval.cli.bench.methods import bench_methods
from memoir_retrieval.cli.bench.quality import bench_quality
from memoir_retrieval.cli.bench.routing import bench_routing
from memoir_retrieval.cli.bench.serve import bench_serve

__all__ = ["bench"]


@click.group()
def bench() -> None:
    """Measure speed on this machine, or the quality of edits.

    \b
    Example:
      memoir bench serve edits --json
      memoir bench latency edits --plot latency.html
      memoir bench quality zsre --edits 100 --out run
      memoir bench methods zsre --edits 30 --out methods
      memoir bench routing edits --out routing
      memoir bench index --quick
    """


for command in (bench_quality, bench_methods, bench_routing, bench_latency, bench_index, bench_edit, bench_serve):
    bench.add_command(command)
