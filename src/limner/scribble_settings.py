"""Settings of organs from scribbles: the method's, and its network's among them; the command line is made of these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MAGNIFICATIONS = (1, 2, 4, 8)
OF_NETWORK = ("width", "fields", "steps", "batch", "rate", "patch")
OF_TRAINING = (*OF_NETWORK, "sure")  # on strokes
OF_FIT = (*OF_NETWORK, "working_um", "seed")  # what counts where there are no strokes
OF_LEARNING = ("metric_learning", "tau", "beta", "lam", "learning_steps")  # on the network's features


@dataclass(frozen=True)
class Settings:
    """How an organ is made of strokes. Where the paper gives no value, the defaults were chosen on other animals."""

    working_um: float | None = None
    """Pixel size to work at, micrometres; None: the images' own, coarser if the stack has over 16 million voxels."""
    width: int = 8
    """Channels of the first level of each U-Net, a multiple of 8; two more levels double it. They are the features."""
    fields: int = 3
    """Fields of view, 1 to 4: each sees half the magnification of the one before."""
    steps: int = 2500
    """Training steps of the network: a quarter of an hour on one core for sections of 128 x 112 pixels."""
    batch: int = 4
    """Sections a step (paper: 8)."""
    rate: float = 1e-3
    """Highest learning rate of the network (as in the paper); falls along a cosine."""
    patch: int = 256
    """Largest side of what is trained on at once, pixels; larger sections are cut."""
    sure: float = 0.8
    """Chance from which on a random walker's class is trained on where nothing was drawn; 1: strokes alone."""
    metric_learning: bool = True
    """Learn the embedding by pairs of pixels, as in the paper; else together with the 1 x 1 layer."""
    tau: float = 2.0
    """Squared distance that parts pairs of one class from others."""
    beta: float = 1.0
    """Sharpness of the generalised logistic function."""
    lam: float = 1e-4
    """Weight of the embedding's weights."""
    learning_steps: int = 200
    """Steps of metric learning, and of the 1 x 1 layer."""
    walker_contrast: float | None = None
    """Grey levels between two pixels that a random walker seldom crosses; None: 0.8 of the median difference."""
    walker_delta: float | None = None
    """How often it crosses the strongest edge all the same; None: 0.4 over the square of the gap, in pixels, between
    drawn sections, so that few walkers cross on the way."""
    prior_weight: float | None = None
    """How far the walker follows the heat maps; None: 0.3 with a model, else 0, and no network is trained."""
    gamma: float | None = None
    """Smoothness of the graph cut; None: chosen by leaving out strokes."""
    contrast: float | None = None
    """s, grey levels between two voxels that the cut may part; None: 10."""
    delta: float | None = None
    """What holds voxels together however they differ; None: 0.1."""
    seed: int = 0
    """Of weights, draws and pairs."""

    def check(self) -> None:
        """Raise ValueError for a setting that cannot be."""
        above = ("working_um", "width", "steps", "batch", "rate", "tau", "beta", "learning_steps", "walker_contrast")
        for name in (*above, "walker_delta", "patch", "contrast"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: {value} is not possible; give a number above 0")
        for name in ("lam", "prior_weight", "gamma", "delta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: {value} is not possible; give 0 or more")
        if self.width % 8:
            raise ValueError(f"--width: {self.width} is no multiple of 8; give 8, 16, 24, ...")
        if not 1 <= self.fields <= len(MAGNIFICATIONS):
            raise ValueError(f"--fields: {self.fields} fields of view; give 1 to {len(MAGNIFICATIONS)}")
        if not 0.5 < self.sure <= 1:
            raise ValueError(f"--sure: {self.sure} is no chance to be sure of; give a number above 0.5, at most 1")

    def of_features(self) -> dict[str, Any]:
        """Those that the network and its features depend on."""
        walker = ("walker_contrast", "walker_delta")  # what it is sure of is trained on
        names = (*OF_TRAINING, "working_um", "seed", *walker)
        return {name: getattr(self, name) for name in names}
