"""Membranes and cells in sections of electron micrographs, from a handful of traced sections.

For the electron microscopist who traced some sections and has hundreds. The method is that of Chen, Qi, Cheng and Heng
2016 [1]_: a deep contextual network whose three branches are classifiers of their own, and a watershed that closes
membranes that fade.

| step | function |
| --- | --- |
| the network, C1, C2, C3 | `limner.networks.contextual.ContextualNetwork` |
| the loss | `contextual_loss`, `auxiliary_weight`; lam is the optimiser's weight decay |
| mean over symmetries and crops | `membrane_map`, with `limner.networks.symmetry_average` |
| p_w and p_f = w_f p_w + (1 - w_f) p | `limner.watershed.closed_contours`, `fuse`; `fused_map` |
| w_f on training sections | `choose_fusion` |
| the whole of it | `fit`, `segment` |

Departures, with what they gained (docs/benchmarks.md):

- Sections are brought to mean 0 and deviation 1 each, so that contrast may change from one to the next.
- Batch normalisation, Adam and a rate that falls along a cosine: a training of half an hour. The paper's is
  `--optimiser sgd --rate 0.01 --decay-steps 2000 --patch 480`.
- Noise is added in training, for exposure differs between sections too, and sections clearly noisier than those trained
  on are smoothed down to their noise: without both, a model of even sections loses most membranes of noisy ones.
- w_f is chosen together with smoothing and the depth below which basins are one, for the best V_rand at the threshold
  0.5 of p_f / (1 - w_f), cut at 1 (`levelled`), so that the map needs no tuned threshold.

References
----------
.. [1] Chen, Qi, Cheng, Heng, "Deep contextual networks for neuronal structure segmentation", AAAI 2016,
   https://doi.org/10.1609/aaai.v30i1.10141
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.augmentation import elastic
from limner.checkpoint import Checkpoint
from limner.inference import Image, Options, predict
from limner.metrics.neurites import HALF, thin, v_rand
from limner.model_file import ModelFile
from limner.networks.contextual import ContextualNetwork
from limner.networks.symmetry_average import SymmetryAverage
from limner.networks.tiled_unet import TiledUNet
from limner.run_record import Store, stored
from limner.section_grey import (
    Quieted,
    Smoothing,
    grey_statistics,
    margin_level,
    relative_noise,
    smoothing_to,
    standardised,
)
from limner.section_maps import SectionMaps, make_maps
from limner.tiles import Tile
from limner.watershed import cells_between, closed_contours, fuse

TASK = "membranes"
MEMBRANE = 1  # channel of the network's output; 0 is the cells'
UNKNOWN = -1
LARGEST_PATCH = 4096  # pixels
ROOM = 8  # a patch is cut out with an eighth of its side around it, so that bending brings in what lies beside it
WEIGHTS_OF_FUSION = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)  # from a third on every contour is above 0.5
DEPTHS, SIGMAS = (0.05, 0.1, 0.2), (1.0, 2.0)  # less deep: cells are split; pixels
Network = ContextualNetwork | TiledUNet
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What can be chosen. Values of the paper are named; a default that differs says why."""

    network: Literal["contextual", "unet"] = "contextual"
    """'contextual' (paper), or 'unet' for comparison."""
    width: int = 0
    """Channels at full size, doubled at each level; 0: 16, of a U-Net 12, which costs the same."""
    auxiliary: float = 1.0
    """w_c: weight of the auxiliary classifiers at first; falls to 0 through training. 0: none (paper: no value)."""
    steps: int = 0
    """Gradient steps; 0: 1,500, on a GPU 10,000 (paper: 2 to 3 hours on a GPU of 2015)."""
    batch: int = 4
    """Patches a step."""
    patch: int = 256
    """Side of training patches, pixels (paper: 480; 256 for 2 cores)."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """'sgd' with momentum 0.9 (paper), or 'adam', which a short training needs."""
    rate: float = 3e-3
    """Learning rate at first (paper: 0.01, with sgd)."""
    decay_steps: int = 0
    """Steps after which the rate is divided by 10 (paper: 2,000); 0: it falls along a cosine to 0."""
    weight_decay: float = 1e-4
    """lam, on the squared weights (paper: no value)."""
    dropout: float = 0.2
    """Share of the deepest level's channels dropped in training (paper: no value)."""
    elastic_px: float = 3.0
    """Standard deviation of elastic displacements every 32 pixels, in pixels (paper: no value)."""
    contrast: float = 0.2
    """Largest relative change of contrast, and of brightness in deviations, either way; 0: none."""
    noise: float = 0.3
    """Largest standard deviation of noise added in training, in deviations of a section: exposures differ; 0: none."""
    seed: int = 0
    """Seed of every random draw."""

    def check(self) -> None:
        """Raise ValueError for a setting that cannot be."""
        above = ("batch", "patch", "rate")
        shares = ("dropout", "contrast")
        not_below = (
            "width",
            "auxiliary",
            "steps",
            "decay_steps",
            "weight_decay",
            "elastic_px",
            "noise",
            "seed",
            *shares,
        )
        for name in above:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name}: {getattr(self, name)} is not possible; give a number above 0")
        for name in not_below:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not possible; give 0 or more")
        if self.patch % 16 or self.patch > LARGEST_PATCH:
            raise ValueError(
                f"--patch: {self.patch} is no multiple of 16 up to {LARGEST_PATCH}; give 128, 256, 480, ..."
            )
        for name in shares:
            if not getattr(self, name) < 1:
                raise ValueError(f"--{name}: {getattr(self, name)} is no share; give 0 or more, below 1")
        for name, known in (("network", ("contextual", "unet")), ("optimiser", ("adam", "sgd"))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name}: {getattr(self, name)} is not known; give {' or '.join(known)}")


