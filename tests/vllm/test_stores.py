"""Several stores on one server: whose edits a request gets, whose blocks it finds, and what each store is made on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from engines import flags, make_store, small_store
from prometheus_client import CollectorRegistry, generate_latest
from safetensors.torch import load_file, save_file
from simulation import RULE, Simulate, Simulation, World, chat, right
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from memoir_retrieval.errors import ConfigError, ModelError, StoreError, StoreMismatch
from memoir_retrieval.lookup.retriever import Retriever
from memoir_retrieval.model.adapter import adapter_digest, merge_adapter, split_adapter
from memoir_retrieval.model.base import load_model
from memoir_retrieval.store.read import EditStore
from memoir_vllm import config, requests
from memoir_vllm.config import ServedStore
from memoir_vllm.front.metrics import EngineCollector, Traffic

OTHER = {"memoir_store": "other"}


@pytest.fixture(scope="module")
def second(here: World) -> World:
    """A store of the same questions in the same generation, with other memories."""
    return here.later(7, without=None, sha256="8" * 64)


@pytest.fixture
def sim(simulate: Simulate, second: World) -> Simulation:
    """A server of both stores."""
    sim = simulate(model_len=512)
    sim.scheduler._stores["other"] = ServedStore(RULE, "")
    sim.adopt(second.store, "other")
    return sim


def test_each_request_gets_the_edits_of_its_store_and_no_block_of_another(
    sim: Simulation, here: World, second: World
) -> None:
    """In one batch and one after the other: blocks before the question are shared, those behind it belong to an edit of
    one store."""
    prompt = chat(here.questions[1], before=150, after=60)
    for name, options in (("default", None), ("other", OTHER)):
        sim.add(f"together {name}", prompt, options)
    sim.run()
    sim.scheduler.reset_prefix_cache()
    for turn in ("cold", "warm"):
        for name, options in (("default", None), ("other", OTHER)):
            sim.add(f"{turn} {name}", prompt, options)
            sim.run()
    assert right(here, prompt, 1) != right(second, prompt, 1)
    for name, answer in sim.answers.items():
        assert answer == right(second if "other" in name else here, prompt, 1), name
        said = sim.said[name]
        assert (said["result"], said.get("store", "")) == ("matched", "other" if "other" in name else ""), name
    shared, full = 150 // 16 * 16, (len(prompt) - 1) // 16 * 16
    assert [sim.hits[f"{turn} {name}"] for turn in ("cold", "warm") for name in ("default", "other")] == [
        0,
        shared,
        full,
        full,
    ]
    assert sim.layer.stats()["recalled"] == 2, "what is remembered is remembered of one store"


def test_a_reload_of_one_store_leaves_the_others_as_they_are(sim: Simulation, here: World, second: World) -> None:
    prompt = chat(here.questions[1], before=40)
    for name, options in (("default", None), ("other", OTHER)):
        sim.add(name, prompt, options)
    sim.run()
    newer = second.later(8, without=None, sha256="9" * 64)
    sim.add("runs on", prompt, OTHER, max_tokens=9)
    sim.step()
    sim.adopt(newer.store, "other")
    assert (sim.layer.older("other"), sim.layer.older()) == (1, 0)
    for name, options in (("default again", None), ("other again", OTHER)):
        sim.add(name, prompt, options)
    sim.run()
    assert sim.answers["runs on"] == right(second, prompt, 1, 9)
    assert sim.answers["other again"] == right(newer, prompt, 1)
    assert sim.answers["default again"] == right(here, prompt, 1)
    assert {name: said["generation"] for name, said in sim.said.items()} == {
        "default": 7,
        "other": 7,
        "runs on": 7,
        "default again": 7,
        "other again": 8,
    }
    stats = sim.layer.stats()
    assert stats["generation"] == 7 and stats["stores"] == {
        "other": {"edits": 0, "generation": 8, "older_generations": 0}
    }


def test_an_adapter_with_a_store_is_looked_up_in_it_and_its_sums_are_counted(
    sim: Simulation, here: World, second: World, tmp_path: Path
) -> None:
    """Another adapter passes untouched. The question of the second request lies in the adapter's own cached blocks."""
    folder = written_adapter(tmp_path / "adapter", {"x": (2, 2)})
    sim.scheduler._stores["french"] = ServedStore(RULE, adapter_digest(folder))
    sim.adopt(second.store, "french")
    french, german = LoRARequest("french", 1, str(folder)), LoRARequest("german", 2, str(folder))
    long = chat(here.questions[2], before=40, after=30)
    for turn in ("cold", "warm"):
        sim.add(f"{turn} french", long, {"memoir_nearest": 1}, adapter=french)
        sim.run()
    sim.add("german", long, adapter=german)
    sim.run()
    for name in ("cold french", "warm french"):
        assert sim.answers[name] == right(second, long, 2), name
        assert (sim.said[name]["result"], sim.said[name]["store"]) == ("matched", "french"), name
    assert sim.hits["warm french"] == sim.hits["cold french"] + (40 + 30 - 1) // 16 * 16, "what its sums speak for"
    assert (sim.answers["german"], sim.said["german"]["result"]) == (right(here, long, None), "adapter")


