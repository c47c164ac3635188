"""LoRA: low-rank changes of the attention's query and value projections, trained edit after edit.

Hu et al. 2021 (arXiv 2106.09685) in the form of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): W + P L Q with a
diagonal L that is zero at first (Eq. 3), and a loss that keeps P and Q orthogonal (Eq. 4, its weight .5). Published
configuration of EasyEdit for LLaMA-3: AdaLoRA of PEFT with alpha 32 and dropout .1, Adam with learning rate 5e-3, 70
steps. Ranks stay as they are at first, 12: EasyEdit never moves the budget, and AdaLoRA does not read its "rank: 8".

The rate belongs to that form. Plain LoRA with alpha over rank = 4 diverges at the first edit with it.

Deviations: dropout acts in training alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.errors import ConfigError, ModelError
from memoir_retrieval.evaluation.methods.descent import descend
from memoir_retrieval.evaluation.methods.method import SEED, Method
from memoir_retrieval.model.base import BaseModel

__all__ = ["Lora"]

NAMES = ("q_proj", "v_proj")
RANK, ALPHA, DROPOUT, ORTHOGONAL, RATE, STEPS = 12, 32, 0.1, 0.5, 5e-3, 70
IGNORED = -100  # a label of no token


class Lora(Method):
    """See the module."""

    name = "lora"

    @classmethod
    def check(cls, base: BaseModel) -> None:
        """See `Method`: the attention must have such projections.

        base: see there.
        """
        if find_spec("peft") is None:
            raise ConfigError("PEFT is not installed", cure="pip install 'memoir-retrieval[methods]'")
        if not any(name.rpartition(".")[2] in NAMES for name, _ in base.model.named_modules()):
            raise ModelError(
                f"{base.name} has no modules named {' or '.join(NAMES)}", cure="compare methods on another model"
            )

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        from peft import AdaLoraConfig, get_peft_model

        config = AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            orth_reg_weight=ORTHOGONAL,
            target_modules=list(NAMES),
            total_step=STEPS,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            torch.manual_seed(SEED)
            self.adapted = get_peft_model(base.model, config)
        self.weights = [weight for weight in self.adapted.parameters() if weight.requires_grad]
        self._dropout(False)

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        shape = {"modules": NAMES, "rank": RANK, "alpha": ALPHA, "dropout": DROPOUT, "orthogonal": ORTHOGONAL}
        return shape | {"rate": RATE, "steps": STEPS}

    @property
    def bytes(self) -> int:
        """See `Method`."""
        return 4 * sum(weight.numel() for weight in self.weights)

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=self.random)))
            self._dropout(True)
            for edit in edits:
                prompt, answer = self.ids(edit.prompt), self.answer_ids(edit)
                ids = torch.tensor([[*prompt, *answer]], device=self.base.device)
                with self.training():
                    descend(torch.optim.Adam(self.weights, lr=RATE), partial(self._loss, ids, len(answer)), STEPS)
            self._dropout(False)

    def _loss(self, ids: torch.Tensor, answer: int) -> torch.Tensor:
        """Of the last tokens, which are the answer, and that of Eq. 4. There are logits from the prompt's end on."""
        labels = ids[:, -1 - answer :].clone()
        labels[:, 0] = IGNORED
        kept = torch.arange(ids.shape[1] - 1 - answer, ids.shape[1], device=ids.device)
        loss: torch.Tensor = self.adapted(input_ids=ids, labels=labels, logits_to_keep=kept, use_cache=False).loss
        return loss

    def _dropout(self, on: bool) -> None:
        for name, module in self.adapted.named_modules():
            if ".lora_dropout." in name:
                module.train(on)

    def close(self) -> None:
        """See `Method`."""
        for weight in self.weights:
            weight.requires_grad_(False)
        self.adapted.unload()
        super().close()
