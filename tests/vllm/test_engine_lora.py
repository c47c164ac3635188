"""LoRA: requests with an adapter that has no store pass untouched and say so; those of one with a store get its edits;
those without an adapter keep the edits of the store that they ask for, and their bits."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPTS, Engine, Expected, Reply, answers, flags, next_generation, small_store
from mixes import CLOSE, Other, any_mix, prompts_of
from safetensors.torch import load_file, save_file
from servers import Server
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import load_model
from memoir_retrieval.store.read import EditStore

pytestmark = pytest.mark.engine

RANK, SCALE = 4, 2.0
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
STEPS = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8, "num_gpu_blocks_override": 24}
# As many slots as adapters: vLLM's own functions for a CPU give a row without an adapter that of the last slot.
LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
ADAPTER = {"edit": None, "overlap": 0.0, "result": "adapter", "generation": 3}


@dataclass(frozen=True)
class Adapter:
    """request: what vLLM is asked with. reference: the model with the adapter in its weights."""

    request: Any
    reference: EditedModel


def write_adapter(folder: Path, model: Path, seed: int) -> None:
    """Random weights in PEFT's format, on the edited layer too."""
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(PROJECTIONS):
            for part, shape in (("lora_A", (RANK, weight.shape[1])), ("lora_B", (weight.shape[0], RANK))):
                drawn = torch.randn(shape, generator=generator) * 0.2
                tensors[f"base_model.model.{module}.{part}.weight"] = drawn
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK * SCALE, "bias": "none"}
    targets = sorted(name.split(".")[1] for name in PROJECTIONS)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))