@pytest.mark.parametrize(
    ("name", "adapter", "says"),
    [
        ("nowhere", None, r"'nowhere': this server has '', 'other', 'french', 'gone'"),
        (["other"], None, "use the name of a store"),
        ("french", None, "send the requests to the model 'french'"),
        ("other", "french", "leave memoir_store out"),
        ("", "other", "give one of the two another name"),
        ("", "french", "made with another adapter than"),
        ("", "gone", "cannot be read"),
    ],
    ids=str,
)
def test_a_store_that_cannot_answer_is_refused_to_its_client(
    name: Any, adapter: str | None, says: str, tmp_path: Path
) -> None:
    folder = written_adapter(tmp_path / "adapter", {"x": (2, 2)})
    stores = {name: ServedStore(RULE, "") for name in ("", "other")}
    stores |= {name: ServedStore(RULE, "0" * 64) for name in ("french", "gone")}
    lora = adapter and LoRARequest(adapter, 1, str(tmp_path / "gone" if adapter == "gone" else folder))
    request = SimpleNamespace(resumable=False, prompt_token_ids=[1], lora_request=lora)
    params = SimpleNamespace(
        max_tokens=2, watermarking=False, detokenize=True, extra_args={"memoir_store": name} if name else None
    )
    with pytest.raises(VLLMValidationError, match=says) as refused:
        requests._check(request, params, stores)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_a_wrong_store_that_a_front_end_let_pass_is_answered_by_the_base_model_and_says_why(
    sim: Simulation, here: World
) -> None:
    prompt = chat(here.questions[1], before=40)
    sim.add("a", prompt, {"memoir_store": "nowhere"})
    sim.run()
    assert sim.answers["a"] == right(here, prompt, None)
    assert sim.said["a"]["result"] == "unroutable" and "this server has" in sim.said["a"]["reason"]


def test_counts_are_kept_by_store() -> None:
    traffic = Traffic()
    for edit, store in ((1, {}), (1, {"store": "other"}), (2, {"store": "other"})):
        traffic.count("a", {"result": "matched", "edit": edit, "overlap": 0.9, "generation": 1, **store})
    assert traffic.results == {"matched": 1} and traffic.of("other").hits == {1: 1, 2: 1}
    collector, registry = EngineCollector(traffic), CollectorRegistry()
    held = {"edits": 4, "generation": 2, "older_generations": 0}
    counted = dict.fromkeys(("remembered", "routed", "recalled", "rows", "routing_s", "residual_s"), 1)
    collector.engines = [held | counted | {"stores": {"other": held | {"generation": 9}}}]
    registry.register(collector)
    lines = generate_latest(registry).decode().splitlines()
    assert {line for line in lines if line.startswith(("memoir_generation{", "memoir_edit_hits_total{"))} == {
        'memoir_generation{engine="0",store=""} 2.0',
        'memoir_generation{engine="0",store="other"} 9.0',
        'memoir_edit_hits_total{edit="1",store=""} 1.0',
        'memoir_edit_hits_total{edit="1",store="other"} 1.0',
        'memoir_edit_hits_total{edit="2",store="other"} 1.0',
    }


# ---- what a store is made on ---------------------------------------------------------------------------------------