@dataclass(frozen=True)
class Fusion:
    """How the watershed is fused with the map.

    Parameters
    ----------
    w_f : float
        Weight of the closed contours, in [0, 1]; 0: the map alone.
    depth : float
        Basins less deep than this are one with a neighbour, in [0, 1].
    sigma : float
        Smoothing before the watershed, pixels.
    v_rand : float or None
        Of the sections it was chosen on, at the threshold 0.5; None where it was given.
    """

    w_f: float
    depth: float
    sigma: float = 1.0
    v_rand: float | None = None


@dataclass(frozen=True)
class TracedSection:
    """A section whose membranes are traced.

    Parameters
    ----------
    image : ndarray
        Grey, shape (Y, X).
    membrane : ndarray of bool
        True on membrane, shape (Y, X).

    Raises
    ------
    ValueError
        If the two differ in size, or the membrane is no mask.
    """

    image: NDArray[Any]
    membrane: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.image.shape != self.membrane.shape or self.image.ndim != 2:
            raise ValueError(
                f"TracedSection(): an image of shape {self.image.shape} and membranes of shape {self.membrane.shape} "
                "found; give both in grey, shape (y, x), of one size"
            )
        if self.membrane.dtype != bool:
            raise ValueError(f"TracedSection(): membranes of type {self.membrane.dtype} found; give true on membrane")


@dataclass(frozen=True)
class Model:
    """A trained network.

    Parameters
    ----------
    network : ContextualNetwork or TiledUNet
        In evaluation.
    settings : Settings
        It was trained with.
    fusion : Fusion
        Chosen on the traced sections.
    um_per_px : float
        Pixel size of the traced sections, micrometres; NaN: not stated.
    noise : float
        `known_noise` of the traced sections, to which noisier ones are smoothed; 0: not known, none is.
    """

    network: Network
    settings: Settings
    fusion: Fusion
    um_per_px: float = math.nan
    noise: float = 0.0

    def seen(self, image: Image) -> Image:
        """A section as the network is to see it: smoothed where it is clearly noisier than those it was trained on."""
        return Quieted(image, lambda: smoothing_to(image, self.noise))


