"""The loop of every method that trains: steps of an optimiser on the loss of one edit, until they are enough."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Settled", "descend"]


class Settled:
    """Whether a loss is low and has stopped moving, the rule of the published code of WISE and of MEMOIR."""

    LOW, STILL = 0.02, 1e-4

    def __init__(self) -> None:
        """Begin with no loss seen."""
        self._last = float("inf")

    def __call__(self, loss: float) -> bool:
        """Whether this loss and the one before are low and close.

        loss: in nats, of the next step.
        """
        settled = loss <= self.LOW and abs(loss - self._last) <= self.STILL
        self._last = loss
        return settled


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    steps: int,
    enough: Callable[[float], bool] = lambda _: False,
    gradients: Callable[[], object] = lambda: None,
    weights: Callable[[], object] = lambda: None,
) -> None:
    """Train what an optimiser holds, and leave no gradient behind.

    optimizer: of the weights, which require gradients.
    loss: a scalar, from a pass of its own at each call.
    steps: at most.
    enough: whether a loss, in nats, is good enough. It is asked before each step.
    gradients: changes the gradients before each step.
    weights: changes the weights after each step, without gradients.
    """
    with torch.enable_grad():
        for _ in range(steps):
            value = loss()
            if enough(float(value.detach())):
                break
            optimizer.zero_grad()
            value.backward()
            gradients()
            optimizer.step()
            with torch.no_grad():
                weights()
    optimizer.zero_grad()
