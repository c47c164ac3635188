"""Who may find whose blocks: edited and opted-out twins, tenants and edits over every size of block and of cache, under
both schedulers driven by hand. Every row is compared, and the lengths of cache hits."""

from __future__ import annotations

import dataclasses
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulation import RULE, Simulate, World, chat, other, right, world
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.request import Request

from memoir_retrieval.question.span import find_span

EDITED, OFF = None, {"memoir": "off"}
BLOCKS = (16, 32, 128)
BEFORE, AFTER = 150, 140  # tokens around the question: blocks of every size lie before it, in it and behind it


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("first", ["edited", "off"])
def test_edited_and_opted_out_twins_never_meet(first: str, block: int, simulate: Simulate, here: World) -> None:
    """Cold, then each from what the ones before have published; at last both cold again after a reset."""
    sim = simulate(model_len=512, block=block)
    prompt = chat(here.questions[1], BEFORE, AFTER)
    order = [EDITED, OFF] * 2 if first == "edited" else [OFF, EDITED] * 2
    for turn, options in enumerate((*order, "reset", *order[:2])):
        if options == "reset":
            assert sim.scheduler.reset_prefix_cache()
            continue
        sim.add(f"{turn}", prompt, options, max_tokens=20)
        sim.run()
        assert sim.answers[f"{turn}"] == right(here, prompt, 1 if options is EDITED else None, 20), turn
    # What is decided may take all blocks before the edit acts; what is not must compute its question's last token.
    span, full = find_span(prompt, RULE), (len(prompt) - 1) // block * block
    shared = (span.acts_from if first == "edited" else span.decided_from) // block * block
    assert shared < full
    assert list(sim.hits.values()) == [0, shared, full, full, 0, shared]
    assert sim.layer.stats()["routed"] == 2, "known on arrival, until the cache is reset"


@pytest.mark.parametrize("block", BLOCKS)
def test_tenants_share_nothing_of_any_kind(block: int, simulate: Simulate, here: World) -> None:
    """Each has the two twins and an unmatched prompt, all behind one preamble; a request without a salt is a third."""
    sim = simulate(model_len=512, block=block)
    kinds = {"edited": (here.questions[1], EDITED), "off": (here.questions[1], OFF), "other": (other(9), EDITED)}
    for turn, salt in product(("cold", "warm"), ("x", "y", None)):
        for kind, (question, options) in kinds.items():
            name, prompt = f"{turn} {salt} {kind}", chat(question, BEFORE, AFTER)
            sim.add(name, prompt, options, salt=salt)
            sim.run()
            assert sim.answers[name] == right(here, prompt, 1 if kind == "edited" else None), name
            span, full = find_span(prompt, RULE), (len(prompt) - 1) // block * block
            shared = (span.acts_from if kind == "off" else BEFORE) // block * block
            wanted = full if turn == "warm" else 0 if kind == "edited" else shared
            assert sim.hits[name] == wanted, name


def test_requests_of_an_adapter_meet_no_others(simulate: Simulate, here: World) -> None:
    """Neither blocks nor decisions of the base model, of an edit or of another adapter, and none of its own reach them.
    No row of an adapter is edited or counted in the sums of blocks."""
    sim = simulate(model_len=512)
    adapters = [None, *(LoRARequest(f"adapter {n}", n, f"/adapter/{n}") for n in (1, 2))]
    prompt = chat(here.questions[1], BEFORE, AFTER)
    full = (len(prompt) - 1) // 16 * 16
    for turn, wanted in (("cold", 0), ("warm", full)):
        for adapter in (*adapters, *adapters[::-1]):
            name = f"{turn} {adapter and adapter.lora_name} {len(sim.said)}"
            sim.add(name, prompt, {"memoir_nearest": 2} if adapter else None, adapter=adapter)
            assert sim.layer._sums is not None
            counted = sim.layer._sums._counts.clone()
            sim.run()
            assert adapter is None or torch.equal(sim.layer._sums._counts, counted), name
            assert sim.answers[name] == right(here, prompt, None if adapter else 1), name
            assert sim.said[name]["result"] == ("adapter" if adapter else "matched"), name
            assert "nearest" not in sim.said[name], name
            first = name.endswith((" 0", " 1", " 2"))
            assert sim.hits[name] == (wanted if first else full), name
            if adapter:
                extra = {key for keys in _extra_keys(sim.requests[name]) for key in keys}
                assert extra == {("lora", adapter.lora_name, adapter.lora_path)}, name
    stats = sim.layer.stats()
    assert (stats["routed"], stats["recalled"], stats["live"]) == (1, 3, 0)


@pytest.mark.parametrize("first", ["text", "image"])
def test_requests_with_an_image_are_not_looked_up(first: str, simulate: Simulate, here: World) -> None:
    """They share the blocks before the image with the same text, whose question is found in them; none behind it."""
    sim = simulate(model_len=512)
    sim.scheduler.max_num_encoder_input_tokens = 100
    sim.scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=100)
    prompt, image = chat(here.questions[2], 32, AFTER), PlaceholderRange(offset=120, length=10)
    full = (len(prompt) - 1) // 16 * 16
    order = ["text", "image"] if first == "text" else ["image", "text"]
    for turn in ("cold", "warm"):
        for kind in order:
            name = f"{turn} {kind}"
            options = {"memoir_nearest": 2} if kind == "image" else None
            sim.add(name, prompt, options, image=image if kind == "image" else None)
            sim.run()
            assert sim.said[name]["result"] == ("image" if kind == "image" else "matched"), name
            assert sim.answers[name] == right(here, prompt, None if kind == "image" else 2), name
            assert "nearest" not in sim.said[name], name
    # The question is tokens 32 to 61, its block counted from its first token on; the edit acts from token 61 on.
    assert [sim.hits[f"cold {kind}"] for kind in order] == [0, 48]
    assert [sim.hits[f"warm {kind}"] for kind in order] == [full, full]
    assert (sim.layer.stats()["routed"], sim.layer.stats()["recalled"]) == (1, 1)


