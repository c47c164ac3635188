"""Which module of a model takes an edit, and how it is changed. Layers are vLLM's own, made without weights."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.v1.worker.gpu_worker import Worker

from memoir_retrieval.errors import ConfigError
from memoir_vllm.worker import attach, mixin
from memoir_vllm.worker.mixin import MemoirWorker
from memoir_vllm.worker.op import register_op

D, H = 64, 16


class Linear(RowParallelLinear):
    """Needs no tensor-parallel group and holds no weights."""

    def __init__(self, d: int = D, h: int = H):
        torch.nn.Module.__init__(self)
        self.input_size, self.output_size = d, h


class Doubled(UnquantizedLinearMethod):
    """Stands in for any quant method: its product is twice the input's first columns."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * x[:, :H]


class FusedExperts(torch.nn.Module):
    pass


def model(**modules: torch.nn.Module) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    return root


def test_the_layer_is_found_also_under_an_adapter() -> None:
    layer, wrapped = Linear(), torch.nn.Module()
    wrapped.base_layer = layer
    assert attach._find(model(down=layer), "down", D, H) is layer
    assert attach._find(model(down=wrapped), "down", D, H) is layer


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "with adapters"])
@pytest.mark.parametrize("name", ["gemm_rs_ar", "gemm_rs"])
def test_a_layer_that_is_multiplied_in_a_fused_kernel_is_refused(name: str, adapters: bool) -> None:
    """As Kimi K3 and DeepSeek V4.1 have it on some GPUs (vLLM 0.32)."""
    layer = Linear()
    owner = model(down=model(base_layer=layer) if adapters else layer)
    setattr(owner, name, None)
    attach._refuse_fused(model(mlp=owner), layer, "mlp.down")
    setattr(owner, name, object())
    with pytest.raises(
        ConfigError, match=r"edits mlp\.down, .* in one kernel, past the edits: set VLLM_ENABLE_GEMM_RS=0"
    ):
        attach._refuse_fused(model(mlp=owner), layer, "mlp.down")


@pytest.mark.parametrize(("others", "kept"), [(True, "product"), (False, None)])
def test_a_rank_whose_kernel_works_does_as_one_whose_does_not(
    others: bool, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one would replay a graph in which the other runs none."""
    heard: list[Any] = []

    def with_another(value: Any, ranks: int) -> list[Any]:
        heard.append((value, ranks))
        return [value, others]

    linear = SimpleNamespace(tp_size=2, tp_rank=0)
    nothing = {"_find": linear, "_refuse_fused": None, "_hook": None, "require_same": None, "register_op": None}
    nothing |= {"values_of_stages": [True], "_captured": "product", "token_decoder": str, "Router": None}
    for name, value in nothing.items():
        monkeypatch.setattr(attach, name, lambda *args, value=value, **options: value)
    monkeypatch.setattr(attach, "values_of_ranks", with_another)
    monkeypatch.setattr(attach, "ResidualLayer", lambda *args, **options: SimpleNamespace(captured=None))
    monkeypatch.setattr(attach, "Reloader", lambda *args: None)
    store = SimpleNamespace(manifest=SimpleNamespace(module="down", d=D, h=H), memories=np.zeros((1, H, D)))
    served_as, graphs = SimpleNamespace(dtype=torch.float32), SimpleNamespace(static_forward_context={})
    engine = SimpleNamespace(model_config=served_as, compilation_config=graphs)
    served = attach.attach(SimpleNamespace(tau=None), {"": store}, engine, model(), torch.device("cpu"))
    assert served is not None and served[0].captured == kept
    assert heard == [(True, 2)]


class Vision(torch.nn.Module):
    """Names its text tower as Gemma 3, Qwen and Mistral do in vLLM, beside a vision tower with a layer of that name."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "model.dropped.": None}
    )

    def __init__(self) -> None:
        super().__init__()
        self.add_module("language_model", model(model=model(down=Linear())))
        self.add_module("visual", model(down=Linear()))


def test_the_layer_is_found_under_the_name_that_the_models_class_maps() -> None:
    vision = Vision()
    text = vision.get_submodule("language_model.model.down")
    assert attach._find(vision, "model.language_model.down", D, H) is text
    for module in ("down", "model.down", "model.dropped.down"):
        with pytest.raises(ConfigError, match=f"edits {module}, which Vision has .* under no name that its class maps"):
            attach._find(vision, module, D, H)
        assert attach._find(vision, module, D, H, elsewhere=True) is None


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("gemma3_mm", "Gemma3ForConditionalGeneration"),
        ("gemma4_mm", "Gemma4ForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        ("mistral3", "Mistral3ForConditionalGeneration"),
        ("gpt_oss", "GptOssForCausalLM"),
    ],
)
def test_vllms_own_classes_map_the_text_tower(name: str, architecture: str) -> None:
    """Read in vLLM's source: most of these modules need torchvision to be imported."""
    mapper = mapper_of(name, architecture)
    stored = "model.layers.1.self_attn.o_proj" if name == "gpt_oss" else "model.language_model.layers.1.mlp.down_proj"
    named = "model.layers.1.attn.o_proj" if name == "gpt_oss" else "language_model.model.layers.1.mlp.down_proj"
    layer, root = Linear(), torch.nn.Module()
    root.hf_to_vllm_mapper, owner = mapper, root
    *path, last = named.split(".")
    for part in path:
        owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    owner.add_module(last, layer)
    assert attach._find(root, stored, D, H) is layer