# ---- training -------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> Network:
    """The untrained network of `settings`, its weights drawn by `Settings.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.network == "unet":
            width = settings.width or 12
            return TiledUNet(in_channels=1, widths=tuple(width * 2**level for level in range(5)))
        width = settings.width or 16
        return ContextualNetwork(widths=(width, 2 * width, 4 * width, 8 * width), dropout=settings.dropout)


def contextual_loss(scores: Sequence[Tensor], targets: Tensor, auxiliary: float) -> Tensor:
    """- sum_c w_c log psi_c(x, l(x)) - log psi(x, l(x)), mean over the pixels whose class is known.

    Parameters
    ----------
    scores : sequence of Tensor
        Logits of each branch, shape (B, L, Y, X); their sum is the network's own.
    targets : Tensor
        Class of each pixel, shape (B, Y, X), `UNKNOWN` where there is none: no loss and no gradient.
    auxiliary : float
        w_c, one for all branches.

    Returns
    -------
    Tensor
        Scalar, nats a pixel; 0 where nothing is known.
    """
    known = (targets != UNKNOWN).sum().clamp_min(1)

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, ignore_index=UNKNOWN, reduction="sum") / known

    loss = cross_entropy(torch.stack(list(scores)).sum(dim=0))
    if auxiliary == 0:
        return loss
    return loss + auxiliary * torch.stack([cross_entropy(branch) for branch in scores]).sum()


def auxiliary_weight(step: int, settings: Settings) -> float:
    """w_c of a step: from `Settings.auxiliary` down to 0 along a line."""
    return settings.auxiliary * (1 - step / settings.steps)


def rate_at(step: int, settings: Settings) -> float:
    """Learning rate of a step: divided by 10 every so many (paper), or 30 steps of warming up and a cosine to 0."""
    if settings.decay_steps:
        return float(settings.rate * 0.1 ** (step // settings.decay_steps))
    return settings.rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def train(
    network: Network,
    sections: Sequence[TracedSection],
    settings: Settings,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Minimise `contextual_loss` on augmented patches; the network is changed in place.

    Parameters
    ----------
    network : ContextualNetwork or TiledUNet
        One map in, two out.
    sections : sequence of TracedSection
        Sizes may differ.
    settings : Settings
        Schedule and augmentation.
    device : str
        Where to compute.
    progress : callable
        Called with steps done and steps in all.
    checkpoint : Checkpoint, optional
        Where to keep the state now and then, and to go on from the state that is there.

    Returns
    -------
    list of float
        Loss of each step, those before a stop included.

    Raises
    ------
    ValueError
        If the loss becomes infinite or no number, or `Settings.steps` was left open, which `settle` fills in.
    """
    if not settings.steps:
        raise ValueError("train(): 0 steps found; give some, such as settle() chooses for the device")
    prepared = [_prepared(section, settings.patch) for section in sections]
    generator = torch.Generator().manual_seed(settings.seed)
    weights = list(network.parameters())
    optimiser: torch.optim.Optimizer = (
        torch.optim.SGD(weights, settings.rate, momentum=0.9, weight_decay=settings.weight_decay)
        if settings.optimiser == "sgd"
        else torch.optim.AdamW(weights, settings.rate, weight_decay=settings.weight_decay)
    )
    network.train().to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # up to twice as fast on a CPU
    losses = checkpoint.restore(network, optimiser, generator) if checkpoint else []
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        for step in range(len(losses), settings.steps):
            torch.manual_seed(settings.seed + step)  # dropout draws from torch's own generator
            losses.append(_descend(network, optimiser, _batch(prepared, settings, generator), step, settings))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"train(): the loss is {losses[-1]} at step {step + 1}; give a lower rate (--rate)")
            if checkpoint:
                checkpoint.keep(network, optimiser, generator, losses)
            progress(step + 1, settings.steps)
    network.eval()
    return losses


def _descend(
    network: Network, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], step: int, settings: Settings
) -> float:
    """One gradient step; returns its loss."""
    for group in optimiser.param_groups:
        group["lr"] = rate_at(step, settings)
    device = next(network.parameters()).device
    images, targets = batch[0].to(device, memory_format=torch.channels_last), batch[1].to(device)
    scores = network.scores(images) if isinstance(network, ContextualNetwork) else [network(images)]
    loss = contextual_loss(scores, targets, auxiliary_weight(step, settings) if len(scores) > 1 else 0.0)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def _prepared(section: TracedSection, patch: int) -> Tensor:
    """Grey levels of mean 0 and deviation 1, membrane and what is known: (3, Y, X), at least of the patch's size."""
    mean, deviation = grey_statistics(section.image)
    image = (np.asarray(section.image, np.float32) - mean) / deviation
    maps = np.stack([image, section.membrane.astype(np.float32), np.ones(image.shape, np.float32)]).astype(np.float32)
    missing = [(0, 0), *((0, max(0, patch - n)) for n in image.shape)]
    return torch.from_numpy(np.concatenate([np.pad(maps[:2], missing, mode="symmetric"), np.pad(maps[2:], missing)]))