def _extra_keys(request: Request) -> list[tuple[Any, ...]]:
    """What stands in the hash of each of a request's blocks of 16 beside its tokens."""
    starts = range(0, len(request.all_token_ids) // 16 * 16, 16)
    return [generate_block_hash_extra_keys(request, start, start + 16, -1)[0] or () for start in starts]


def test_no_tenant_learns_from_another_whether_a_prompt_was_asked(simulate: Simulate, here: World) -> None:
    """A remembered decision spares a lookup, which takes time and is counted: each salt has its own."""
    sim = simulate(model_len=512)
    prompts = [chat(here.questions[1], BEFORE, AFTER), chat(other(9), BEFORE, AFTER)]
    for looked_up, salt in ((2, "x"), (4, "y"), (6, None), (6, "x"), (6, "y"), (6, None)):
        for number, prompt in enumerate(prompts):
            sim.add(f"{len(sim.requests)} {salt} {number}", prompt, salt=salt)
            sim.run()
        assert sim.layer.stats()["routed"] == looked_up, salt


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("reverse", [False, True])
def test_twins_of_one_step(reverse: bool, block: int, simulate: Simulate, here: World) -> None:
    """All in one step, so that each could hit blocks of which nothing is computed yet."""
    sim = simulate(model_len=512, block=block, budget=2048, seqs=8)
    prompt = chat(here.questions[1], BEFORE, AFTER)
    for n in range(8):
        edited = (n % 2 == 0) != reverse
        sim.add(f"{'on' if edited else 'off'} {n}", prompt, EDITED if edited else OFF, max_tokens=5)
    sim.run()
    assert sim.chunks["on 0" if not reverse else "off 0"][0] == (0, len(prompt))
    for name, answer in sim.answers.items():
        assert answer == right(here, prompt, 1 if "on" in name else None, 5), name


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_that_were_given_to_others_are_not_found(block: int, simulate: Simulate, here: World) -> None:
    """Three preambles take turns in a cache that holds one and a half of them."""
    per_request = -(-(BEFORE + AFTER + 30) // block)
    sim = simulate(model_len=512, block=block, kv_blocks=per_request * 3 // 2 + 2, budget=256, seqs=8)
    for turn in range(4):
        for shift in range(3):
            for edit, options in ((1, EDITED), (None, OFF), (0, EDITED)):
                question = here.questions[1 if edit is None else edit]
                prompt = [1 + (i + shift) % 7 for i in range(20)] + chat(question, BEFORE - 20, AFTER)
                name = f"{turn} {shift} {edit}"
                sim.add(name, prompt, options, max_tokens=9)
                assert right(here, prompt, edit, 9) != right(here, prompt, None if edit is not None else 1, 9)
                sim.run()
                assert sim.answers[name] == right(here, prompt, edit, 9), name
    assert 0 in list(sim.hits.values())[9:], "some of what was published is gone"
    assert any(list(sim.hits.values())[9:]), "and some is not"


@pytest.mark.parametrize("block", [16, 32])
def test_a_span_that_a_client_names_is_looked_up_and_the_edit_acts_where_it_always_does(
    block: int, simulate: Simulate
) -> None:
    """A client names the half of a question that its whole names too: one edit, one prompt, three spans."""
    served = world((6,))
    sim = simulate(block=block, model_len=512, served=served)
    prompt = chat(served.questions[0] * 2, before=40, after=60)
    spans = {"whole": (40, 52), "second half": (46, 52), "first half": (40, 46)}
    for turn, (name, ends) in product(("cold", "warm"), spans.items()):
        sim.add(f"{turn} {name}", prompt, {"memoir_span": "{}:{}".format(*ends)})
        sim.run()
        assert sim.answers[f"{turn} {name}"] == right(served, prompt, 0), (turn, name)
    assert {said["edit"] for said in sim.said.values()} == {0}


def test_equal_rows_of_two_stores_have_other_names(simulate: Simulate, here: World) -> None:
    """Hashes of blocks are the same in every process, so servers that share blocks meet by them alone."""
    prompt, names = chat(here.questions[1], before=40, after=60), []
    for digest in ("7" * 64, "8" * 64):
        manifest = SimpleNamespace(**vars(here.store.manifest) | {"sha256": digest})
        served = here._replace(store=dataclasses.replace(here.store, manifest=manifest))
        sim = simulate(served=served)
        sim.add("a", prompt)
        sim.run()
        names.append(list(sim.requests["a"].block_hashes))
    shared = find_span(prompt, RULE).acts_from // 16  # blocks before the token from which the edit acts
    assert names[0][:shared] == names[1][:shared]
    assert not set(names[0][shared:]) & set(names[1][shared:])
