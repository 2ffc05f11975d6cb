"""What anatomy looks like, learned from label maps: the first half of Dalca, Guttag and Sabuncu 2018 [1]_.

A variational auto-encoder of label maps whose decoder is the prior, and the location prior that it starts from.
`limner.methods.anatomical_prior` explains scans by it, and says where this departs from the paper.

References
----------
.. [1] Dalca, Guttag, Sabuncu, "Anatomical priors in convolutional networks for unsupervised biomedical segmentation",
   CVPR 2018, https://doi.org/10.1109/CVPR.2018.00968
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from limner.augmentation import deform_volume
from limner.checkpoint import Checkpoint
from limner.label_merging import Merging
from limner.location_prior import label_frequencies
from limner.losses.variational import kl_loss, reconstruction_loss
from limner.networks.vae import Architecture, LabelMapVAE
from limner.registration.template import Template

AXES: dict[str, int | None] = {"z": 0, "y": 1, "x": 2, "none": None}
FIRST_LOG_VARIANCE = -20.0  # before the activation: codes begin with deviations of .2
KL_GROWS = 0.3  # share of the steps
SEEN = 0.9  # slices of which the location prior holds all for background this surely show nothing
OF_VOLUMES = 12  # a batch of slices by this is one of whole volumes
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How the prior is learned. Values of the paper are named; a default that differs says why."""

    slices: Literal["y", "z", "x", "none"] = "y"
    """Axis of the template across which slices with a code each are taken; y: coronal in a standard template (paper:
    slices, the plane is not said). none: one code for the whole volume, in 3D, for small data."""
    latent: int = 1000
    """Length of the code z (paper)."""
    width: int = 32
    """Features of each convolution (paper)."""
    levels: int = 5
    """Convolutions, each of which halves the size (paper)."""
    coarse: int = 1
    """Levels that the decoder leaves out at its end: its maps are interpolated from half the size (paper: 0)."""
    bends: bool = True
    """The decoder also bends the location prior, which few label maps teach sooner than scores alone (paper: no)."""
    steps: int = 1500
    """Gradient steps (paper: no value)."""
    batch: int = 24
    """Slices a step, from two label maps; of whole volumes a twelfth of it, two at least."""
    rate: float = 1e-3
    """Learning rate at first, of Adam; falls along a cosine to 0 (paper: no value)."""
    kl_from: float = 0.4
    """Share of the steps before the KL term counts; its weight grows to 1 within 0.3 more (paper: counts at once)."""
    elastic: float = 2.0
    """Standard deviation of the random displacements of label maps every 16 voxels of the template, in voxels."""
    stretch: float = 0.025
    """Standard deviation of each entry of the random linear map that is added to the identity."""
    smoothing: float = 0.75
    """Standard deviation of the Gaussian that smooths the location prior, voxels of the template (paper: no value)."""
    floor: float = 1e-4
    """Least frequency of a label in the location prior."""
    seed: int = 0
    """Seed of every random draw."""

    def check(self) -> None:
        """Raise ValueError for a setting that cannot be."""
        check_numbers(self, ("latent", "width", "levels", "steps", "batch", "rate", "floor"))
        if self.kl_from > 1 - KL_GROWS:
            raise ValueError(f"--kl-from: {self.kl_from} leaves no time for the KL term; give 0 to {1 - KL_GROWS:g}")
        if self.coarse >= self.levels:
            raise ValueError(f"--coarse: {self.coarse} leaves nothing of {self.levels} levels; give fewer")


@dataclass(frozen=True)
class BrainMap:
    """A label map on the template's grid.

    Parameters
    ----------
    classes : ndarray of int
        0 (background), 1, ..., shape (Z, Y, X).
    known : ndarray of bool
        What lay in its field of view, same shape.
    """

    classes: NDArray[np.integer[Any]]
    known: NDArray[np.bool_]


@dataclass(frozen=True)
class Prior:
    """What label maps taught.

    Parameters
    ----------
    network : LabelMapVAE
        In evaluation; its decoder is the prior.
    location : Tensor
        p_loc, shape (L, Z, Y, X), float32.
    template : Template
        Whose grid it lives on.
    merging : Merging
        Structures by class.
    settings : Settings
        It was learned with.
    """

    network: LabelMapVAE
    location: Tensor
    template: Template
    merging: Merging
    settings: Settings

    @property
    def log_location(self) -> Tensor:
        """log p_loc of every slice, shape (n, L, *size)."""
        return slices_of(self.location.log(), self.settings)


def slices_of(maps: Tensor, settings: Settings) -> Tensor:
    """Maps (..., Z, Y, X) as a batch of what has one code each: (n, ..., *size); of whole volumes n is 1."""
    axis = AXES[settings.slices]
    return maps[None] if axis is None else maps.movedim(axis - 3, 0)


def together(slices: Tensor, settings: Settings) -> Tensor:
    """Inverse of `slices_of`."""
    axis = AXES[settings.slices]
    return slices[0] if axis is None else slices.movedim(0, axis - 3)


