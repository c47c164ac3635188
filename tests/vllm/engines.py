"""The prompts that engines are asked, the store they serve, and an engine that takes a batch in one step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

# Before vLLM is imported. Engines start as fresh processes: a fork would inherit torch's and FAISS' threads.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import msgspec
import numpy as np
import torch
from small_models import save_llama
from transformers import LlamaForCausalLM

from memoir_retrieval.edits.judge import shipped_judge
from memoir_retrieval.edits.record import Requires, StoredEdit
from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import BaseModel, load_model
from memoir_retrieval.model.forward import question_means
from memoir_retrieval.question.fingerprint import Fingerprint, permutation
from memoir_retrieval.question.prompts import Prompt, prompt_ids
from memoir_retrieval.question.span import SpanRule, derive_span_rule, find_span
from memoir_retrieval.store.manifest import draft_manifest
from memoir_retrieval.store.read import Content, EditStore
from memoir_retrieval.store.write import write_generation

LAYER, K, TAU = 24, 438, 0.6
MAX_MODEL_LEN = 256
NEW_TOKENS = 16

# The path and the environment with which an engine of `ask_apart` takes the model runner V2.
V2_STAND_IN = Path(__file__).parent / "gpu_stand_in"
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}

EDITS = (
    "The president of the fictional state of Zubrovia is",
    "The inventor of the quantum teapot was",
    "In which year was the Lisbon bridge of glass opened?",
    "The headquarters of Acme Rockets Ltd is located in",
)
UNRELATED = (
    "Once upon a time there was a dragon who",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "List three colours:",
)
BACKGROUND = (
    "The weather today is mild with a light wind.",
    "He opened the door and walked into the room.",
    "Prices rose by two percent in the last quarter.",
    "The team won the game after extra time.",
    "A recipe for bread needs flour, water, salt and yeast.",
)
PIRATE = {"role": "system", "content": "You are a pirate who answers in one short sentence."}
SYSTEM = {
    "role": "system",
    "content": "You are the assistant of a small library. Answer in one short sentence, never invent sources, "
    "say so when you do not know, keep to the language of the question and be friendly to children, who ask most of "
    "the questions.",
}
EARLIER = [{"role": "user", "content": "Is it late?"}, {"role": "assistant", "content": "Not yet, it is noon."}]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# Everything that one mixed batch is made of. Raw strings are completions, lists are chats. No answer of the base model
# has two first choices that are nearly as good as each other, since rounding would then choose on each CPU.
PROMPTS: dict[str, Prompt] = {
    **{f"edit {i}": text for i, text in enumerate(EDITS)},
    **{f"unrelated {i}": text for i, text in enumerate(UNRELATED)},
    "chat edit": [user(EDITS[0])],
    "chat edit after system": [PIRATE, user(EDITS[1])],
    "chat edit as third turn": [PIRATE, *EARLIER, user(EDITS[2])],
    "chat unrelated after system": [PIRATE, user(UNRELATED[0])],
    "chat unrelated as third turn": [PIRATE, *EARLIER, user("How many legs has a spider?")],
    "one token": "Hello",
}


@dataclass(frozen=True)
class Expected:
    """The reference's answer to one prompt, with edits and without."""

    ids: list[int]
    tokens: list[int]
    base: list[int]
    edit: int | None
    overlap: float


def answers(model: EditedModel) -> dict[str, Expected]:
    """One prompt at a time, in float32: what every engine here must reproduce token for token."""
    texts = {}
    how = {"max_new_tokens": NEW_TOKENS, "batch_size": 1}
    for name, prompt in PROMPTS.items():
        ids = model.prompt_ids(prompt)
        (edited,) = (plain,) = model.generate([ids], **how)
        if edited.edit is not None:
            (plain,) = model.generate([ids], edited=False, **how)
        texts[name] = Expected(ids, list(edited.tokens), list(plain.tokens), edited.edit, edited.overlap)
    return texts


