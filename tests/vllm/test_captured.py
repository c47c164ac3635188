"""The product of full CUDA graphs on a CPU: its kernel in Triton's interpreter, which knows float32 and float16, and
compiled for GPUs that are not here. What captures and replays it: test_gpu_residual.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from memoir_vllm.worker.product import ResidualProduct
from memoir_vllm.worker.rows import Batch

triton = pytest.importorskip("triton")
MODULE = "memoir_vllm.worker.captured"


def fresh() -> ModuleType:
    sys.modules.pop(MODULE, None)
    return importlib.import_module(MODULE)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield fresh()
    del sys.modules[MODULE]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def batches(rows: list[list[int]], d: int, h: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """One memory for each list of rows; every second row shares its neighbour's mask."""
    acting = []
    for number, index in enumerate(rows):
        owner = torch.arange(len(index)) // 2
        masks = (normal(int(owner[-1]) + 1, d + number)[:, :d] > 0).to(dtype)
        weight = normal(h + number, d, dtype=dtype)[:h]
        acting.append(Batch(ResidualProduct(weight), torch.tensor(index), masks, owner))
    return acting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "h"), [(128, 32), (200, 72)])
def test_it_adds_what_the_product_outside_of_graphs_adds(
    dtype: torch.dtype, d: int, h: int, captured: ModuleType
) -> None:
    """More rows of one memory than a block has lanes, one row of another, and rows of no edit between them."""
    edited = [[*range(0, 40, 2)], [39], [3, 1]]
    x, before = normal(48, d, dtype=dtype), normal(48, h, dtype=dtype)
    product, acting = captured.CapturedProduct(64, "cpu"), batches(edited, d, h, dtype)
    product.fill(acting)
    after, want = before.clone(), before.clone()
    product.add(x, after)
    for batch in acting:
        batch.add(x, want)
    size = float((want - before).abs().max())
    torch.testing.assert_close(after, want, rtol=0, atol=4 * torch.finfo(dtype).eps * size)
    rest = sorted({*range(48)} - {row for rows in edited for row in rows})
    assert torch.equal(after[rest], before[rest]), "rows of no edit keep their bits"
    assert (after[edited[0]] != before[edited[0]]).any(dim=1).all()


def test_the_table_is_that_of_the_step(captured: ModuleType) -> None:
    """Steps one after another: other rows, fewer of them, none. What an earlier step left does not act."""
    product, x = captured.CapturedProduct(8, "cpu"), normal(8, 64)
    every, some = batches([[0, 1, 2, 3, 4, 5, 6], [7]], 64, 32), batches([[4]], 64, 32)
    for acting in (every, every, some, [], some, [], []):
        product.fill(acting)
        y, want = torch.ones(8, 32), torch.ones(8, 32)
        product.add(x, y)
        for batch in acting:
            batch.add(x, want)
        torch.testing.assert_close(y, want)
        untouched = [row for row in range(8) if all(row not in batch.index for batch in acting)]
        assert torch.equal(y[untouched], want[untouched])


@pytest.mark.parametrize("rows", [[[*range(40)]], [[0], [1], [2]]], ids=["one memory", "three memories"])
def test_a_step_of_more_rows_than_any_graph_leaves_the_table_empty(rows: list[list[int]], captured: ModuleType) -> None:
    product, x = captured.CapturedProduct(2, "cpu"), normal(2, 64)
    few = batches([[1]], 64, 32)
    for acting, acts in ((few, True), (batches(rows, 64, 32), False), (few, True)):
        product.fill(acting)
        y = torch.zeros(2, 32)
        product.add(x, y)
        assert bool(y.any()) == acts


def test_a_table_of_a_larger_step_reaches_no_row_behind_a_graph(captured: ModuleType) -> None:
    """A graph of two rows, replayed while the table names rows up to 40: an idle rank of data parallelism did that."""
    product, whole, before = captured.CapturedProduct(64, "cpu"), normal(48, 64), normal(48, 32)
    acting = batches([[*range(40)]], 64, 32)
    product.fill(acting)
    after, want = before.clone(), before.clone()
    product.add(whole[:2], after[:2])
    acting[0].add(whole, want)
    torch.testing.assert_close(after[:2], want[:2])
    assert torch.equal(after[2:], before[2:])


def test_a_graph_of_each_size_is_noted(captured: ModuleType) -> None:
    product = captured.CapturedProduct(8, "cpu")
    for rows in (8, 4):
        product.capture(normal(rows, 64), torch.zeros(rows, 32))
    assert product.sizes == {8, 4}


def graphs(mode: CUDAGraphMode) -> Any:
    return SimpleNamespace(cudagraph_mode=mode, max_cudagraph_capture_size=4)


def test_it_is_used_once_it_was_seen_to_be_right(captured: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else steps with edits run as without full graphs, and the log says why."""
    said: list[str] = []
    monkeypatch.setattr(captured.logger, "warning", lambda text, *values: said.append(text % values))

    def of(mode: CUDAGraphMode) -> Any:
        return captured.captured_product(64, 32, torch.float32, torch.device("cpu"), graphs(mode))

    assert of(CUDAGraphMode.PIECEWISE) is None
    assert of(CUDAGraphMode.FULL_AND_PIECEWISE) is not None and not said
    with monkeypatch.context() as there:
        there.setattr(captured.CapturedProduct, "add", lambda self, x, y: y.add_(1))
        assert of(CUDAGraphMode.FULL) is None
    monkeypatch.setattr(captured, "_add_product", {})
    assert of(CUDAGraphMode.FULL) is None
    assert "is wrong by" in said[0] and "KeyError" in said[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_it_compiles_for_gpus(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ampere and Hopper. bfloat16 is multiplied by tensor cores."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = fresh()
    sizes = {"D": 1536, "H": 576, "LANES": module.LANES, "OUT": module.OUT, "IN": module.IN}
    pointers = {"x": f"*{dtype}", "y": f"*{dtype}", "rows": "*i64", "masks": "*i64", "memories": "*i64"}
    kinds = pointers | {"x_stride": "i32", "y_stride": "i32"} | dict.fromkeys(sizes, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(7)}
    source = ASTSource(module._add_product, kinds, constexprs=sizes, attrs=aligned)
    for capability in (80, 90):
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert kernel.asm["cubin"]
        assert ("mma" in kernel.asm["ptx"]) == (dtype != "fp32")
