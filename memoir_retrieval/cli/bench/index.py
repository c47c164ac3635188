"""`memoir bench index`: lookups beside every other way of doing them."""

from __future__ import annotations

import time
from dataclasses import asdict

import click
from rich.table import Table

from memoir_retrieval.cli.common import echo_json, json_option, notes, tables
from memoir_retrieval.errors import ConfigError


@click.command("index")
@click.option(
    "--d", "widths", type=int, multiple=True, default=(1536, 14336), show_default=True, help="Bits of a mask."
)
@click.option(
    "--n",
    "sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1000, 10_000, 100_000, 1_000_000),
    show_default=True,
    help="Stored masks.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 8, 32),
    show_default=True,
    help="Queries at a time.",
)
@click.option("--tau", type=float, default=0.5, show_default=True, help="Least overlap that matches.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="Seconds for each size and batch.")
@click.option("--memory", type=float, help="GiB that may be used (default: half of what is free).")
@click.option("--cpu-time", is_flag=True, help="Count CPU time, for a busy machine; for one thread only.")
@click.option("--quick", is_flag=True, help="Only 1000 and 10000 masks, 2 seconds each.")
@json_option
def bench_index(
    widths: tuple[int, ...],
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    tau: float,
    threads: int,
    seconds: float,
    memory: float | None,
    cpu_time: bool,
    quick: bool,
    as_json: bool,
) -> None:
    """Time lookups in made-up masks, against FAISS, matrix products and the published code.

    The masks overlap like those of a language model. Half of the queries match a stored mask. Ratios compare
    neighbouring turns. --json prints one object per row: d, n, batch, method, ms, vs_flat, recall.

    \b
    Example:
      memoir bench index --quick
      memoir bench index --d 14336 --n 100000 --batch 32 --json
    """
    import faiss
    import torch

    from memoir_retrieval.evaluation.index_bench import IndexTiming, bench_fingerprint, bench_lookup, free_bytes

    if not 0 < tau <= 1:
        raise ConfigError(f"tau is {tau}: choose 0 < tau <= 1")
    wrong = [d for d in widths if d < 64 or d % 64]
    if wrong:
        raise ConfigError(f"--d is {wrong[0]}: choose a multiple of 64, such as 14336")
    if cpu_time and threads > 1:
        raise ConfigError(f"--cpu-time counts the work of all threads, and --threads is {threads}: leave out --threads")
    if quick:
        sizes, seconds = tuple(n for n in sizes if n <= 10_000) or sizes[:1], min(seconds, 2.0)
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    allowed = int(memory * 2**30) if memory is not None else free_bytes() // 2

    rows: list[IndexTiming] = []
    for d in widths:
        rows += bench_fingerprint(d, batches, clock)
        rows += bench_lookup(d, sizes, batches, tau=tau, seconds=seconds, memory=allowed, clock=clock, note=notes.print)
    if as_json:
        echo_json([asdict(row) for row in rows])
        return
    table = Table("D", "N", "batch", "method", "ms", "x flat", "recall")
    for row in rows:
        numbers = (
            f"{value:.{digits}f}" if value is not None else "" for value, digits in ((row.vs_flat, 2), (row.recall, 3))
        )
        table.add_row(str(row.d), str(row.n or ""), str(row.batch), row.method, f"{row.ms:.3f}", *numbers)
    tables.print(table)