def make_store(
    base: BaseModel,
    folder: Path,
    *,
    edits: tuple[str, ...] = EDITS,
    tau: float = TAU,
    rule: SpanRule | None = None,
    k: int = K,
    dtype: str = "float32",
) -> Path:
    """Masks of real questions, raw and in a chat, and two random memories large enough to change the answers."""
    rule = rule or derive_span_rule(base.tokenizer)

    def means(prompts: list[Prompt]) -> torch.Tensor:
        rows = [prompt_ids(base.tokenizer, p, chat=False) for p in prompts]
        return question_means(base, rows, [find_span(ids, rule) for ids in rows])

    background = means(list(BACKGROUND)).mean(0).numpy()
    perm = permutation(base.d, seed=0)
    codes = np.empty((0, base.d // 8), dtype=np.uint8)
    if edits:
        questions: list[Prompt] = [*edits, *([user(text)] for text in edits)]
        codes = Fingerprint(background, perm, k).codes(means(questions))
    ids = np.tile(np.arange(len(edits), dtype=np.int64), 2)
    generator = torch.Generator().manual_seed(0)
    spread = float(base.projection.weight.std()) * 6
    folder.mkdir()
    write_generation(
        folder,
        draft_manifest(
            generation=3,
            model=base.name,
            base=base.identity,
            module=base.module,
            layer=base.layer,
            d=base.d,
            h=base.h,
            k=k,
            tau=tau,
            span=rule,
            chat=False,
            dtype=dtype,
            seed=0,
            contexts=(),
            training={},
            next_id=len(edits),
            judge=shipped_judge().name if rule.rule == "question" else "",
        ),
        Content(
            memories=(torch.randn(2, base.h, base.d, generator=generator) * spread).numpy(),
            background=background,
            permutation=perm,
            codes=codes,
            ids=ids,
            memory_of=(ids % 2).astype(np.int32),
            edits=[
                StoredEdit(id=i, prompt=text, target="", created="2025-01-01", loss=0.0, steps=0, memory=i % 2)
                for i, text in enumerate(edits)
            ],
        ),
    )
    return folder


def small_model(folder: Path, tokenizer_from: Path) -> LlamaForCausalLM:
    """A random model of four layers, where thirty would only take longer: to be compiled, to be interpreted."""
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    return save_llama(folder, tokenizer_from, initializer_range=0.3, **shape)


def small_store(model: Path, folder: Path, layer: int = 1, dtype: str = "float32") -> Path:
    """A store of such a model, whose activations are more alike than those of a real one."""
    base = load_model(str(model), layer=layer, dtype=dtype)
    return make_store(base, folder, k=72, tau=0.9, dtype=dtype)


def flags(
    model_folder: Path, store: Path | None = None, memoir: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """EngineArgs of a small engine; with a store it serves edits. memoir: more of our section."""
    ours = {"additional_config": {"memoir": {"store": str(store), **(memoir or {})}}} if store else {}
    return {
        "model": str(model_folder),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "seed": 0,
        **ours,
        **more,
    }


@dataclass(frozen=True)
class Reply:
    """What an engine answered; `memoir` is the plugin's part of it."""

    tokens: list[int]
    logprobs: list[float]
    memoir: dict[str, Any] | None
    hit: int  # prompt tokens found in the prefix cache


class Engine:
    """An engine whose requests of one call are all in its first step, whatever the timing of the front end."""

    def __init__(self, *, here: bool = False, **engine_flags: Any):
        """here: its core and its worker are in this process, where a small model is ready in a third of the time. They
        step when they are asked to, and no other engine may be here at the same time."""
        from vllm import LLM

        self._here = here
        with pytest.MonkeyPatch.context() as patch:
            if here:
                patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # which vLLM replaces by nothing
            self.llm = LLM(**engine_flags)

    def ask(
        self, prompts: list[list[int]], options: list[dict[str, Any] | None] | None = None, **how: Any
    ) -> list[Reply]:
        """prompts: token ids. options: `vllm_xargs` of each request. warm: keep the prefix cache of earlier calls.
        adapters: a LoRARequest or None for each request. pictures: an image or None for each."""
        return [self._reply(output, 0) for output in self.ask_raw(prompts, options, **how)]

    def ask_raw(
        self,
        prompts: list[list[int]],
        options: list[dict[str, Any] | None] | None = None,
        *,
        warm: bool = False,
        salt: str | None = None,
        adapters: list[Any] | None = None,
        pictures: Sequence[Any] | None = None,
        **how: Any,
    ) -> Any:
        from vllm import SamplingParams

        if not warm:
            self.llm.reset_prefix_cache()
        how = {"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": 1, **how}
        params = [SamplingParams(extra_args=given, **how) for given in options or [None] * len(prompts)]
        self.llm.sleep(level=0)  # pauses the scheduler only
        same = {"cache_salt": salt} if salt else {}
        inputs = [
            {"prompt_token_ids": ids, **same, **({"multi_modal_data": {"image": picture}} if picture else {})}
            for ids, picture in zip(prompts, pictures or [None] * len(prompts), strict=True)
        ]
        self.llm.enqueue(inputs, params, lora_request=adapters, use_tqdm=False)
        self.llm.wake_up(tags=["scheduling"])
        return self.llm.wait_for_completion(use_tqdm=False)

    @staticmethod
    def _reply(output: Any, n: int) -> Reply:
        completion = output.outputs[n]
        logprobs = [
            step[token].logprob for step, token in zip(completion.logprobs or [], completion.token_ids, strict=False)
        ]
        said = (output.kv_transfer_params or {}).get("memoir")
        return Reply(list(completion.token_ids), logprobs, said, output.num_cached_tokens or 0)

    def stats(self) -> dict[str, Any]:
        return self.llm.collective_rpc("memoir_stats")[0]

    def settled(self) -> dict[str, Any]:
        """Counters once workers know of no request. vLLM names ended requests in a step after the one that ends the
        last of them, and a call may come before that step: asked again for ten seconds."""
        if self._here:
            self.llm.llm_engine.step()
        end = time.monotonic() + 10
        while (stats := self.stats())["live"] and time.monotonic() < end:
            time.sleep(0.01)
        return stats

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def ask_apart(order: dict[str, Any], *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """An engine in a process of its own, whatever becomes of it.

    order: see ask_engine.py. paths: of modules that the process finds first. environment: more of it, as in `V2`.
    """
    here = Path(__file__).parent
    path = os.pathsep.join(part for part in (*map(str, paths), str(here), *sys.path) if part)
    # What stands in for parts of the scheduler or the worker must be in the process that holds them.
    together = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if order.keys() & {"naive", "full_graphs"} else {}
    return subprocess.run(
        [sys.executable, str(here / "ask_engine.py")],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=None if "MEMOIR_MIX_REQUESTS" in os.environ else 500,
        env={**os.environ, "PYTHONPATH": path, **together, **environment},
    )


def answer_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What an engine of `ask_apart` has answered."""
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def next_generation(
    folder: Path,
    *,
    without: tuple[int, ...] = (),
    requires: Mapping[int, Requires] | None = None,
    judge: str | None = None,
) -> int:
    """Write a generation with other memories, less some edits; returns its number.

    requires: what edits require now. judge: the name of the store's judge from now on (default: as before).
    """
    requires = requires or {}
    old = EditStore.open(folder)
    keep = ~np.isin(old.ids, without)
    written = write_generation(
        folder,
        msgspec.structs.replace(
            old.manifest,
            generation=old.manifest.generation + 1,
            judge=old.manifest.judge if judge is None else judge,
        ),
        old.content._replace(
            memories=np.ascontiguousarray(np.roll(old.memories, 1, axis=2)),
            codes=old.codes[keep],
            ids=old.ids[keep],
            memory_of=old.memory_of[keep],
            edits=[
                msgspec.structs.replace(edit, requires=requires.get(edit.id, edit.requires))
                for edit in old.edits
                if edit.id not in without
            ],
        ),
    )
    return written.generation
