"""Complete a sparsely labelled stack of sections: label every n-th section, get them all.

For the anatomist who outlined some sections of a stack and wants the rest, with a picture of where not to trust it.
The method is that of Atzeni et al. 2018 [1]_: label fusion from registered labelled sections and a network that knows
what structures look like are two factors of one model, fitted by generalised EM.

=================  ==========================================================================================
equation           function
=================  ==========================================================================================
Eq. 1, objective   `objective`
Eq. 2, E-step      `e_step`
Eq. 3, M-step      `m_step` (with ``log p_d`` in the second sum, where the paper prints ``log p_f``)
Eq. 4, fusion      `Stack.evidence`, with `limner.label_fusion`
=================  ==========================================================================================

Departures, each a setting (what each gained stands in docs/benchmarks.md):

- Fusion blends signed distances along z, carried along registrations chained from section to section, over four
  labelled sections; their scale rho is fitted on left-out labelled sections. ``fusion='printed'`` is the paper's Eq. 4.
- The default network is a small U-Net on sections reduced to `network_pixels`, which also sees where a pixel lies. Local
  training and the M-step move its last layer only, on features computed once.
- The network's probabilities are divided by the frequency of each structure, so that only fusion carries the prior, and
  lambda is fitted on left-out sections: the paper's 2 suits a network as good as the fusion.

References
----------
.. [1] Atzeni, Jansche, et al. 2018, "A probabilistic model combining deep learning and multi-atlas segmentation for
   semi-automated labelling of histology", https://doi.org/10.1007/978-3-030-00934-2_25
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from limner.annotations import SectionLabels
from limner.augmentation import Augmentation, augment
from limner.calibration import best_scale, mean_log_loss
from limner.distances import signed_distances
from limner.intensity import to_8_bit
from limner.label_fusion import atlas_log_weights, blend, fuse, interpolation_weights
from limner.metrics.pixels import expected_calibration_error
from limner.networks.fcn_vgg import FCN8s, load_vgg16_weights
from limner.networks.unet import UNet
from limner.registration.section_warps import SectionWarps, register_sections
from limner.registration.velocity_field import Options, Start
from limner.registration.warp import covers, warp
from limner.run_record import Store, content_key
from limner.training import Schedule, train, with_coordinates
from limner.volume import LabelMap, Volume

Progress = Callable[[str, int, int], None]
PAPER_RHO = 21.0  # 1 / mm
TRAINING_SETTINGS = ("network", "vgg16_weights", "network_pixels", "epochs", "seed")  # what stage 1 depends on
WEIGHTS_TRIED = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)  # lambda; the paper's is the last


@dataclass(frozen=True)
class Settings:
    """What can be chosen. Values of the paper are named; a default that differs says why."""

    method: Literal["network", "fusion", "product", "gem"] = "gem"
    """Evidence used: the network alone, fusion alone, their product, or both in one model (generalised EM)."""
    registration: Literal["chained", "direct", "none"] = "chained"
    """Register section to section and follow the chain, or labelled sections directly (paper), or not at all."""
    start: Start = "affine"
    """What each registration seeks before it deforms."""
    stiffness: float = 10.0
    """Resistance of registration to deforming; 1 follows stronger local warps, and texture with them."""
    fusion: Literal["blended", "normalised", "printed"] = "blended"
    """Blend signed distances along z, or mix two atlases with each one's odds normalised, or as the paper's Eq. 4."""
    interpolation: Literal["linear", "catmull-rom"] = "catmull-rom"
    """How 'blended' fusion interpolates along z: two labelled sections or up to four."""
    rho: float = 0.0
    """LogOdds per mm of signed distance (paper: 21). 0: for 'blended' fitted on left-out sections, else 21."""
    sigma: float = 20.0
    """Standard deviation of 8-bit grey levels between atlas and section (paper: 20); not for 'blended'."""
    alpha: float = 1.0
    """Decay of an atlas's weight with distance, per mm (paper: 1); not for 'blended'."""
    clip_mm: float = 1.0
    """Signed distances beyond this are cut, mm. 1 measured better than 3 on the mouse stack."""
    network: Literal["unet", "fcn_vgg16"] = "unet"
    """A small U-Net, or the paper's FCN-8s on VGG-16 (too slow for whole stacks without a GPU)."""
    vgg16_weights: str = ""
    """File of VGG-16 weights with torchvision's names, for fcn_vgg16; empty: from scratch."""
    network_pixels: int = 136
    """Longer side of the sections as the network sees them, pixels; predictions are enlarged again."""
    epochs: int = 240
    """Global training: how often each labelled section is seen, on average."""
    local_steps: int = 60
    """Local training: gradient steps on the two neighbouring labelled sections."""
    trained_layers: Literal["last", "all"] = "last"
    """What local training and the M-step move: the last layer, or the whole network (paper)."""
    weight_of_network: float = 0.0
    """lambda, the power of p_d beside p_f (paper: 2). 0: fitted on left-out sections, and less where labels are near."""
    divide_by_frequency: bool = True
    """Divide p_d by how frequent each structure is, as fusion carries the prior already (paper: no)."""
    prior: float = 1e-4
    """L2 prior on the weights in local training and M-step."""
    iterations: int = 10
    """Most EM iterations."""
    m_steps: int = 15
    """Gradient steps in an M-step."""
    seed: int = 0
    """Seed of every random draw."""