def _batch(sections: Sequence[Tensor], settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches, each turned, mirrored, bent, in other contrast, noisier: images (B, 1, Y, X) and classes (B, Y, X)."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    margin = settings.patch // ROOM
    room = settings.patch + 2 * margin
    stacked = []
    for _ in range(settings.batch):
        section = sections[draw(len(sections))]
        spans = []
        for n in section.shape[1:]:
            mirrored = np.pad(np.arange(n), margin, mode="symmetric")
            first = draw(n - settings.patch + 1)
            spans.append(mirrored[first : first + room])
        part = section[:, spans[0]][:, :, spans[1]]
        turned = torch.rot90(part, draw(4), (1, 2))
        stacked.append(turned.flip(1) if draw(2) else turned)
    kept = slice(margin, margin + settings.patch)
    batch = elastic(torch.stack(stacked), settings.elastic_px, generator)[:, :, kept, kept]
    change = settings.contrast * (2 * torch.rand(2, settings.batch, 1, 1, 1, generator=generator) - 1)
    targets = torch.where(batch[:, 2] > 0.5, (batch[:, 1] > 0.5).long(), UNKNOWN)
    images = batch[:, :1] * (1 + change[0]) + change[1]
    deviation = settings.noise * torch.rand(settings.batch, 1, 1, 1, generator=generator)
    return images + deviation * torch.randn(images.shape, generator=generator), targets


def fit(
    sections: Sequence[TracedSection],
    settings: Settings,
    um_per_px: float = math.nan,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
    checkpoint: Checkpoint | None = None,
) -> tuple[Model, list[float]]:
    """Train the network on traced sections, then choose how the watershed is fused with its map.

    Parameters
    ----------
    sections : sequence of TracedSection
        At least one, of one pixel size.
    settings : Settings
        Network, schedule, augmentation.
    um_per_px : float
        Pixel size, micrometres; NaN: not known.
    device, progress, checkpoint
        As of `train`.

    Returns
    -------
    model : Model
        In evaluation.
    losses : list of float
        Of each step.

    Raises
    ------
    ValueError
        As of `settle`.
    """
    settings = settle(sections, settings, device)
    network = build(settings)
    losses = train(network, sections, settings, device, progress, checkpoint)
    options = Options(device="cuda" if device.startswith("cuda") else "cpu")
    fusion = choose_fusion([membrane_map(network, s.image, options=options) for s in sections], sections)
    return Model(network, settings, fusion, um_per_px, known_noise(sections)), losses


def known_noise(sections: Sequence[TracedSection]) -> float:
    """The largest `relative_noise` of the sections trained on."""
    return max(relative_noise(section.image) for section in sections)


def settle(sections: Sequence[TracedSection], settings: Settings, device: str = "cpu") -> Settings:
    """The settings of a training on these sections: checked, and with its number of steps.

    Raises
    ------
    ValueError
        If a setting is out of range, or the sections hold no membrane or nothing else.
    """
    settings.check()
    if not sections:
        raise ValueError("fit(): no section is given; give some with their membranes traced")
    traced = [float(section.membrane.mean()) for section in sections]
    if not 0 < np.mean(traced) < 1:
        raise ValueError("fit(): the labels hold membrane alone, or none; give both")
    return replace(settings, steps=settings.steps or (10_000 if device.startswith("cuda") else 1500))


# ---- from an image to membranes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Averaging:
    """What the probabilities are a mean of.

    Parameters
    ----------
    symmetries : bool
        Over the eight turned and mirrored images, or the image as it is.
    crops : int
        Over so many crops along each diagonal step: 1, 2 or 4 (paper: overlapping crops, no number).
    """

    symmetries: bool = True
    """Average over the eight symmetries of the square; else eight times as fast and less accurate."""
    crops: Literal[1, 2, 4] = 1
    """Average over so many crops that begin at other pixels; as many times slower (paper: overlapping crops)."""

    def of(self, network: Network) -> SymmetryAverage:
        """The network, averaged."""
        step = network.alignment // self.crops
        return SymmetryAverage(network, self.symmetries, tuple(range(0, step * self.crops, step)))


def membrane_map(
    network: Network, image: Image, averaging: Averaging | None = None, options: Options | None = None
) -> NDArray[np.float32]:
    """p: probability of membrane at every pixel of a section that fits into memory.

    Parameters
    ----------
    network : ContextualNetwork or TiledUNet
        Trained.
    image : array-like
        Grey, shape (Y, X).
    averaging : Averaging, optional
        Over symmetries and crops.
    options : Options, optional
        Windows and device; nothing else in them changes the result.

    Returns
    -------
    ndarray of float32
        Shape (Y, X), in [0, 1].
    """
    found = np.empty(image.shape, np.float32)

    def write(tile: Tile, probabilities: NDArray[np.float32]) -> None:
        found[tile.kept.slices] = probabilities[MEMBRANE]

    averaged = (averaging or Averaging()).of(network)
    predict(averaged, image, write, options or Options(), prepare=standardised(image))
    return found


@dataclass(frozen=True)
class Segmentation:
    """Sections with their membranes: maps and cells are made of what the network found each time they are asked for.

    Parameters
    ----------
    maps : SectionMaps
        p of every section.
    fusion : Fusion
        How p_f is made of p.
    least_cell : int
        Pixels that a cell needs.
    smoothed : tuple of float
        Of each section the deviation of the Gaussian it was smoothed with, pixels; 0: as it was.
    """

    maps: SectionMaps
    fusion: Fusion
    least_cell: int = 0
    smoothed: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.maps)

    def fused(self, z: int) -> NDArray[np.float32]:
        """p_f of a section, shape (Y, X), in [0, 1]."""
        return fused_map(self.maps[z], self.fusion)

    def cells(self, fused: NDArray[np.float32], pixels: NDArray[Any]) -> NDArray[np.int32]:
        """Cells of a section by its p_f, 1, 2, ... in the order of rows, shape (Y, X), 0 between them.

        What lies on the margin of the section's `pixels`, or all of it where they are of one level, is no cell.
        """
        cells = cells_between(fused >= HALF, self.least_cell)
        level = margin_level(pixels)
        if level is None:
            return cells
        sizes = np.bincount(cells.ravel())
        kept = np.bincount(cells.ravel(), pixels.ravel() == level) < 0.5 * sizes
        kept[0] = False
        return np.where(kept, np.cumsum(kept), 0)[cells].astype(np.int32)


