"""A vision-language model whose text tower is edited, on a real engine: requests of text, and with an image."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf
from engines import NEW_TOKENS, PROMPTS, Engine, Expected, Reply, answers, flags, make_store
from mixes import Other, any_mix, prompts_of
from PIL import Image
from safetensors.torch import load_file, save_file
from towers import TEXT, TOKENS, VISION, save
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from memoir_retrieval.lookup.reference import EditedModel
from memoir_retrieval.model.base import load_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STAND_IN = Path(__file__).parent / "pil_stand_in"
# Special tokens of the embedded model's tokenizer, which mean nothing to a random model.
IMAGE_BEGIN, IMAGE, IMAGE_END = 3, 4, 5
PATCHES = 4
NEW_LINES = ["\n" * n for n in range(1, 5)]  # tokens of Gemma, which vLLM looks for around an image


class Served(NamedTuple):
    """model, store: folders. wanted: what the reference says of text."""

    model: Path
    store: Path
    wanted: dict[str, Expected]


@pytest.fixture(scope="module", autouse=True)
def no_torchvision() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        runpy.run_path(str(STAND_IN / "sitecustomize.py"))
        paths = [str(STAND_IN), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("gemma3")
    _save_gemma3(folder / "model")
    base = load_model(str(folder / "model"), layer=1)
    assert base.module == "model.language_model.layers.1.mlp.down_proj"
    store = make_store(base, folder / "store", k=72, tau=0.9)
    return Served(folder / "model", store, answers(EditedModel.open(store, str(folder / "model"))))


def _save_gemma3(folder: Path) -> None:
    tokens = TOKENS | {"vocab_size": TOKENS["vocab_size"] + len(NEW_LINES)}
    config = hf.Gemma3Config(
        text_config=TEXT | tokens | {"sliding_window": 64},
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=PATCHES,
        boi_token_index=IMAGE_BEGIN,
        image_token_index=IMAGE,
        eoi_token_index=IMAGE_END,
        **tokens,
    )
    save(config, folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    names = tokenizer.convert_ids_to_tokens([IMAGE_BEGIN, IMAGE, IMAGE_END])
    named = dict(zip(("boi_token", "image_token", "eoi_token"), names, strict=True))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)
    tokenizer.add_tokens(NEW_LINES)
    side = VISION["image_size"]
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    template = tokenizer.chat_template
    hf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=PATCHES).save_pretrained(folder)
    # As on the Hub; transformers reads both names.
    weights = load_file(folder / "model.safetensors")
    tower = "vision_tower."
    renamed = {name.replace(tower, f"{tower}vision_model.", 1): weight for name, weight in weights.items()}
    projection = renamed["multi_modal_projector.mm_input_projection_weight"]  # drawn as zeros: no picture would be seen
    projection.normal_(generator=torch.Generator().manual_seed(0))
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def picture(seed: int) -> Image.Image:
    side = VISION["image_size"]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def bits(replies: list[Reply]) -> list[Any]:
    return [(reply.tokens, reply.logprobs) for reply in replies]


def test_text_is_edited_and_images_pass_with_the_base_models_answer(
    served: Served, start: Callable[..., Engine]
) -> None:
    """In one batch, cold and from the prefix cache; images stand before the question, in it, and alone."""
    model, store, wanted = served
    names = list(PROMPTS)
    texts = [wanted[name].ids for name in names]
    chat = wanted["chat edit"].ids
    within = [*chat[:8], IMAGE_BEGIN, *chat[8:]]
    seen = [([IMAGE_BEGIN, *wanted["edit 0"].ids], 0), (within, 0), (within, 1), ([IMAGE_BEGIN], 1)]
    prompts = texts + [prompt for prompt, _ in seen]
    pictures = [None] * len(texts) + [picture(seed) for _, seed in seen]

    engine = start(**flags(model, store, block_size=32))
    cold = engine.ask(prompts, pictures=pictures)
    warm = engine.ask(prompts, pictures=pictures, warm=True)
    off = engine.ask(texts, [{"memoir": "off"}] * len(texts))
    assert any(reply.hit for reply in warm)
    for replies in (cold, warm):
        for name, reply in zip(names, replies, strict=False):
            assert reply.memoir["edit"] == wanted[name].edit, name
            assert reply.tokens == wanted[name].tokens, name
        for reply in replies[len(texts) :]:
            assert (reply.memoir["result"], reply.memoir["edit"]) == ("image", None)
    assert [reply.tokens for reply in off] == [wanted[name].base for name in names]
    matched = [n for n, name in enumerate(names) if wanted[name].edit is not None]
    assert 2 < len(matched) < len(names)
    assert all(wanted[names[n]].tokens != wanted[names[n]].base for n in matched)
    stats = engine.settled()
    assert stats["routed"] + stats["recalled"] == 2 * len(texts)

    untouched = [n for n in range(len(prompts)) if n not in matched]
    alone = start(**flags(model, block_size=32)).ask(prompts, pictures=pictures)
    assert bits([cold[n] for n in untouched]) == bits([alone[n] for n in untouched])
    assert [warm[n].tokens for n in untouched] == [alone[n].tokens for n in untouched]
    _, first, second, _ = alone[len(texts) :]
    assert first.logprobs != second.logprobs, "a picture is seen"


class Alone(NamedTuple):
    """Stands for a reference, which takes text alone: what an engine without the plugin answers to one request."""

    reply: Reply

    def predict(self, prompts: list[list[int]], targets: list[list[int]], *, edited: bool) -> list[SimpleNamespace]:
        (target,) = targets
        n = len(target)
        return [SimpleNamespace(tokens=self.reply.tokens[:n], logprobs=self.reply.logprobs[:n], edit=None)]


def test_any_mix_of_text_and_images(served: Served, start: Callable[..., Engine]) -> None:
    model, store, wanted = served
    few = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 16, "num_gpu_blocks_override": 48}
    questions = [wanted["edit 0"].ids, wanted["chat edit"].ids, []]
    seen = [([IMAGE_BEGIN, *ids], picture(seed)) for seed, ids in enumerate(questions)]
    plain = start(**flags(model, **few))
    alone = [plain.ask([ids], pictures=[image])[0] for ids, image in seen]
    plain.close()
    others = [
        Other(Alone(reply), edited=False, seen={"prompt_token_ids": ids, "multi_modal_data": {"image": image}})
        for reply, (ids, image) in zip(alone, seen, strict=True)
    ]
    reference = EditedModel.open(store, str(model))
    engine = start(**flags(model, store, **few))
    how = {"requests": 60, "lengths": (1, 3, NEW_TOKENS), "others": others}
    assert any_mix(2, engine, reference, prompts_of(reference), **how) > 5, "the mix holds edits"