@dataclass(frozen=True)
class SectionResult:
    """One completed section.

    Parameters
    ----------
    labels : ndarray of int32
        Shape (Y, X).
    uncertainty : ndarray of float32
        Calibrated chance that the label is wrong, shape (Y, X), in [0, 1].
    structures : ndarray of int
        The L labels that were possible here, shape (L,).
    probabilities : ndarray of float16 or None
        Calibrated, shape (L, Y, X), where asked for.
    objective : list of float
        Eq. 1 at the network's grid, first before GEM and then after each M-step; empty for other methods.
    entropy_before, entropy_after : float
        Mean entropy of w before and after GEM, nats, not calibrated.
    seconds : float
        Time taken.
    """

    labels: NDArray[np.int32]
    uncertainty: NDArray[np.float32]
    structures: NDArray[np.int64]
    probabilities: NDArray[np.float16] | None
    objective: list[float]
    entropy_before: float
    entropy_after: float
    seconds: float

    @property
    def iterations(self) -> int:
        """EM iterations done."""
        return max(len(self.objective) - 1, 0)


@dataclass(frozen=True)
class Completion:
    """A completed stack.

    Parameters
    ----------
    labels : LabelMap
        Every section; labelled ones exactly as given.
    uncertainty : ndarray of float32
        Calibrated chance of error, shape (Z, Y, X), in [0, 1]; 0 on labelled sections.
    sections : mapping of int to SectionResult
        The unlabelled sections.
    suggestions : tuple of int
        Up to three sections, not adjacent, that would help most if labelled next.
    seconds : mapping of str to float
        Time per stage.
    calibration : mapping of str to float
        ``rho_scale``, ``weight_per_mm``, ``temperature`` and, on left-out sections, the expected calibration error
        before and after (``ece_before``, ``ece_after``).
    notes : tuple of str
        What the user should know.
    """

    labels: LabelMap
    uncertainty: NDArray[np.float32]
    sections: Mapping[int, SectionResult]
    suggestions: tuple[int, ...]
    seconds: Mapping[str, float]
    calibration: Mapping[str, float]
    notes: tuple[str, ...]


# ---- label fusion: p_f ------------------------------------------------------------------------------------------


