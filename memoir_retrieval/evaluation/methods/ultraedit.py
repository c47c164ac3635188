"""UltraEdit: one ridge regression from inputs to scaled gradients, normalised over the life of the model.

Gu et al. 2025 (arXiv 2505.14679, section 3): inputs h and gradients v of the layer's outputs at the answer's tokens are
normalised by their running mean and deviation, v is scaled by -eta |h|^2, and the change solves the normal equations
(H H^T + I) X = H V^T, with the inputs themselves in H. As in the authors' code matrices of one shape have one mean and
deviation, in which the rows of all of them are counted before any is changed. Published configuration for Mistral-7B:
the second MLP matrices of layers 29 and 30 of 32, eta 1e-6, 100 edits at a time.

Deviations: eta is 1e-6 times 14,336 / D, since |h|^2 of a normalised input is the number of its entries, times 1000.
The change of an output does not depend on its size, so a rate fits one model: SmolLM2 is barely changed without the
1000, which did best of 10, 100 and 1000 on the first ten edits of ZsRE. Fewer than 100 edits are made at once. On
another model the layers are at the same part of the depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memoir_retrieval.edits.record import Edit
from memoir_retrieval.evaluation.methods.method import Method, scaled
from memoir_retrieval.evaluation.methods.rows import Rows
from memoir_retrieval.model.base import BaseModel

__all__ = ["RunningMoments", "UltraEdit", "ridge"]

LAYERS, ETA, WIDTH, FACTOR = (29, 30), 1e-6, 14336, 1000


class RunningMoments:
    """Mean and deviation of all rows so far."""

    def __init__(self, width: int, device: torch.device):
        """width: of a row.
        device: of the rows.
        """
        self.count, self.mean, self.squares = 0, torch.zeros(width, device=device), torch.zeros(width, device=device)

    def update(self, rows: torch.Tensor) -> None:
        """Count rows in.

        rows: [n, width].
        """
        n, mean = len(rows), rows.mean(0)
        shift, total = mean - self.mean, self.count + n
        self.squares = self.squares + ((rows - mean) ** 2).sum(0) + shift**2 * self.count * n / total
        self.mean, self.count = self.mean + shift * n / total, total

    def normalised(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows with mean 0 and deviation 1.

        rows: [n, width].
        """
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        return (rows - self.mean) / (deviation + torch.finfo(torch.float32).eps)


class UltraEdit(Method):
    """See the module.

    moments: of the rows of all layers whose matrices have one shape, by that shape (H, D).
    """

    name = "ultraedit"
    writes = True
    batch = 100

    def __init__(self, base: BaseModel, **options: Any):
        """base, options: see `Method`."""
        super().__init__(base, **options)
        self.layers = [base.at(layer) for layer in sorted({scaled(layer, base) for layer in LAYERS})]
        self.eta = FACTOR * ETA * WIDTH / base.d
        self.moments = {(at.h, at.d): RunningMoments(at.d + at.h, base.device) for at in self.layers}

    @property
    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {"layers": [at.layer for at in self.layers], "eta": self.eta, "batch": self.batch}

    def edit(self, edits: Sequence[Edit]) -> None:
        """See `Method`."""
        features = [self._features(edit) for edit in edits]
        layers = [(at, torch.cat(rows)) for at, rows in zip(self.layers, zip(*features, strict=True), strict=True)]
        for at, rows in layers:
            self.moments[at.h, at.d].update(rows)
        for at, rows in layers:
            inputs, gradients = self.moments[at.h, at.d].normalised(rows).split([at.d, at.h], dim=1)
            values = -self.eta * inputs.square().sum(1, keepdim=True) * gradients
            weight = self.weight(at)
            with torch.no_grad():
                weight.add_(ridge(rows[:, : at.d], values).T)

    def _features(self, edit: Edit) -> list[torch.Tensor]:
        """Inputs and gradients at the tokens from which the answer is predicted: [n, D + H] of each layer."""
        rows = Rows(self.layers[0], [self.ids(edit.prompt)], [self.answer_ids(edit)])
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def keep(_module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            output = output.requires_grad_() if not output.requires_grad else output
            inputs.append(args[0].detach())
            outputs.append(output)
            return output

        handles = [at.projection.register_forward_hook(keep) for at in self.layers]
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(rows.loss(), outputs)
        finally:
            for handle in handles:
                handle.remove()
        return [torch.cat([x[rows.wanted], g[rows.wanted]], dim=1) for x, g in zip(inputs, gradients, strict=True)]


def ridge(inputs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The X that minimises |H X - V|^2 + |X|^2: (H^T H + I) X = H^T V, [D, H].

    inputs: H, [n, D].
    values: V, [n, H].
    """
    gram = inputs.T @ inputs + torch.eye(inputs.shape[1], device=inputs.device)
    return torch.linalg.solve(gram, inputs.T @ values)