def build(n_labels: int, shape: tuple[int, int, int], settings: Settings) -> LabelMapVAE:
    """The untrained auto-encoder for a template's grid: convolutions keep the variance, codes begin certain."""
    axis = AXES[settings.slices]
    size = tuple(n for i, n in enumerate(shape) if i != axis)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        a = Architecture(size, settings.latent, settings.width, settings.levels, coarse=settings.coarse)
        network = LabelMapVAE(n_labels, a, settings.bends)
        scores = network.decoder.scores
        for layer in (*network.encoder.convolutions, *scores.convolutions, scores.dense):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.xavier_normal_(network.encoder.mean.weight)
        nn.init.normal_(network.encoder.log_variance.weight, std=1e-3)
        nn.init.constant_(network.encoder.log_variance.bias, FIRST_LOG_VARIANCE)
    return network


def prior_loss(
    network: LabelMapVAE, classes: Tensor, weights: Tensor, log_location: Tensor, kl: float, generator: torch.Generator
) -> Tensor:
    """kl KL[q(z | s) || Normal(0, 1)] - sum_j log f_{j, s[j]}(z), nats a slice; Eq. 10 and 11 with kl = 1."""
    log_f, mean, log_variance = network(classes, log_location, generator, weights)
    return reconstruction_loss(log_f, classes, weights) + kl * kl_loss(mean, log_variance)


def fit(
    maps: Sequence[BrainMap],
    template: Template,
    merging: Merging,
    settings: Settings,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Prior, list[float]]:
    """Learn the prior from label maps.

    Parameters
    ----------
    maps : sequence of BrainMap
        On the template's grid.
    template : Template
        What they were aligned to.
    merging : Merging
        Structures by class.
    settings : Settings
        Network, schedule, augmentation.
    device : str
        Where to compute.
    progress : callable
        Called with steps done and steps in all.
    checkpoint : Checkpoint, optional
        Where to keep the state now and then, and to go on from the state that is there.

    Returns
    -------
    Prior
    list of float
        Loss of each step, nats a slice.

    Raises
    ------
    ValueError
        If there is no map, or the loss becomes no number.
    """
    n_labels, space = len(merging.names), template.space
    pairs = [(brain.classes, brain.known) for brain in maps]
    location = torch.from_numpy(
        label_frequencies(pairs, n_labels, space.spacing, settings.smoothing * space.spacing[0], settings.floor)
    )
    network = build(n_labels, space.shape, settings)
    prior = Prior(network, location, template, merging, settings)
    log_location = prior.log_location
    shown = torch.nonzero((log_location[:, 0] < math.log(SEEN)).flatten(1).any(dim=1))[:, 0]
    generator = torch.Generator().manual_seed(settings.seed)
    network.train().to(device)
    fast_on_cpu(network)
    optimiser = torch.optim.Adam(network.parameters(), settings.rate)
    losses = checkpoint.restore(network, optimiser, generator) if checkpoint else []
    for step in range(len(losses), settings.steps):
        classes, weights, at = _batch(maps, shown, settings, generator)
        set_rate(optimiser, settings.rate * min(1, (step + 1) / 30) * falling(step, settings.steps))
        kl = kl_weight(step, settings)
        inputs = (classes.to(device), weights.to(device), log_location[at].to(device))
        loss = prior_loss(network, *inputs, kl, generator)
        losses.append(descend(optimiser, loss, step))
        if checkpoint:
            checkpoint.keep(network, optimiser, generator, losses)
        progress(step + 1, settings.steps)
    network.eval()
    return prior, losses


def kl_weight(step: int, settings: Settings) -> float:
    """0 at first, 1 in the end, a line between: else the code is given up before the decoder has learned to use it."""
    return min(1.0, max(0.0, step / settings.steps - settings.kl_from) / KL_GROWS)


def _batch(
    maps: Sequence[BrainMap], shown: Tensor, settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of two deformed label maps: classes and weights (B, *size), and which slices they are, (B,)."""
    each = settings.batch // 2 if len(shown) > 1 else max(1, settings.batch // 2 // OF_VOLUMES)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in torch.randint(len(maps), (2,), generator=generator).tolist():
        both = torch.from_numpy(np.stack([maps[i].classes, maps[i].known]).astype(np.float32))
        classes, weights = deform_volume(both, settings.elastic, settings.stretch, generator)
        at = shown[torch.randint(len(shown), (max(1, each),), generator=generator)]
        parts.append((slices_of(classes.long(), settings)[at], slices_of(weights, settings)[at], at))
    classes, weights, at = (torch.cat(some) for some in zip(*parts, strict=True))
    return classes, weights, at


def check_numbers(settings: Any, above: Sequence[str]) -> None:
    """Raise ValueError where a number of a settings dataclass is below 0, or 0 though its name is in `above`."""
    for name, value in asdict(settings).items():
        least = "a number above 0" if name in above else "0 or more"
        if not isinstance(value, str) and not (0 <= value < math.inf and (value or name not in above)):
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not possible; give {least}")


def fast_on_cpu(network: nn.Module) -> None:
    """Channels last where convolutions are of two dimensions: 1.4 times as fast on a CPU."""
    if not any(isinstance(layer, nn.Conv3d) for layer in network.modules()):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def falling(step: int, steps: int) -> float:
    """What the rate is multiplied by: along a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Learning rate of all parameters from now on."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, step: int) -> float:
    """One gradient step; gives its loss, and raises ValueError where that is no number."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"fit(): the loss is {value} at step {step + 1}; give a lower rate (--rate)")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return value