def written_adapter(folder: Path, shapes: dict[str, tuple[int, int]], **config: Any) -> Path:
    """Rank 2, in PEFT's format. shapes: of each module's weight."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        for part, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2))):
            tensors[f"base_model.model.{module}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


@pytest.fixture(scope="module")
def adapter(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = load_file(small / "model.safetensors")
    names = ("self_attn.q_proj.weight", "mlp.down_proj.weight")
    shapes = {key.removesuffix(".weight"): tuple(value.shape) for key, value in weights.items() if key.endswith(names)}
    return written_adapter(tmp_path_factory.mktemp("adapter") / "french", shapes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def french(small: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(f"{small}+{adapter}", tmp_path_factory.mktemp("french") / "edits")


def test_a_model_with_an_adapter_has_its_products_in_its_weights(small: Path, adapter: Path) -> None:
    base = load_model(f"{small}+{adapter}", layer=1)
    plain = AutoModelForCausalLM.from_pretrained(small)
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, weight in plain.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        wanted = weight
        if key in tensors:
            wanted = weight + 3 * (tensors[key.replace("lora_A", "lora_B")] @ tensors[key])
            changed += 1
        torch.testing.assert_close(base.model.state_dict()[name], wanted)
    assert changed == 8
    assert base.identity == msgspec.structs.replace(
        load_model(str(small), layer=1).identity, adapter=base.identity.adapter
    )
    assert base.identity.adapter == adapter_digest(adapter)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, r"use_dora\): edits can be made on the model with a plain one only"),
        ({"bias": "all"}, r"\(bias\)"),
        ({"init_lora_weights": "pissa"}, r"\(init_lora_weights\)"),
        ({"alora_invocation_tokens": [1, 2], "use_qalora": True}, r"\(alora_invocation_tokens, use_qalora\)"),
        ({"target_parameters": ["experts.weight"]}, r"\(target_parameters\)"),
        ({"later_way": {"strength": 2}}, r"\(later_way\)"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "cannot be read"),
        ({}, "no part of this model that edits can be made behind"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_merged_is_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = written_adapter(tmp_path / "adapter", {"elsewhere": (4, 4)}, **config)
    with pytest.raises(ModelError, match=says) as refused:
        merge_adapter(torch.nn.Module(), folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("begin", [True, "gaussian"])
def test_what_peft_writes_of_a_plain_adapter_is_merged_as_by_peft(begin: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
    how = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=begin, lora_dropout=0.1, use_rslora=True)
    trained = peft.get_peft_model(copy.deepcopy(plain), how)
    torch.nn.init.normal_(trained.base_model.model[0].lora_B["default"].weight)
    trained.save_pretrained(tmp_path)
    merge_adapter(plain, tmp_path)
    torch.testing.assert_close(plain[0].weight, trained.merge_and_unload()[0].weight)


def test_a_name_with_a_plus_is_an_adapter_only_where_one_lies(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "c++").mkdir()
    for name in (str(tmp_path / "c++"), "org/model+chat", f"model+{tmp_path}"):
        assert split_adapter(name) == (name, None)
    assert split_adapter(f"org/model+chat+{adapter}") == ("org/model+chat", adapter)


def test_a_store_of_an_adapter_is_opened_with_it_and_no_other_model(small: Path, adapter: Path, french: Path) -> None:
    assert EditStore.open(french).manifest.model == f"{small}+{adapter}"
    assert Retriever.open(french).base.adapter == adapter
    with pytest.raises(StoreMismatch, match=r"adapter [0-9a-f]{12}\), but .* has adapter none"):
        Retriever.open(french, small)


def test_stores_are_served_together_where_they_fit(
    small: Path, small_edits: Path, french: Path, adapter: Path, tmp_path: Path
) -> None:
    def create(store: Path, stores: dict[str, Path], **more: Any) -> Any:
        section = {"stores": {name: str(folder) for name, folder in stores.items()}}
        return EngineArgs(**flags(small, store, section, **more)).create_engine_config()

    lora = {"enable_lora": True, "max_lora_rank": 8}
    made = create(small_edits, {"french": french}, **lora)
    assert made.additional_config["memoir_stores"]["french"]["adapter"] == adapter_digest(adapter)
    with pytest.raises(ConfigError, match="add --enable-lora and --lora-modules"):
        create(small_edits, {"french": french})
    with pytest.raises(StoreMismatch, match="has adapter none"):
        create(french, {}, **lora)
    elsewhere = make_store(load_model(str(small), layer=2), tmp_path / "elsewhere", k=72, tau=0.9)
    with pytest.raises(ConfigError, match=r"another module \(model.layers.1.mlp.down_proj, model.layers.2"):
        create(small_edits, {"other": elsewhere})


def test_a_store_whose_span_rule_changes_while_an_engine_starts_is_refused(small: Path, small_edits: Path) -> None:
    """As by `memoir compact --acts last`: the scheduler would find questions by the rule of before."""
    vllm_config = EngineArgs(**flags(small, small_edits)).create_engine_config()
    ours = config.section_of(vllm_config)
    assert ours and config.open_stores(ours, vllm_config).keys() == {""}
    vllm_config.additional_config["memoir_stores"][""]["span"]["acts"] = "first"
    with pytest.raises(StoreError, match=r"another span rule while the engine started: start it again"):
        config.open_stores(ours, vllm_config)
