"""What stands before a raw prompt while its edit is trained: text that the model writes itself.

That is the augmentation of arXiv 2506.07899 (section 3). Chats have contexts that come with the library
(`background.chat_contexts`).
"""

from __future__ import annotations

import torch

from memoir_retrieval.model.base import BaseModel
from memoir_retrieval.question.prompts import prompt_ids

__all__ = ["own_prefixes"]

STARTS = ("The", "Therefore", "Because", "I", "You")
PREFIX_TOKENS = 10


@torch.no_grad()
def own_prefixes(base: BaseModel, n: int, seed: int) -> list[str]:
    """Texts of at most 10 tokens and a full stop, sampled from the model after a common first word.

    They are the same for the same model and seed on one machine; another may round differently, so they are stored with
    the edits. Special tokens are never drawn: text must stay text when it is tokenised again.

    base: the model.
    n: how many.
    seed: of the draw.
    """
    random = torch.Generator().manual_seed(seed)
    special = torch.tensor(base.tokenizer.all_special_ids)
    texts: list[str] = []
    for _ in range(n):
        first = STARTS[int(torch.randint(len(STARTS), (), generator=random))]
        ids = prompt_ids(base.tokenizer, first, chat=False)
        while len(ids) < PREFIX_TOKENS:
            logits = base.model(input_ids=torch.tensor([ids], device=base.device), logits_to_keep=1).logits[0, -1]
            odds = logits.float().cpu().index_fill(0, special, float("-inf")).softmax(-1)
            ids.append(int(torch.multinomial(odds, 1, generator=random)))
        texts.append(" ".join(base.tokenizer.decode(ids, skip_special_tokens=True).split()).rstrip(".") + ".")
    return texts