def segment(
    images: Sequence[Image],
    model: Model,
    store: Store,
    keys: Sequence[str],
    averaging: Averaging | None = None,
    options: Options | None = None,
    progress: Progress = lambda *_: None,
    least_cell: int = 0,
    match_noise: bool = True,
) -> Segmentation:
    """Membranes and cells of a stack of any size.

    Parameters
    ----------
    images : sequence of array-like
        Sections, grey, each (Y, X) or anything that gives the pixels of two slices; only what is needed is asked for.
    model : Model
        Trained.
    store : Store
        Where tiles are kept: those that are there are not computed again.
    keys : sequence of str
        For each section what its map depends on: image, model, averaging, `match_noise`.
    averaging : Averaging, optional
        Over symmetries and crops.
    options : Options, optional
        Windows, device, scheduler; nothing in them changes the result.
    progress : callable
        Called with tiles done and tiles in all.
    least_cell : int
        Pixels that a cell needs.
    match_noise : bool
        Smooth sections that are noisier than those trained on, see `Model.seen`.

    Returns
    -------
    Segmentation
    """

    def kept(z: int) -> Smoothing:
        found = stored(store, f"noise-{z:05}", keys[z], lambda: _as_arrays(smoothing_to(images[z], model.noise)))
        return Smoothing(float(found["sigma"]), float(found["level"]) if "level" in found else None)

    known = match_noise and model.noise > 0
    seen = [Quieted(image, partial(kept, z) if known else Smoothing) for z, image in enumerate(images)]
    averaged = (averaging or Averaging()).of(model.network)
    maps = make_maps(averaged, seen, keys, store, MEMBRANE, options or Options(), standardised, progress)
    return Segmentation(maps, model.fusion, least_cell, tuple(image.smoothing.sigma for image in seen))


