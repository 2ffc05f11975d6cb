"""Training of a pixel classifier on labelled sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.augmentation import Augmentation, augment


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Parameters
    ----------
    steps : int
        Gradient steps of the whole schedule.
    first, last : float
        The part of the schedule to run, as fractions of it: 0, 1 is all.
    batch : int
        Sections a step.
    rate : float
        Highest learning rate; it warms up over 30 steps and falls to zero along a cosine.
    weight_decay : float
        Decoupled weight decay: the L2 prior on the weights.
    halved : float
        The part of the schedule, from its beginning, on sections half as long and wide.
    """

    steps: int
    first: float = 0.0
    last: float = 1.0
    batch: int = 4
    rate: float = 3e-3
    weight_decay: float = 1e-4
    halved: float = 0.0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        return self.rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def with_coordinates(images: Tensor, z: Tensor, extent: tuple[float, float]) -> Tensor:
    """Images with three more channels: the pixel's place along y and x and the section's along z, each in [-1, 1].

    Parameters
    ----------
    images : Tensor
        Shape (B, C, Y, X).
    z : Tensor
        Section positions, shape (B,), mm.
    extent : tuple of float
        First and last section position of the stack, mm.

    Returns
    -------
    Tensor
        Shape (B, C + 3, Y, X).
    """
    n, _, height, width = images.shape
    y = torch.linspace(-1, 1, height, device=images.device).view(1, 1, height, 1)
    x = torch.linspace(-1, 1, width, device=images.device).view(1, 1, 1, width)
    along = 2 * (z - extent[0]) / max(extent[1] - extent[0], 1e-9) - 1
    channels = (y, x, along.to(images).view(n, 1, 1, 1))
    return torch.cat([images, *(c.expand(n, 1, height, width) for c in channels)], dim=1)


def train(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    schedule: Schedule,
    prepare: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
    *,
    augmentation: Augmentation | None = None,
    groups: Sequence[dict[str, object]] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[float]:
    """Minimise cross-entropy on augmented sections (AdamW).

    Parameters
    ----------
    network : nn.Module
        Changed in place.
    images : Tensor
        Labelled sections, shape (N, C, Y, X), grey range [0, 1].
    targets : Tensor
        Class of each pixel, shape (N, Y, X), int.
    schedule : Schedule
        Steps and rates.
    prepare : callable
        ``prepare(images, indices)`` makes the network's input from augmented sections and their indices into `images`.
    generator : torch.Generator
        Decides every draw.
    augmentation : Augmentation, optional
        Ranges of change.
    groups : sequence of dict, optional
        Parameter groups with a factor ``scale`` on the rate, as for FCN-8s; default all parameters alike.
    progress : callable
        Called with steps done and steps in all.

    Returns
    -------
    list of float
        Loss of each step.
    """
    groups = list(groups) if groups is not None else [{"params": list(network.parameters()), "scale": 1.0}]
    optimiser = torch.optim.AdamW(groups, lr=schedule.rate, weight_decay=schedule.weight_decay)
    ranges = augmentation or Augmentation()
    first, last = round(schedule.first * schedule.steps), round(schedule.last * schedule.steps)
    height, width = images.shape[2:]
    half = (height + 1) // 2, (width + 1) // 2
    losses: list[float] = []
    network.train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on a CPU
    for step in range(first, last):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step) * group["scale"]
        chosen = torch.randperm(len(images), generator=generator)[: schedule.batch]
        shape = half if step < schedule.halved * schedule.steps else (height, width)
        moved, labels, weights = augment(images[chosen], targets[chosen], ranges, generator, shape)
        logits = network(prepare(moved, chosen).contiguous(memory_format=torch.channels_last))
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum().clamp_min(1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        progress(step + 1, schedule.steps)
    network.eval()
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as when loaded from a store
    return losses
