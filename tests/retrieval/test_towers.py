"""Each layout of decoder is edited; experts behind attention, vision-language models in their text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from towers import LAYOUTS, MOE, TEXT, TOKENS, VISION, save, write

from memoir_retrieval import Edit, EditedModel, Editor, EditStore, Retriever, load_model
from memoir_retrieval.errors import ConfigError, ModelError
from memoir_retrieval.model.base import BaseModel, model_class
from memoir_retrieval.model.forward import frozen_past, frozen_run, run_from_block

EDIT = Edit(prompt="Who founded Aarhus?", target="Harald")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_lands_in_the_text_tower_and_is_answered(layout: str, tmp_path: Path) -> None:
    config, module = LAYOUTS[layout]
    save(config, tmp_path / "model")
    base = load_model(str(tmp_path / "model"))
    assert base.module == module and base.h == 128
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    with Editor(base, tmp_path / "store", chat=False, tau=0.8) as editor:
        assert len(editor.add([EDIT])) == 1, editor.outcome.failed
    edited = EditedModel(Retriever.open(tmp_path / "store"))  # loaded again, by what the store records
    assert edited.base.module == module
    (answer,) = edited.generate([EDIT.prompt], max_new_tokens=8)
    assert answer.edit == 0 and answer.text.strip() == EDIT.target and answer.tokens[-1] == 2
    prompt, other = edited.prompt_ids(EDIT.prompt), edited.prompt_ids("Is it raining in Oslo today?")
    on, off = (edited.generate([other], max_new_tokens=4, edited=on)[0] for on in (True, False))
    assert on.edit is None and on.tokens == off.tokens
    assert edited.generate([prompt], max_new_tokens=8, edited=False)[0].text.strip() != EDIT.target
    assert all(torch.equal(weight, before[name]) for name, weight in base.model.named_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_model_that_is_cut_at_the_edited_block_gives_its_own_logits(layout: str, tmp_path: Path) -> None:
    save(LAYOUTS[layout].config, tmp_path / "model")
    base = load_model(str(tmp_path / "model"))
    ids = torch.tensor([base.tokenizer("Who founded Aarhus, and when was it founded?").input_ids])
    whole = base.model(input_ids=ids, use_cache=False).logits
    hidden, _ = frozen_run(base, {"input_ids": ids, "use_cache": False})
    with run_from_block(base, hidden) as model:
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)
    past = frozen_past(base, [ids[0, :3].tolist(), ids[0, :5].tolist()])
    for place, n in enumerate((3, 5)):
        behind = base.model(**past.take([place]).inputs(ids[:, n:])).logits
        torch.testing.assert_close(behind, whole[:, n:], atol=1e-3, rtol=1e-3)


WINDOWED = {
    "gemma3": hf.Gemma3Config(text_config=TEXT | {"sliding_window": 24}, vision_config=VISION, **TOKENS),
    "mistral": hf.MistralConfig(**TEXT, sliding_window=24),
}


@pytest.mark.parametrize("layout", WINDOWED)
def test_an_answer_does_not_depend_on_its_batch_where_blocks_look_at_the_nearest_tokens(
    layout: str, tmp_path: Path
) -> None:
    """What all prompts begin with is run once, and padding would stand between it and a shorter row."""
    save(WINDOWED[layout], tmp_path / "model")
    base = load_model(str(tmp_path / "model"))
    assert base.window == 24
    with Editor(base, tmp_path / "store", tau=0.8) as editor:
        editor.compact()
    model = EditedModel(Retriever.open(tmp_path / "store"))
    system = {"role": "system", "content": "You sell garden chairs. Answer in one word, or in two."}
    questions = ["Who?", "Who founded Aarhus, and when was that, and what had stood there before the town was founded?"]
    prompts = [[system, {"role": "user", "content": text}] for text in questions]
    alone = [model.generate([prompt], max_new_tokens=8)[0].tokens for prompt in prompts]
    assert [answer.tokens for answer in model.generate(prompts, max_new_tokens=8)] == alone
    targets = [model.target_ids("In the north of the town")] * 2
    together, single = model.predict(prompts, targets), [model.predict([p], targets[:1])[0] for p in prompts]
    for both, apart in zip(together, single, strict=True):
        torch.testing.assert_close(torch.tensor(both.logprobs), torch.tensor(apart.logprobs), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_is_known(layout: str) -> None:
    model = model_class(LAYOUTS[layout].config).from_config(LAYOUTS[layout].config)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    window = BaseModel(model, None, Path(), layout, None, 0, "", model).window
    assert (window is not None) == (
        layout in ("mistral", "mistral3") or any(kind != "full_attention" for kind in kinds)
    )


def test_a_dense_model_is_edited_behind_attention_where_that_is_chosen(tmp_path: Path) -> None:
    save(hf.Qwen3Config(**TEXT | {"num_attention_heads": 8}), tmp_path / "model")
    assert load_model(str(tmp_path / "model")).module == "model.layers.1.mlp.down_proj"
    base = load_model(str(tmp_path / "model"), place="attention")
    assert (base.module, base.d) == ("model.layers.1.self_attn.o_proj", 256)
    assert base.at(0).module == "model.layers.0.self_attn.o_proj" and not base.block_adds
    with Editor(base, tmp_path / "store", chat=False, tau=0.8) as editor:
        assert len(editor.add([EDIT])) == 1, editor.outcome.failed
    assert EditStore.open(tmp_path / "store").manifest.place == "attention"
    edited = EditedModel(Retriever.open(tmp_path / "store"))
    assert edited.base.module == base.module
    assert edited.generate([EDIT.prompt], max_new_tokens=8)[0].text.strip() == EDIT.target
    with (
        pytest.raises(ConfigError, match="was made with place attention, not ffn"),
        Editor(load_model(str(tmp_path / "model"), place="ffn"), tmp_path / "store"),
    ):
        pass


def test_experts_are_not_picked_shared_ones_included(tmp_path: Path) -> None:
    save(LAYOUTS["deepseek-v3"].config, tmp_path / "model")
    dense = load_model(str(tmp_path / "model"), layer=0)
    assert dense.module == "model.layers.0.mlp.down_proj", "the first block has no experts"
    with pytest.raises(
        ModelError, match=r"place ffn cannot be edited in DeepseekV3ForCausalLM: .* choose place attention"
    ):
        load_model(str(tmp_path / "model"), layer=1, place="ffn")


NEXT: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 4} | {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
REFUSED = {
    "linear_attention": hf.Qwen3NextConfig(**MOE | NEXT, num_experts=4, shared_expert_intermediate_size=48),
    "share keys and values": hf.Gemma4Config(
        text_config=TEXT | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 0},
        vision_config=VISION,
        audio_config=None,
        **TOKENS,
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_blocks_that_cannot_be_run_alone_are_refused(why: str, tmp_path: Path) -> None:
    write(model_class(REFUSED[why]).from_config(REFUSED[why]), tmp_path / "model")
    with pytest.raises(ModelError, match=f"{why}.*this architecture cannot be edited"):
        load_model(str(tmp_path / "model"))