def _as_arrays(smoothing: Smoothing) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(value) for name, value in vars(smoothing).items() if value is not None}


def levelled(probability: NDArray[np.float32], contours: NDArray[np.bool_], w_f: float) -> NDArray[np.float32]:
    """p_f over 1 - w_f, cut at 1, shape (Y, X): p as it is off the contours, w_f / (1 - w_f) more on them.

    Pixels keep the order that p_f gives them, up to ties at 1; but at the threshold 0.5 membranes keep the width that
    they have in p.

    Examples
    --------
    >>> levelled(np.array([[0.6, 0.4, 0.4]], np.float32), np.array([[False, True, False]]), w_f=0.2).round(2)
    array([[0.6 , 0.65, 0.4 ]], dtype=float32)
    """
    found: NDArray[np.float32] = np.minimum(fuse(probability, contours, w_f) / np.float32(1 - w_f), np.float32(1))
    return found


def fused_map(probability: NDArray[np.float32], fusion: Fusion) -> NDArray[np.float32]:
    """p_f of a section, levelled: its map with the contours that the watershed closes, shape (Y, X)."""
    if fusion.w_f == 0:
        return probability
    contours = closed_contours(probability, fusion.sigma, fusion.depth)
    return levelled(probability, contours, fusion.w_f)


def choose_fusion(
    maps: Sequence[NDArray[np.float32]],
    sections: Sequence[TracedSection],
    progress: Progress = lambda *_: None,
) -> Fusion:
    """The w_f, depth and smoothing with the best V_rand at the threshold 0.5; of equals the first tried.

    Parameters
    ----------
    maps : sequence of ndarray of float32
        p of each section, shape (Y, X).
    sections : sequence of TracedSection
        With the truth; those without a cell do not count.
    progress : callable
        Called with the watersheds tried and to be tried.

    Raises
    ------
    ValueError
        If no section holds a cell.
    """
    pairs = [(p, cells_between(section.membrane)) for p, section in zip(maps, sections, strict=True)]
    pairs = [(p, truth) for p, truth in pairs if truth.any()]
    if not pairs:
        raise ValueError("choose_fusion(): no section holds a cell; give sections with cells between the membranes")
    watersheds = list(product(SIGMAS, DEPTHS))
    best: Fusion | None = None
    for tried, (sigma, depth) in enumerate(watersheds, start=1):
        contours = [closed_contours(p, sigma, depth) for p, _ in pairs]
        for w_f in WEIGHTS_OF_FUSION:
            cells = [levelled(p, lines, w_f) < HALF for (p, _), lines in zip(pairs, contours, strict=True)]
            scores = [v_rand(thin(found), truth).score for found, (_, truth) in zip(cells, pairs, strict=True)]
            mean = float(np.mean(scores))
            if best is None or best.v_rand is None or mean > best.v_rand:
                best = Fusion(w_f, depth, sigma, mean)
        progress(tried, len(watersheds))
    assert best is not None
    return best


# ---- in a file ------------------------------------------------------------------------------------------------------


def to_model(model: Model, record: Mapping[str, Any]) -> ModelFile:
    """A trained network with its settings, fusion and training record, to be written to a file."""
    about = {**asdict(model.settings), "fusion": asdict(model.fusion), "known_noise": model.noise}
    return ModelFile(TASK, model.network.state_dict(), about, model.um_per_px, record)


def from_model(file: ModelFile) -> Model:
    """The trained network of a file, in evaluation.

    Raises
    ------
    ValueError
        If the file's settings or weights are not those of this method, or out of range.
    """
    about = dict(file.settings)
    try:
        fusion, noise = Fusion(**about.pop("fusion")), float(about.pop("known_noise", 0.0))
        settings = Settings(**about)
        settings.check()
        network = build(settings)
        network.load_state_dict(dict(file.weights))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        found = str(error).splitlines()[0]
        raise ValueError(
            f"from_model(): settings and weights do not fit together ({found}); train the model anew"
        ) from None
    network.eval()
    return Model(network, settings, fusion, file.pixel_size, noise)