def mapper_of(name: str, architecture: str) -> WeightsMapper:
    """The mapper that a class of vLLM's has, without importing its module."""
    source = (Path(vllm.__file__).parent / "model_executor/models" / f"{name}.py").read_text()
    (model_class,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == architecture)
    (value,) = (
        n.value
        for n in model_class.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "hf_to_vllm_mapper"
    )
    mapper: WeightsMapper = eval(ast.unparse(value), {"WeightsMapper": WeightsMapper})
    return mapper


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (None, "edits down, which Module has in vLLM under no name that its class maps: this architecture cannot be"),
        (FusedExperts(), "down, which is a FusedExperts in vLLM: only a dense RowParallelLinear"),
        (Linear(h=H + 1), f"as {D} -> {H}, vLLM has it as {D} -> {H + 1}: serve the model that the store was made on"),
    ],
    ids=["missing", "experts", "another size"],
)
def test_other_modules_are_refused(module: torch.nn.Module | None, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        attach._find(model(**({} if module is None else {"down": module})), "down", D, H)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_quant_method_keeps_its_class_and_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op gets what went into the layer, unquantised, and adds to what came out."""
    register_op()
    seen: list[Any] = []

    def run(x: torch.Tensor, y: torch.Tensor, slots: Any) -> None:
        seen.append((x.clone(), slots))
        y += 1

    context = SimpleNamespace(no_compile_layers={"name": SimpleNamespace(run=run)}, slot_mapping={"layer": "slots"})
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    plain = Doubled()
    method = attach._with_op(plain, "name")
    assert isinstance(method, Doubled) and type(plain) is Doubled
    x = torch.randn(3, D)
    torch.testing.assert_close(method.apply(Linear(), x), 2 * x[:, :H] + 1)
    torch.testing.assert_close(plain.apply(Linear(), x), 2 * x[:, :H])
    assert len(seen) == 1 and torch.equal(seen[0][0], x) and seen[0][1] == {"layer": "slots"}


@pytest.mark.parametrize("key", ["kFp8StaticTensorSym", "kFp8Dynamic128Sym", "kNvfp4Dynamic"])
def test_a_fused_kernel_no_longer_quantises_what_goes_into_the_layer(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own choice between SiLU alone and SiLU fused with the quantisation of its output; the kernel is a stand-in
    for those of a GPU. Other layers keep theirs."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.quantization.utils import quant_utils

    quant_key = getattr(quant_utils, key)
    monkeypatch.setitem(fused_act_quant._FUSED_ACT_QUANT, (SiluAndMul, quant_key), lambda x, linear: "packed")
    with set_current_vllm_config(VllmConfig()):
        silu = SiluAndMul()
    edited, other = Linear(), Linear()
    for layer in (edited, other):
        layer.quant_method, layer._input_quant_key = Doubled(), quant_key
    attach._hook(edited, "name")
    x = torch.randn(3, 2 * D)
    assert fused_act_quant.maybe_fused_act_quant(silu, x, other) == "packed"
    torch.testing.assert_close(
        fused_act_quant.maybe_fused_act_quant(silu, x, edited), torch.nn.functional.silu(x[:, :D]) * x[:, D:]
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fp8", "Fp8LinearMethod"),
        ("auto_awq", "AutoAWQLinearMethod"),
        ("auto_awq", "AutoAWQMarlinLinearMethod"),
        ("auto_gptq", "AutoGPTQLinearMethod"),
        ("modelopt", "ModelOptLinearMethod"),
        ("compressed_tensors.compressed_tensors", "CompressedTensorsLinearMethod"),
    ],
)
def test_the_op_goes_behind_every_kind_of_quantised_product(module: str, name: str) -> None:
    """None of these but the last has a kernel for a CPU: what is called, and with what, is vLLM's interface of all."""
    method = getattr(importlib.import_module(f"vllm.model_executor.layers.quantization.{module}"), name)
    plain = method.__new__(method)
    assert list(inspect.signature(method.apply).parameters) == ["self", "layer", "x", "bias"]
    with_op = attach._with_op(plain, "name")
    assert isinstance(with_op, method) and type(plain) is method
    assert type(with_op).apply is not method.apply


class Bed(Worker):
    """Of vLLM's worker only what can be slept on."""

    def __init__(self) -> None:
        pass

    def sleep(self, level: int) -> None:
        self.level = level

    def discard(self, tags: tuple[str, ...]) -> None:
        assert "weights" not in tags


class Sleeper(MemoirWorker, Bed):
    pass


def test_weights_that_would_be_thrown_away_are_kept() -> None:
    worker = Sleeper()
    worker.sleep(1)
    assert worker.level == 1
    with pytest.raises(RuntimeError, match=r"refuses sleep level 2: .*use level 1"):
        worker.sleep(2)
    worker.discard(("kv_cache",))
    with pytest.raises(RuntimeError, match=r"refuses discard of weights: .*use sleep level 1"):
        worker.discard(("kv_cache", "weights"))
    for change in (worker.reload_weights, worker.reset_weights, worker.start_weight_update):
        with pytest.raises(RuntimeError, match=rf"refuses {change.__name__}: .*start the engine again"):
            change()


def test_the_log_says_of_which_store_a_reload_took_a_generation_up(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, said = Sleeper(), list[str]()
    stores = {name: SimpleNamespace(router=SimpleNamespace(edits=edits)) for name, edits in (("", 3), ("acme", 5))}
    reloader = SimpleNamespace(manifest=SimpleNamespace(generation=7), reload=lambda: 8)
    worker._memoir, worker._reloaders = SimpleNamespace(stores=stores), dict.fromkeys(stores, reloader)  # type: ignore[assignment]
    monkeypatch.setattr(mixin.logger, "info", lambda text, *values: said.append(text % values))
    assert worker.memoir_reload() == worker.memoir_reload("acme") == 8
    assert said == [
        "memoir: serving generation 8 with 3 edits, was 7",
        "memoir: serving acme, generation 8 with 5 edits, was 7",
    ]