@dataclass
class Stack:
    """The sections, what is known of them, and the warps between them."""

    images: NDArray[np.float32]  # (Z, C, Y, X), 8-bit grey levels
    labels: NDArray[Any]  # (Z, Y, X)
    labelled: tuple[int, ...]
    positions: NDArray[np.float64]  # (Z,) mm
    spacing: tuple[float, float]  # (y, x) mm
    settings: Settings
    device: str
    warps: SectionWarps | None = None
    rho_scale: float = math.nan  # rho = rho_scale / spread, see `spread`

    def __post_init__(self) -> None:
        self.distances = lru_cache(maxsize=8)(self._distances)

    def _distances(self, z: int) -> tuple[list[int], Tensor]:
        """Structures on a labelled section and signed distances to them, (L, Y, X)."""
        structures = np.unique(self.labels[z]).tolist()
        found = signed_distances(self.labels[z], structures, self.spacing, self.settings.clip_mm)
        return structures, torch.from_numpy(found).to(self.device)

    def neighbours(self, z: int, left_out: int | None = None) -> list[int]:
        """The nearest labelled sections before and after `z`, or the one there is."""
        known = [a for a in self.labelled if a not in (left_out, z)]
        return [*[a for a in known if a < z][-1:], *[a for a in known if a > z][:1]]

    def atlases(self, z: int, left_out: int | None = None) -> list[tuple[int, float]]:
        """Labelled sections that speak for `z`, with their interpolation weights."""
        if self.settings.fusion != "blended":
            return [(a, 1.0) for a in self.neighbours(z, left_out)]
        known = [a for a in self.labelled if a not in (left_out, z)]
        kind = self.settings.interpolation
        chosen = interpolation_weights(self.positions[known].tolist(), float(self.positions[z]), kind)
        return [(known[i], w) for i, w in chosen]

    def spread(self, z: int, left_out: int | None = None) -> float:
        """How far a border may have wandered at `z`: that of a Brownian bridge between its neighbours, sqrt(mm)."""
        gaps = [abs(float(self.positions[a] - self.positions[z])) for a in self.neighbours(z, left_out)]
        return math.sqrt(math.prod(gaps) / sum(gaps) if len(gaps) == 2 else gaps[0])

    def structures(self, z: int, left_out: int | None = None) -> list[int]:
        """Labels that occur on any atlas of `z`; background is one of them."""
        return sorted({0, *(s for a, _ in self.atlases(z, left_out) for s in self.distances(a)[0])})

    def blended_distances(self, z: int, left_out: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Warped distances (N, L, Y, X), their weights (N,) and where each atlas covers the section (N, Y, X)."""
        structures = self.structures(z, left_out)
        warped, covered = [], []
        for atlas, _ in self.atlases(z, left_out):
            present, known = self.distances(atlas)
            distances = known.new_full((len(structures), *known.shape[1:]), -self.settings.clip_mm)
            distances[[structures.index(s) for s in present]] = known
            displacement = self.displacement(z, atlas)
            warped.append(warp(distances[None], displacement, self.spacing)[0])
            covered.append(covers(displacement, self.spacing)[0, 0])
        weights = torch.tensor([w for _, w in self.atlases(z, left_out)], device=self.device)
        return torch.stack(warped), weights, torch.stack(covered)

    def displacement(self, z: int, atlas: int) -> Tensor:
        """From section `z` to a labelled section, (1, 2, Y, X), mm."""
        if self.warps is None:
            return torch.zeros(1, 2, *self.images.shape[2:], device=self.device)
        return self.warps.displacement(z, atlas).to(self.device)

    def evidence(self, z: int, left_out: int | None = None) -> Tensor:
        """log p_f of each of `structures` at each pixel of section `z`, (L, Y, X): Eq. 4 or its blended form."""
        distances, weights, covered = self.blended_distances(z, left_out)
        if self.settings.fusion == "blended":
            rho = self.settings.rho or (self.rho_scale / self.spread(z, left_out))
            return blend(distances, weights, covered, rho)
        atlases = [a for a, _ in self.atlases(z, left_out)]
        images = [torch.from_numpy(self.images[a])[None].to(self.device) for a in atlases]
        moved = torch.cat(
            [warp(i, self.displacement(z, a), self.spacing) for i, a in zip(images, atlases, strict=True)]
        )
        gaps = torch.tensor([abs(self.positions[a] - self.positions[z]) for a in atlases], device=self.device)
        section = torch.from_numpy(self.images[z]).to(self.device)
        log_weights = atlas_log_weights(section, moved, gaps.float(), self.settings.sigma, self.settings.alpha)
        rho = self.settings.rho or PAPER_RHO
        return fuse(distances, log_weights, covered, rho, printed=self.settings.fusion == "printed")

    def truth(self, z: int, structures: Sequence[int]) -> Tensor:
        """The labels of a labelled section as indices into `structures`, (Y, X); -1 where the label is none of them."""
        table = np.full(int(self.labels[z].max()) + 1, -1, dtype=np.int64)
        for index, structure in enumerate(structures):
            if structure < len(table):
                table[structure] = index
        return torch.from_numpy(table[self.labels[z]]).to(self.device)

    def sample(self, z: int, structures: Sequence[int], most: int = 4000) -> tuple[Tensor, Tensor]:
        """Flat indices of pixels near structures of a labelled section, and their true class; for fitting scales."""
        truth = self.truth(z, structures).flatten()
        background = structures.index(0)
        present, known = self.distances(z)
        near = known[present.index(0)].flatten() < self.settings.clip_mm if 0 in present else truth >= 0
        usable = torch.nonzero((truth >= 0) & (near | (truth != background)))[:, 0]
        usable = usable[:: max(1, len(usable) // most)]
        return usable, truth[usable]

    def fit_rho(self) -> float:
        """rho_scale with the lowest log loss on every labelled section, left out in turn; the paper's rho if none can."""
        samples = []
        for z in self.labelled if len(self.labelled) > 1 else ():
            distances, weights, covered = self.blended_distances(z, left_out=z)
            pixels, truth = self.sample(z, self.structures(z, left_out=z))
            flat = distances.flatten(2)[:, :, pixels], weights, covered.flatten(1)[:, pixels]
            samples.append((*flat, truth, self.spread(z, left_out=z)))
        if not any(len(s[3]) for s in samples):
            return PAPER_RHO * self.spread(next(z for z in range(len(self.images)) if z not in self.labelled))

        def loss(scale: float) -> float:
            losses = [
                mean_log_loss(blend(d[..., None], w, c[..., None], scale / s)[..., 0], t)
                for d, w, c, t, s in samples
                if len(t)
            ]
            return sum(losses) / len(losses)

        return best_scale(loss, 0.1, 100.0)


# ---- the network: p_d -------------------------------------------------------------------------------------------


@dataclass
class Classifier:
    """A network and what it needs to see a section: `inputs` are fixed, `top` is what later training moves."""

    network: nn.Module
    images: Tensor  # (Z, C, y, x), reduced, in [0, 1]
    labels: NDArray[Any]  # (Z, y, x), reduced
    positions: Tensor  # (Z,) mm
    classes: list[int]  # what the network's outputs stand for
    settings: Settings

    @property
    def places(self) -> bool:
        """Whether the network sees coordinates."""
        return isinstance(self.network, UNet)

    def input(self, images: Tensor, indices: Sequence[int] | Tensor) -> Tensor:
        """What the network takes for sections `indices`, whose (perhaps changed) pixels are `images`."""
        if not self.places:
            return images
        z = self.positions[torch.as_tensor(indices)]
        return with_coordinates(images, z, (float(self.positions[0]), float(self.positions[-1])))

    def fixed(self, images: Tensor, indices: Sequence[int] | Tensor) -> Tensor:
        """The part that is computed once: features before the last layer, or the network's input."""
        with torch.no_grad():
            x = self.input(images, indices)
            return self.network.features(x) if self._only_last else x  # type: ignore[operator]

    @property
    def _only_last(self) -> bool:
        return isinstance(self.network, UNet) and self.settings.trained_layers == "last"

    def top(self, structures: Sequence[int], generator: torch.Generator) -> nn.Module:
        """A copy of what later training moves, with one output for each of `structures`."""
        top = copy.deepcopy(self.network.head if self._only_last else self.network)
        known = [self.classes.index(s) for s in structures] if set(structures) <= set(self.classes) else None
        if isinstance(top, FCN8s):
            top.replace_head(len(structures))
            return top.eval()
        head = top if isinstance(top, nn.Conv2d) else top.head
        assert isinstance(head, nn.Conv2d)
        new = nn.Conv2d(head.in_channels, len(structures), 1).to(head.weight.device)
        with torch.no_grad():
            if known is None:
                new.weight.copy_(torch.randn(new.weight.shape, generator=generator) * 0.1)
                new.bias.zero_()  # type: ignore[union-attr]
            else:
                new.weight.copy_(head.weight[known])
                new.bias.copy_(head.bias[known])  # type: ignore[union-attr, index]
        if isinstance(top, nn.Conv2d):
            return new.eval()
        top.head = new
        return top.eval()

    def targets(self, z: int, structures: Sequence[int]) -> Tensor:
        """Labels of a labelled section on the reduced grid as indices into `structures`; -1: none of them."""
        lookup = {s: i for i, s in enumerate(structures)}
        found = np.vectorize(lambda s: lookup.get(int(s), -1), otypes=[np.int64])(self.labels[z])
        return torch.from_numpy(found).to(self.images.device)


def network_log_probabilities(top: nn.Module, inputs: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """log p_d, (B, L, y, x), enlarged to `shape` where given."""
    logits = top(inputs)
    if shape is not None and shape != tuple(logits.shape[2:]):
        logits = F.interpolate(logits, size=shape, mode="bilinear", align_corners=False)
    return torch.log_softmax(logits, dim=1)


def make_classifier(stack: Stack, tissues: Mapping[int, int] | None) -> Classifier:
    """A fresh network with the reduced sections it will see."""
    settings, shape = stack.settings, stack.images.shape[2:]
    shrink = max(1.0, max(shape) / settings.network_pixels)
    level = (max(1, round(shape[0] / shrink)), max(1, round(shape[1] / shrink)))
    images = torch.from_numpy(stack.images)
    reduced = F.interpolate(images, size=level, mode="bilinear", align_corners=False, antialias=True) / 255
    at = [((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(level, shape, strict=True)]
    labels = stack.labels[:, at[0]][:, :, at[1]]
    seen = {0, *np.unique(stack.labels[list(stack.labelled)]).tolist()}
    classes = sorted({tissues.get(s, 0) for s in seen} if tissues else seen)
    torch.manual_seed(settings.seed)
    network: nn.Module
    if settings.network == "unet":
        network = UNet(len(classes), images.shape[1] + 3, widths=(16, 32, 64, 128))
    else:
        network = FCN8s(len(classes))
        if settings.vgg16_weights:
            from pathlib import Path

            load_vgg16_weights(network, Path(settings.vgg16_weights))
    positions = torch.from_numpy(stack.positions).float()
    return Classifier(
        network.to(stack.device), reduced.to(stack.device), labels, positions, classes if not tissues else [], settings
    )


def train_globally(
    classifier: Classifier,
    labelled: Sequence[int],
    part: tuple[float, float],
    n_labelled: int,
    tissues: Mapping[int, int] | None,
    progress: Callable[[int, int], None],
) -> None:
    """Stage 1: a part of the schedule, on all labelled sections; tissue types where an ontology gives them."""
    settings = classifier.settings
    classes = classifier.classes or sorted({0, *(tissues or {}).values()})
    lookup = np.vectorize(lambda s: classes.index((tissues or {}).get(int(s), 0 if tissues else int(s))))
    labels = classifier.labels[list(labelled)]
    values, inverse = np.unique(labels, return_inverse=True)
    targets = torch.from_numpy(lookup(values)[inverse].reshape(labels.shape)).long()
    batch = min(4, len(labelled))
    steps = max(1, round(settings.epochs * n_labelled / 4))
    fcn = isinstance(classifier.network, FCN8s)
    schedule = Schedule(steps, *part, batch=batch, rate=1e-4 if fcn else 3e-3)
    groups = None
    if isinstance(classifier.network, FCN8s):
        first, last = classifier.network.parameter_groups(schedule.rate)
        groups = [{"params": first["params"], "scale": 1.0}, {"params": last["params"], "scale": 20.0}]
    index = torch.tensor(list(labelled))
    train(
        classifier.network,
        classifier.images[index],
        targets.to(classifier.images.device),
        schedule,
        lambda images, chosen: classifier.input(images, index[chosen]),
        torch.Generator().manual_seed(settings.seed + round(1000 * part[0])),
        groups=groups,
        progress=progress,
    )


# ---- one model: generalised EM ----------------------------------------------------------------------------------


def e_step(log_pd: Tensor, log_pf: Tensor, weight: float) -> Tensor:
    """Eq. 2: log w, with w_l proportional to p_d^lambda p_f and normalised over structures; shapes (L, Y, X)."""
    return torch.log_softmax(weight * log_pd + log_pf, dim=0)


def log_prior(top: nn.Module, prior: float) -> Tensor:
    """log p(theta), up to a constant."""
    return -prior * sum((p.square().sum() for p in top.parameters()), torch.zeros(()).to(next(top.parameters())))


def atlas_log_likelihood(top: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over atlases and pixels of log p_d(L_n); pixels with target -1 do not count."""
    return -F.cross_entropy(top(inputs), targets, ignore_index=-1, reduction="sum")


def objective(top: nn.Module, data: SectionData, weight: float, prior: float) -> float:
    """Eq. 1: log p(theta) + lambda sum log p_d(L_n) + sum log sum p_d^lambda p_f."""
    with torch.no_grad():
        atlases = atlas_log_likelihood(top, data.atlas_inputs, data.atlas_targets)
        log_pd = network_log_probabilities(top, data.inputs)[0]
        section = torch.logsumexp(weight * log_pd + data.log_pf, dim=0).sum()
        return float(log_prior(top, prior) + weight * atlases + section)


def bound(top: nn.Module, data: SectionData, w: Tensor, weight: float, prior: float) -> Tensor:
    """Eq. 3: what the M-step ascends, sum log p_d(L_n) + sum w log p_d + log p(theta) / lambda."""
    atlases = atlas_log_likelihood(top, data.atlas_inputs, data.atlas_targets)
    section = (w * network_log_probabilities(top, data.inputs)[0]).sum()
    return atlases + section + log_prior(top, prior) / weight


def m_step(top: nn.Module, data: SectionData, w: Tensor, weight: float, settings: Settings, rate: float) -> None:
    """Ascend Eq. 3 by a few Adam steps; `top` is changed in place."""
    optimiser = torch.optim.Adam(top.parameters(), lr=rate)
    for _ in range(settings.m_steps):
        optimiser.zero_grad()
        (-bound(top, data, w, weight, settings.prior)).backward()
        optimiser.step()


@dataclass(frozen=True)
class SectionData:
    """What GEM needs of one section, at the network's grid."""

    inputs: Tensor  # (1, C, y, x)
    log_pf: Tensor  # (L, y, x), less lambda log frequency
    atlas_inputs: Tensor  # (N, C, y, x)
    atlas_targets: Tensor  # (N, y, x)


def train_locally(top: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings) -> None:
    """Stage 2: on the neighbouring labelled sections and augmented copies of them."""
    optimiser = torch.optim.Adam(top.parameters(), lr=1e-2 if settings.trained_layers == "last" else 1e-4)
    for _ in range(settings.local_steps):
        optimiser.zero_grad()
        (-(atlas_log_likelihood(top, inputs, targets) / targets.numel() + log_prior(top, settings.prior))).backward()
        optimiser.step()


def gem(top: nn.Module, data: SectionData, weight: float, settings: Settings) -> list[float]:
    """Alternate E and M; the objective before and after each iteration never falls. Stops when it stalls."""
    history = [objective(top, data, weight, settings.prior)]
    rate = 1e-2 if settings.trained_layers == "last" else 1e-4
    log_w = e_step(network_log_probabilities(top, data.inputs)[0].detach(), data.log_pf, weight)
    for _ in range(settings.iterations):
        before = copy.deepcopy(top.state_dict())
        m_step(top, data, log_w.exp(), weight, settings, rate)
        reached = objective(top, data, weight, settings.prior)
        if reached < history[-1]:
            top.load_state_dict(before)
            rate /= 4
            if rate < 1e-5:
                break
            continue
        history.append(reached)
        new = e_step(network_log_probabilities(top, data.inputs)[0].detach(), data.log_pf, weight)
        changed = (new.argmax(dim=0) != log_w.argmax(dim=0)).float().mean()
        log_w = new
        if changed < 1e-3 or reached - history[-2] < 1e-6 * abs(history[-2]):
            break
    return history


# ---- one section ------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Everything that is fitted once for the stack."""

    stack: Stack
    classifier: Classifier | None
    weight_per_mm: float = math.nan  # lambda grows with the variance of fusion's borders, spread**2
    temperature: float = 1.0
    notes: list[str] = field(default_factory=list)

    def log_w(self, z: int, left_out: int | None = None) -> tuple[Tensor, list[float], float]:
        """log w of a section at full size (L, Y, X), the objective's history, and mean entropy before GEM."""
        settings, stack = self.stack.settings, self.stack
        log_pf = stack.evidence(z, left_out) if settings.method != "network" else None
        if self.classifier is None:
            assert log_pf is not None
            return log_pf, [], entropy(log_pf)
        structures = stack.structures(z, left_out)
        generator = torch.Generator().manual_seed(settings.seed + 7919 * (z + 1))
        top, inputs, atlas_inputs, atlas_targets = self._locally_trained(z, left_out, structures, generator)
        shape = (stack.images.shape[2], stack.images.shape[3])

        def final() -> Tensor:
            with torch.no_grad():
                return network_log_probabilities(top, inputs, shape)[0]

        if log_pf is None:
            return final(), [], entropy(final())
        weight = self.weight(z, left_out)
        log_pf = log_pf - weight * self._log_frequency(z, left_out, structures)
        before = e_step(final(), log_pf, weight)
        if settings.method == "product":
            return before, [], entropy(before)
        probabilities = torch.softmax(log_pf, dim=0)[None]
        small = F.interpolate(probabilities, size=inputs.shape[2:], mode="bilinear", antialias=True)[0]
        n = len(self.stack.neighbours(z, left_out))
        data = SectionData(inputs, small.clamp_min(1e-12).log(), atlas_inputs[:n], atlas_targets[:n])
        history = gem(top, data, weight, settings)
        return e_step(final(), log_pf, weight), history, entropy(before)

    def weight(self, z: int, left_out: int | None = None) -> float:
        """lambda of a section: as set, else in proportion to how far fusion's borders may be off."""
        return self.stack.settings.weight_of_network or self.weight_per_mm * self.stack.spread(z, left_out) ** 2

    def _log_frequency(self, z: int, left_out: int | None, structures: Sequence[int]) -> Tensor:
        """log frequency of each structure on the neighbouring labelled sections, (L, 1, 1); 0 where not divided by."""
        if not self.stack.settings.divide_by_frequency:
            return torch.zeros(len(structures), 1, 1, device=self.stack.device)
        labels = self.stack.labels[self.stack.neighbours(z, left_out)]
        counts = torch.tensor([float((labels == s).sum()) + 1 for s in structures], device=self.stack.device)
        return (counts / counts.sum()).log()[:, None, None]

    def _locally_trained(
        self, z: int, left_out: int | None, structures: Sequence[int], generator: torch.Generator
    ) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """The network trained on the neighbours of `z`, with the fixed inputs of `z` and of the neighbours."""
        classifier = self.classifier
        assert classifier is not None
        atlases = self.stack.neighbours(z, left_out)
        images = classifier.images[atlases]
        targets = torch.stack([classifier.targets(a, structures) for a in atlases])
        inputs, labels = [classifier.fixed(images, atlases)], [targets]
        for _ in range(2):
            moved, changed, weights = augment(images, targets, Augmentation(), generator)
            inputs.append(classifier.fixed(moved, atlases))
            labels.append(torch.where(weights > 0, changed, -1))
        top = classifier.top(structures, generator)
        train_locally(top, torch.cat(inputs), torch.cat(labels), classifier.settings)
        return top, classifier.fixed(classifier.images[[z]], [z]), torch.cat(inputs), torch.cat(labels)

    def complete_section(self, z: int, keep_probabilities: bool) -> SectionResult:
        """All of one unlabelled section."""
        began = time.perf_counter()
        log_w, history, entropy_before = self.log_w(z)
        probabilities = torch.softmax(log_w / self.temperature, dim=0)
        confidence, best = probabilities.max(dim=0)
        structures = np.asarray(self.stack.structures(z), dtype=np.int64)
        return SectionResult(
            labels=structures[best.cpu().numpy()].astype(np.int32),
            uncertainty=(1 - confidence).clamp(0, 1).cpu().numpy(),
            structures=structures,
            probabilities=probabilities.half().cpu().numpy() if keep_probabilities else None,
            objective=history,
            entropy_before=entropy_before,
            entropy_after=entropy(log_w),
            seconds=time.perf_counter() - began,
        )


def entropy(log_probabilities: Tensor) -> float:
    """Mean entropy over pixels, nats; (L, Y, X)."""
    return float(-(log_probabilities.exp() * log_probabilities).sum(dim=0).mean())


# ---- fitting what is shared, then every section -----------------------------------------------------------------


def held_out_sections(labelled: Sequence[int]) -> tuple[int, ...]:
    """Labelled sections on which scales are fitted: every fourth, not the first or last, six at most."""
    inner = list(labelled)[1:-1]
    chosen = inner[1::4] or inner[:1]
    return tuple(chosen[:: math.ceil(len(chosen) / 6)]) if chosen else ()


def fit_weight(model: Model, held_out: Sequence[int]) -> float:
    """lambda per mm of `Stack.spread` squared: that with the most pixels right on sections left out of fusion and training.

    Accuracy, not log loss: the network's errors are alike over whole borders, so that log loss, which counts pixels as
    if independent, gives it several times too much weight.
    """
    stack, settings, samples = model.stack, model.stack.settings, []
    for z in held_out:
        structures = stack.structures(z, left_out=z)
        generator = torch.Generator().manual_seed(settings.seed + 7919 * (z + 1))
        top, inputs, _, _ = model._locally_trained(z, z, structures, generator)
        with torch.no_grad():
            shape = (stack.images.shape[2], stack.images.shape[3])
            log_pd = network_log_probabilities(top, inputs, shape)[0]
        log_pd = log_pd - model._log_frequency(z, z, structures)
        pixels, truth = stack.sample(z, structures, most=stack.labels[z].size)
        spread = stack.spread(z, z) ** 2
        samples.append((spread * log_pd.flatten(1)[:, pixels], stack.evidence(z, z).flatten(1)[:, pixels], truth))

    def right(weight: float) -> float:
        return sum(float((e_step(d, f, weight).argmax(dim=0) == t).float().mean()) for d, f, t in samples if len(t))

    typical = sum(stack.spread(z, z) ** 2 for z in held_out) / len(held_out)
    return max((power / typical for power in WEIGHTS_TRIED), key=right)


def fit_temperature(model: Model, held_out: Sequence[int]) -> dict[str, float]:
    """Temperature of the final log w on left-out sections, and the calibration error before and after."""
    losses, scores = [], []
    for z in held_out:
        log_w = model.log_w(z, left_out=z)[0]
        pixels, truth = model.stack.sample(z, model.stack.structures(z, left_out=z))
        losses.append((log_w.flatten(1)[:, pixels], truth))
    temperature = best_scale(
        lambda t: sum(mean_log_loss(torch.log_softmax(w / t, dim=0), truth) for w, truth in losses if len(truth)),
        0.05,
        50.0,
    )
    for t in (1.0, temperature):
        shown = [torch.softmax(w / t, dim=0).max(dim=0) for w, _ in losses]
        confidence = torch.cat([s.values for s in shown]).cpu().numpy()
        correct = torch.cat([s.indices == truth for s, (_, truth) in zip(shown, losses, strict=True)]).cpu().numpy()
        scores.append(float(expected_calibration_error(confidence, correct)))
    return {"temperature": temperature, "ece_before": scores[0], "ece_after": scores[1]}


def suggest_sections(
    uncertainty: NDArray[np.float32], labels: NDArray[Any], labelled: Iterable[int]
) -> tuple[int, ...]:
    """Up to three sections with the highest mean uncertainty inside their structures, no two of them adjacent.

    Parameters
    ----------
    uncertainty, labels : ndarray
        Shape (Z, Y, X).
    labelled : iterable of int
        Never suggested.
    """
    inside = labels > 0
    mean = (uncertainty * inside).sum(axis=(1, 2)) / np.maximum(inside.sum(axis=(1, 2)), 1)
    known, chosen = set(labelled), list[int]()
    for z in np.argsort(-mean, kind="stable").tolist():
        if z not in known and mean[z] > 0 and all(abs(z - c) > 1 for c in chosen):
            chosen.append(z)
    return tuple(chosen[:3])


def complete(
    images: Volume,
    annotations: SectionLabels,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    jobs: int = 0,
    store: Store | None = None,
    progress: Progress | None = None,
    tissues: Mapping[int, int] | None = None,
    keep_probabilities: bool = False,
) -> Completion:
    """Label every section of a stack of which some are labelled.

    Parameters
    ----------
    images : Volume
        The sections, roughly aligned or not, grey or RGB.
    annotations : SectionLabels
        Labels of some sections, on the same grid.
    settings : Settings, optional
        Default: ``Settings()``.
    device : {'auto', 'cpu', 'cuda'}
        Where to compute; 'auto' takes a GPU if there is one.
    jobs : int
        Sections completed at the same time; 0: one per processor core (one on a GPU).
    store : Store, optional
        Where finished stages are kept; a second call with the same inputs goes on from there.
    progress : callable, optional
        Called with the name of a stage, how much of it is done, and how much there is.
    tissues : mapping of int to int, optional
        Tissue type of each structure, for the first stage of training.
    keep_probabilities : bool
        Keep class probabilities of every section.

    Returns
    -------
    Completion

    Raises
    ------
    ValueError
        If images and labels lie on different grids, or every labelled section is empty.
    """
    settings, report = settings or Settings(), progress or (lambda *_: None)
    _check(images, annotations)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    stack = _stack(images, annotations, settings, device)
    if not annotations.unlabelled:
        return _assemble(annotations, {}, {}, {}, ())
    seconds: dict[str, float] = {}
    with _timed(seconds, "registration"):
        stack.warps = _registered(stack, store, report)
    with _timed(seconds, "fit"):
        model, calibration, key = _fitted(stack, tissues, store, report)
    with _timed(seconds, "sections"):
        sections = _completed(model, annotations, key, jobs, store, report, keep_probabilities)
    return _assemble(annotations, sections, seconds, calibration, _notes(model, annotations))


def _check(images: Volume, annotations: SectionLabels) -> None:
    labels = annotations.label_map
    if images.space.shape != labels.space.shape:
        raise ValueError(
            f"complete(): labels have shape {labels.space.shape}, images {images.space.shape} (z, y, x); give both on "
            "one grid"
        )
    if not np.allclose(images.space.spacing, labels.space.spacing, rtol=1e-3):
        raise ValueError(
            f"complete(): labels have spacing {labels.space.spacing} mm, images {images.space.spacing} mm (z, y, x); "
            "resample one"
        )
    if not np.isfinite(images.pixels).all():
        raise ValueError("complete(): images hold NaN or infinity; replace them")


def _stack(images: Volume, annotations: SectionLabels, settings: Settings, device: str) -> Stack:
    levels = to_8_bit(images.pixels)
    channels = levels[:, None] if levels.ndim == 3 else np.moveaxis(levels, -1, 1)
    spacing = (images.space.spacing[1], images.space.spacing[2])
    labels = annotations.label_map.labels.astype(np.int32, copy=False)
    return Stack(
        np.ascontiguousarray(channels),
        labels,
        annotations.labelled,
        images.space.section_positions,
        spacing,
        settings,
        device,
    )


class _timed:
    """Adds the seconds that a block took to a mapping."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = time.perf_counter() - self.began


def _registered(stack: Stack, store: Store | None, report: Progress) -> SectionWarps | None:
    settings = stack.settings
    if settings.registration == "none":
        return None
    n = len(stack.images)
    pairs = [(z + 1, z) for z in range(n - 1)]
    if settings.registration == "direct":
        wanted = {(z, a) for z in range(n) for a, _ in stack.atlases(z, z) if a != z}
        pairs = sorted({(max(p), min(p)) for p in wanted})
    key = content_key(stack.images, stack.spacing, settings.start, settings.stiffness, pairs)
    if store is not None and (stored := store.load("registration", key)) is not None:
        return SectionWarps.from_arrays(stored)
    warps = register_sections(
        stack.images,
        pairs,
        stack.spacing,
        start=settings.start,
        options=Options(stiffness=settings.stiffness),
        device=stack.device,
        progress=lambda done, total: report("registration", done, total),
    )
    if store is not None:
        store.save("registration", key, warps.to_arrays())
    return warps


def _fitted(
    stack: Stack, tissues: Mapping[int, int] | None, store: Store | None, report: Progress
) -> tuple[Model, dict[str, float], str]:
    """Fit rho, train the network, fit lambda and the temperature; with the key that sections' results depend on.

    The network is trained without the held-out sections, the scales are fitted on these, then it is trained on all.
    """
    settings, model = stack.settings, Model(stack, None)
    calibration: dict[str, float] = {}
    if settings.fusion == "blended" and not settings.rho and settings.method != "network":
        stack.rho_scale = calibration["rho_scale"] = stack.fit_rho()
    held_out = held_out_sections(stack.labelled)
    labels = stack.labels[list(stack.labelled)]
    trained = {n: v for n, v in asdict(settings).items() if n in TRAINING_SETTINGS}
    key = content_key(stack.images, labels, stack.labelled, stack.positions, trained, tissues, stack.device)
    everything = content_key(key, asdict(settings), calibration)
    stages = (held_out, (0.0, 0.7)), ((), (0.7, 1.0))
    if settings.method == "fusion":
        calibration |= _scales(model, held_out, store, everything)
        # a section then depends on its own atlases alone, so that a correction redoes only its neighbours
        return model, calibration, content_key(stack.spacing, asdict(settings), calibration)
    classifier = model.classifier = make_classifier(stack, tissues)
    for i, (left_out, part) in enumerate(stages):
        stored = store.load(f"network-{i + 1}", key) if store is not None else None
        if stored is not None:
            classifier.network.load_state_dict({n: torch.from_numpy(np.asarray(a)) for n, a in stored.items()})
            classifier.network.eval()
        else:
            known = [z for z in stack.labelled if z not in left_out]
            train_globally(classifier, known, part, len(stack.labelled), tissues, lambda d, t: report("training", d, t))
            if store is not None:
                weights = classifier.network.state_dict()
                store.save(f"network-{i + 1}", key, {n: p.cpu().numpy() for n, p in weights.items()})
        if i == 0:
            calibration |= _scales(model, held_out, store, everything)
    return model, calibration, content_key(everything, calibration)


def _scales(model: Model, held_out: Sequence[int], store: Store | None, key: str) -> dict[str, float]:
    """Fit lambda and the temperature on the held-out sections, and set them."""
    settings = model.stack.settings
    fitted = store.load("calibration", key) if store is not None else None
    scales = {name: float(value) for name, value in fitted.items()} if fitted is not None else {}
    if not held_out:
        model.weight_per_mm = (
            0.1
            / model.stack.spread(next(z for z in range(len(model.stack.images)) if z not in model.stack.labelled)) ** 2
        )
        model.notes.append("Too few labelled sections to calibrate on; the uncertainty is not calibrated.")
        return {}
    if not scales and settings.method in ("product", "gem"):
        model.weight_per_mm = scales["weight_per_mm"] = (
            math.nan if settings.weight_of_network else fit_weight(model, held_out)
        )
    if fitted is None:
        scales |= fit_temperature(model, held_out)
        if store is not None:
            store.save("calibration", key, {name: np.asarray(value) for name, value in scales.items()})
    model.weight_per_mm = scales.get("weight_per_mm", math.nan)
    model.temperature = scales["temperature"]
    return scales


def _completed(
    model: Model,
    annotations: SectionLabels,
    key: str,
    jobs: int,
    store: Store | None,
    report: Progress,
    keep_probabilities: bool,
) -> dict[int, SectionResult]:
    """Complete every unlabelled section, several at a time; each is stored as soon as it is done."""
    cores = os.cpu_count() or 1
    jobs = 1 if model.stack.device != "cpu" else min(jobs or cores, len(annotations.unlabelled))
    stop = threading.Event()

    def one(z: int) -> tuple[int, SectionResult | None]:
        if stop.is_set():
            return z, None
        atlases = model.stack.atlases(z)
        known = [model.stack.labels[a] for a, _ in atlases]
        warps = [model.stack.displacement(z, a) for a, _ in atlases]
        section = content_key(key, z, keep_probabilities, atlases, *known, *(w.cpu().numpy() for w in warps))
        stored = store.load(f"section-{z:04}", section) if store is not None else None
        if stored is not None:
            return z, _from_arrays(stored)
        result = model.complete_section(z, keep_probabilities)
        if store is not None:
            store.save(f"section-{z:04}", section, _to_arrays(result))
        return z, result

    done: dict[int, SectionResult] = {}
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(max(1, cores // jobs),)) as pool:
        try:
            for future in as_completed([pool.submit(one, z) for z in annotations.unlabelled]):
                z, result = future.result()
                if result is not None:
                    done[z] = result
                report("sections", len(done), len(annotations.unlabelled))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    torch.set_num_threads(threads)
    return done


def _to_arrays(result: SectionResult) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(value) for name, value in vars(result).items() if value is not None}


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> SectionResult:
    return SectionResult(
        labels=arrays["labels"],
        uncertainty=arrays["uncertainty"],
        structures=arrays["structures"],
        probabilities=arrays.get("probabilities"),
        objective=arrays["objective"].tolist(),
        entropy_before=float(arrays["entropy_before"]),
        entropy_after=float(arrays["entropy_after"]),
        seconds=float(arrays["seconds"]),
    )


def _notes(model: Model, annotations: SectionLabels) -> tuple[str, ...]:
    notes = list(model.notes)
    for pair in model.stack.warps.unmatched if model.stack.warps is not None else ():
        notes.append(f"Sections {pair[1]} and {pair[0]} could not be registered: one is empty or constant.")
    first, last = annotations.labelled[0], annotations.labelled[-1]
    beyond = [z for z in annotations.unlabelled if not first < z < last]
    if beyond:
        notes.append(f"{len(beyond)} sections lie outside the labelled range; each rests on one labelled section.")
    return tuple(notes)


def _assemble(
    annotations: SectionLabels,
    sections: Mapping[int, SectionResult],
    seconds: Mapping[str, float],
    calibration: Mapping[str, float],
    notes: tuple[str, ...],
) -> Completion:
    given = annotations.label_map
    labels = given.labels.copy()
    uncertainty = np.zeros(labels.shape, dtype=np.float32)
    for z, result in sections.items():
        labels[z] = result.labels.astype(labels.dtype)
        uncertainty[z] = result.uncertainty
    suggestions = suggest_sections(uncertainty, labels, annotations.labelled)
    completed = LabelMap(labels, given.space, given.table, given.source)
    return Completion(completed, uncertainty, dict(sections), suggestions, dict(seconds), dict(calibration), notes)