def merge(adapter: Path, model: Path, folder: Path) -> Path:
    """The model with W + SCALE B A in the place of each W."""
    merged = AutoModelForCausalLM.from_pretrained(model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = dict(merged.named_modules())
    for name in tensors:
        if ".lora_A." in name:
            delta = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")].weight.data += SCALE * delta
    merged.save_pretrained(folder)
    for path in model.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def served(small_edits: Path, small: Path) -> EditedModel:
    return EditedModel.open(small_edits, str(small))


@pytest.fixture(scope="module")
def adapters(small: Path, served: EditedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    from vllm.lora.request import LoRARequest

    made = []
    for number in (1, 2, 3):
        folder = tmp_path_factory.mktemp("lora")
        write_adapter(folder / "adapter", small, number)
        reference = copy.copy(served)
        reference.base = load_model(str(merge(folder / "adapter", small, folder / "merged")), layer=1)
        made.append(Adapter(LoRARequest(f"adapter-{number}", number, str(folder / "adapter")), reference))
    return made


@pytest.fixture(scope="module")
def other_edits(small_edits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second store of the model."""
    folder = shutil.copytree(small_edits, tmp_path_factory.mktemp("store") / "other")
    next_generation(folder, without=(1,))
    return folder


@pytest.fixture(scope="module")
def third_edits(small: Path, adapters: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the third adapter."""
    model = f"{small}+{adapters[2].request.lora_path}"
    return small_store(model, tmp_path_factory.mktemp("store") / "third")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def others(adapters: list[Adapter], other_edits: Path, third_edits: Path) -> list[Other]:
    """Two adapters without a store, one with a store, and another store."""
    without = [Other(adapter.reference, adapter.request, edited=False) for adapter in adapters[:2]]
    with_store = Other(EditedModel.open(third_edits), adapters[2].request)
    return [*without, with_store, Other(EditedModel.open(other_edits), store="other")]


@pytest.fixture(scope="module")
def mix(adapters: list[Adapter]) -> dict[str, list[Any]]:
    """Each prompt without an adapter, opted out, with either adapter, and with one of them opted out."""
    one, two, _ = (adapter.request for adapter in adapters)
    n, off = len(PROMPTS), {"memoir": "off"}
    return {"adapters": [None] * 2 * n + [one] * n + [two] * 2 * n, "options": [None, off, None, None, off]}


def ask(engine: Engine, expected: dict[str, Expected], mix: dict[str, list[Any]], *, plain: bool) -> list[Reply]:
    """plain: of an engine without the plugin."""
    prompts = [wanted.ids for wanted in expected.values()] * 5
    options = [option for option in mix["options"] for _ in PROMPTS]
    return engine.ask(prompts, None if plain else options, adapters=mix["adapters"])


@pytest.fixture(scope="module")
def without_plugin(
    small: Path, small_expected: dict[str, Expected], mix: dict[str, list[Any]]
) -> dict[str, list[Reply]]:
    """The same flags without a memoir section: the whole mix, and a batch without adapters."""
    engine = Engine(here=True, **flags(small, **STEPS, **LORA))
    try:
        base = engine.ask([wanted.ids for wanted in small_expected.values()])
        return {"mix": ask(engine, small_expected, mix, plain=True), "base": base}
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(
    without_plugin: object,
    start: Callable[..., Engine],
    small: Path,
    small_edits: Path,
    other_edits: Path,
    third_edits: Path,
) -> Engine:
    stores = {"stores": {"other": str(other_edits), "adapter-3": str(third_edits)}}
    return start(here=True, **flags(small, small_edits, stores, **STEPS, **LORA))


@pytest.fixture(scope="module")
def mixed(engine: Engine, small_expected: dict[str, Expected], mix: dict[str, list[Any]]) -> list[Reply]:
    return ask(engine, small_expected, mix, plain=False)


def test_answers_of_an_adapter_keep_their_bits_and_say_so(
    mixed: list[Reply], without_plugin: dict[str, list[Reply]], mix: dict[str, list[Any]]
) -> None:
    for reply, plain, adapter in zip(mixed, without_plugin["mix"], mix["adapters"], strict=True):
        if adapter is not None:
            assert (reply.tokens, reply.logprobs) == (plain.tokens, plain.logprobs)
            assert reply.memoir == ADAPTER


def test_requests_beside_an_adapter_get_what_the_reference_gives(
    mixed: list[Reply], small_expected: dict[str, Expected]
) -> None:
    edited, off, *_ = (mixed[i : i + len(PROMPTS)] for i in range(0, len(mixed), len(PROMPTS)))
    for (name, wanted), reply, plain in zip(small_expected.items(), edited, off, strict=True):
        assert reply.tokens == wanted.tokens, name
        assert reply.memoir is not None and reply.memoir["edit"] == wanted.edit, name
        assert plain.tokens == wanted.base, name
        assert plain.memoir is not None and plain.memoir["result"] == "off", name


def test_unmatched_requests_keep_their_bits(
    engine: Engine, small_expected: dict[str, Expected], without_plugin: dict[str, list[Reply]]
) -> None:
    """In a batch without adapters, where vLLM's functions for a CPU are right."""
    replies = engine.ask([wanted.ids for wanted in small_expected.values()])
    for (name, wanted), reply, plain in zip(small_expected.items(), replies, without_plugin["base"], strict=True):
        same = (reply.tokens, reply.logprobs) == (plain.tokens, plain.logprobs)
        assert same == (wanted.edit is None), name


def test_no_request_finds_blocks_of_another_adapter(
    engine: Engine, served: EditedModel, adapters: list[Adapter], small_expected: dict[str, Expected]
) -> None:
    """One prompt over several blocks, asked in turn: first nothing of it is in the cache, then all that may be."""
    ids = small_expected["chat edit as third turn"].ids
    before = served.retriever.spans(ids)[0].acts_from // STEPS["block_size"] * STEPS["block_size"]
    full = (len(ids) - 1) // STEPS["block_size"] * STEPS["block_size"]
    assert 0 < before <= full
    one, two, _ = adapters
    off = {"memoir": "off"}
    turns = [(one, None), (None, None), (two, None), (None, off), (one, off), (None, None), (two, None), (None, off)]
    engine.llm.reset_prefix_cache()
    hits = []
    for adapter, option in turns:
        request = adapter and adapter.request
        (reply,) = engine.ask([ids], [option], warm=True, adapters=[request], max_tokens=4)
        reference = adapter.reference if adapter else served
        (wanted,) = reference.predict([ids], [reply.tokens], edited=adapter is None and option is None)
        assert reply.tokens == list(wanted.tokens)
        assert max(abs(a - b) for a, b in zip(reply.logprobs, wanted.logprobs, strict=True)) < CLOSE
        hits.append(reply.hit)
    assert hits == [0, 0, 0, before, full, full, full, full]


def test_each_store_answers_its_own_requests(
    engine: Engine, served: EditedModel, others: list[Other], small_expected: dict[str, Expected]
) -> None:
    """All in one batch: the default store, another one, and that of an adapter."""
    *_, third, other = others
    wanted = {"": small_expected, "adapter-3": answers(third.reference), "other": answers(other.reference)}
    ids = [prompt.ids for prompt in small_expected.values()]
    n = len(ids)
    options = [None] * 2 * n + [{"memoir_store": "other"}] * n
    engine.llm.reset_prefix_cache()
    for warm in (False, True):
        replies = engine.ask(ids * 3, options, warm=warm, adapters=[None] * n + [third.adapter] * n + [None] * n)
        for i, (store, expected) in enumerate(wanted.items()):
            edits = set()
            for (name, prompt), reply in zip(expected.items(), replies[i * n : (i + 1) * n], strict=True):
                said = reply.memoir
                assert said is not None
                assert (reply.tokens, said["edit"], said.get("store", "")) == (prompt.tokens, prompt.edit, store), name
                edits.add(prompt.edit)
            assert len(edits - {None}) > 2, store
    with pytest.raises(Exception, match="this server has '', 'other', 'adapter-3'"):
        engine.llm.generate({"prompt_token_ids": ids[0]}, SamplingParams(extra_args={"memoir_store": "nowhere"}))
    generation = EditStore.open(other.reference.retriever.store.path).manifest.generation
    assert engine.llm.collective_rpc("memoir_reload", args=("other",)) == [generation]
    assert engine.stats()["stores"]["other"]["generation"] == generation


def test_any_mix_of_requests(engine: Engine, served: EditedModel, others: list[Other]) -> None:
    how = {"requests": 60, "lengths": (1, 3, 6), "others": others}
    assert any_mix(5, engine, served, prompts_of(served), **how) > 5, "the mix holds edits"


@pytest.mark.slow
def test_a_server_takes_adapters_by_name_and_counts_their_requests(
    small: Path, small_edits: Path, adapters: list[Adapter], small_expected: dict[str, Expected], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(small)]
    command += ["--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"other={adapters[0].request.lora_path}"]
    command += ["--additional-config", json.dumps({"memoir": {"store": str(small_edits)}})]
    server = Server(command, tmp_path / "log")
    body = {"messages": PROMPTS["chat edit"], "temperature": 0, "max_tokens": 4, "return_token_ids": True}

    def ask(model: str, **more: Any) -> dict[str, Any]:
        response = server.http.post("/v1/chat/completions", json=body | {"model": model} | more)
        return response.raise_for_status().json()

    try:
        wanted = small_expected["chat edit"]
        for _ in range(2):
            adapted, edited = ask("other"), ask("m")
            assert adapted["kv_transfer_params"]["memoir"] == ADAPTER
            (expected,) = adapters[0].reference.generate([wanted.ids], max_new_tokens=4, edited=False)
            assert adapted["choices"][0]["token_ids"] == list(expected.tokens)
            assert edited["kv_transfer_params"]["memoir"]["edit"] == wanted.edit
            assert edited["choices"][0]["token_ids"] == wanted.tokens[:4]
        wrong = server.http.post("/v1/chat/completions", json=body | {"model": "other", "vllm_xargs": {"memoir": "on"}})
        assert wrong.status_code == 400
        lines = server.http.get("/metrics").text.splitlines()
        assert 'memoir_requests_total{result="adapter",store=""} 2.0' in lines
    finally:
        server.stop()
