"""The masked product as it stands in a full CUDA graph, whose replay runs kernels and no Python.

One kernel of a fixed shape. Which rows it acts on, and with which mask and memory, it reads from a table on the device
that is written before the step. A row that is not in the table is not touched, so its bits are the base model's. The
table holds addresses: masks and memories stay where they are, and a new generation of a store needs no new graph.

Rows of one memory stand together in blocks of `LANES`, and a program of the kernel multiplies a block with some rows of
the memory's weight. Programs without a block end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from vllm.logger import init_logger

from memoir_vllm.worker.product import ResidualProduct
from memoir_vllm.worker.rows import Batch

if TYPE_CHECKING:
    from vllm.config import CompilationConfig

__all__ = ["CapturedProduct", "captured_product"]

logger = init_logger("vllm.memoir")

# The smallest block that tl.dot takes; and of the weight, rows and columns that a program holds at a time.
LANES, OUT, IN = 16, 32, 128


class CapturedProduct:
    """y += W (mask * x) on the rows that the table names."""

    def __init__(self, rows: int, device: torch.device | str):
        """rows: the most that a graph has.
        device: where the layer lies.
        """
        self.sizes: set[int] = set()
        self._acting: Sequence[Batch] = ()  # keeps what the table has the addresses of
        self._memories = torch.zeros(rows, dtype=torch.int64, device=device)  # of each block; 0: none
        self._rows = torch.full((rows * LANES,), -1, dtype=torch.int64, device=device)  # of each lane; -1: none
        self._masks = torch.zeros(rows * LANES, dtype=torch.int64, device=device)

    def fill(self, batches: Sequence[Batch]) -> None:
        """Write the table for the coming step.

        batches: all rows that edits act on. The same object as last time stands for the same rows. If they are more
            than the table holds, it is left empty: no graph has so many rows, so the step replays none.
        """
        if sum(triton.cdiv(len(batch.index), LANES) for batch in batches) > len(self._memories):
            batches = ()
        if batches is self._acting or not (batches or self._acting):
            return
        self._acting = batches
        self._memories.zero_()
        self._rows.fill_(-1)
        block = 0
        for batch in batches:
            first, last = block * LANES, block * LANES + len(batch.index)
            self._rows[first:last] = batch.index
            self._masks[first:last] = batch.owner * batch.masks.stride(0) * batch.masks.element_size()
            self._masks[first:last] += batch.masks.data_ptr()
            end = triton.cdiv(last, LANES)
            self._memories[block:end] = batch.memory.weight.data_ptr()
            block = end

    def capture(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Put the product into the graph that is being captured, and note the graph's size.

        x: [rows, D/ranks] into the layer.
        y: [rows, H] out of it, which is changed.
        """
        self.sizes.add(len(x))
        self.add(x, y)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """What the graph does.

        x, y: see `capture`.
        """
        # Each row may be of another memory, so as many blocks as rows.
        grid = (len(x), triton.cdiv(y.shape[1], OUT))
        sizes = {"D": x.shape[1], "H": y.shape[1], "LANES": LANES, "OUT": OUT, "IN": IN}
        _add_product[grid](x, y, self._rows, self._masks, self._memories, x.stride(0), y.stride(0), **sizes)


def captured_product(
    d: int, h: int, dtype: torch.dtype, device: torch.device, graphs: CompilationConfig
) -> CapturedProduct | None:
    """The product for the full CUDA graphs of a worker, once it was seen to give what the product outside gives.

    d: width of this rank's rows into the layer.
    h: of those out of it.
    dtype: in which it serves.
    device: where the layer lies.
    graphs: what vLLM captures.

    Returns None where there are no such graphs, or where the kernel does not work here. The log says why.
    """
    if not (graphs.cudagraph_mode and graphs.cudagraph_mode.has_full_cudagraphs()):
        return None
    product = CapturedProduct(max(graphs.max_cudagraph_capture_size or 0, 1), device)
    try:
        wrong = _error(product, d, h, dtype, device)
    except Exception as error:  # a compiler's own, of any class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if wrong <= 0.05:
            return product
        reason = f"the product is wrong by {wrong:.2g} of its size"
    logger.warning("memoir: steps with edits replay no full CUDA graph and are slower, since in its kernel %s", reason)
    return None


def _error(product: CapturedProduct, d: int, h: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far the product of one made-up row is off, by the largest entry. This also compiles the kernel, which must
    not happen while a graph is captured."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, d, generator=generator, device=device, dtype=dtype) for n in (1, h))
    mask = torch.rand(1, d, generator=generator, device=device) < 0.5
    first, y = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, h, dtype=dtype, device=device)
    batch = Batch(ResidualProduct(weight), first, mask.to(dtype), first)
    product.fill([batch])
    product.add(x, y)
    product.fill(())
    want = torch.zeros_like(y)
    batch.add(x, want)
    return float((y - want).abs().max() / want.abs().max())


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    x,
    y,
    rows,
    masks,
    memories,
    x_stride,
    y_stride,
    D: tl.constexpr,
    H: tl.constexpr,
    LANES: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """Rounded as the product outside of graphs: once after the sum over D, and once after it is added to y."""
    block = tl.program_id(0)
    memory = tl.load(memories + block)
    if memory == 0:
        return
    kind = y.dtype.element_ty
    weight = tl.multiple_of(memory.to(tl.pointer_type(kind)), 16)
    lanes = block * LANES + tl.arange(0, LANES)
    row = tl.load(rows + lanes)
    mask = tl.load(masks + lanes).to(tl.pointer_type(kind))
    # As many programs as the graph has rows: a table that was written for a larger one may name others.
    acts = (row >= 0) & (row < tl.num_programs(0))
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    total = tl.full((LANES, OUT), 0, tl.float32)
    for start in range(0, D, IN):
        at = start + tl.arange(0, IN)
        inside = acts[:, None] & (at < D)[None, :]
        on = tl.load(mask[:, None] + at[None, :], mask=inside, other=0) != 0
        value = tl.load(x + row[:, None] * x_stride + at[None, :], mask=inside & on, other=0)
        columns = tl.load(weight + out[None, :] * D + at[:, None], mask=(out < H)[None, :] & (at < D)[:, None], other=0)
        total = tl.dot(value, columns, total, input_precision="ieee")
    place = y + row[:, None] * y_stride + out[None, :]
    inside = acts[:, None] & (out < H)[None, :]
    before = tl.load(place, mask=inside, other=0)
    tl.store(place, (before.to(tl.float32) + total.to(kind).to(tl.float32)).to(kind), mask=inside)
