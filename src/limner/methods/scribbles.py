"""Scribbles: an organ in 3D from a few strokes on a few sections.

For whoever has a stack of sections and an organ whose border nobody wants to outline by hand: strokes for the organ and
for what is not the organ on some sections, a result for the whole stack, then more strokes where it errs.

Method of Harada et al. 2019 (multi-field-of-view U-Net, discriminative metric learning of Hu et al. 2014,
https://doi.org/10.1109/CVPR.2014.242, 3D graph cut of Boykov and Kolmogorov 2004,
https://doi.org/10.1109/TPAMI.2004.60).

| step | function |
| --- | --- |
| features: multi-field-of-view U-Net, trained on other volumes | `fit` |
| the same trained on this stack's strokes alone | `train_on_strokes` |
| metric learning on frozen features, then the 1 x 1 layer: heat maps | `learn`, `Session.heat_maps` |
| strokes spread through the volume | `Session.spread`, with `limner.random_walker` |
| gamma, s, delta by leaving out strokes | `choose_cut` |
| 3D graph cut | `Session.segment`, with `limner.graph_cut` |

Departures, with what they gained (docs/benchmarks.md):

- The heat maps are not cut as they are: they are the prior of a random walker, which carries the strokes to the nearest
  edges in three dimensions. Its chances are what is cut, and the uncertainty.
- A network that learns from strokes alone calls whatever lies far from them organ at random. Where no volumes to train
  on are given, none is therefore used: the strokes spread by themselves. With `prior_weight` above 0 one is trained, on
  the strokes and on the voxels of whose class the walker is sure.
- Metric learning is a setting: training the embedding with the 1 x 1 layer was better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from limner.annotations import Scribbles
from limner.augmentation import Augmentation, augment
from limner.graph_cut import CutOptions, cut_labels
from limner.intensity import tissue_mask
from limner.losses.metric_learning import metric_learning_loss, sample_pairs
from limner.model_file import ModelFile
from limner.networks.embedding import HeatMapHead
from limner.networks.multi_field_unet import MultiFieldUNet
from limner.random_walker import WalkerOptions, random_walker
from limner.run_record import Store, content_key, stored
from limner.volume import LabelMap, Volume
from limner.working_grid import Grid

TASK = "scribbles"
ALGORITHM = 1  # raised with every change that alters results: what was kept before is then made anew
MAGNIFICATIONS = (1, 2, 4, 8)
UNKNOWN = -1
GAMMAS = (0.0, 0.3, 1.0, 3.0)
USUAL_GAMMA = 0.3
LEAST_CONTRAST = 3.0  # grey levels: noise of less says nothing about edges
FEW_RIGHT = 0.75  # of left-out strokes: then the drawn sections lie too far apart
MOST_LEFT_OUT = 6  # sections, to choose gamma
SAMPLED_SECTIONS, SAMPLED_PIXELS = 60, 15_000  # of the volumes that a model was trained on
Progress = Callable[[str, int, int], None]


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
    rate: float = 3e-3
    """Highest learning rate of the network (paper: 1e-3); falls along a cosine."""
    patch: int = 256
    """Largest side of what is trained on at once, pixels; larger sections are cut."""
    sure: float = 0.8
    """Chance from which on a random walker's class is trained on where nothing was drawn; 1: strokes alone."""
    metric_learning: bool = False
    """Learn the embedding by pairs of pixels, as in the paper; else together with the 1 x 1 layer, which was better."""
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
    """How far the walker follows the heat maps; None: 0.1 with a model, else 0, and no network is trained."""
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
        names = ("working_um", "width", "fields", "steps", "batch", "rate", "patch", "sure", "seed", *walker)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LabelledVolume:
    """A volume that is labelled in full, to train on: labels (Z, Y, X), 0 background, 1, 2, ... organs."""

    images: Volume
    labels: NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Model:
    """A network trained on other volumes.

    Parameters
    ----------
    network : MultiFieldUNet
        In evaluation.
    settings : Settings
        It was trained with.
    n_classes : int
        Background and organs.
    um_per_px : float
        Pixel size it works at, micrometres.
    features, labels : Tensor
        Some pixels of the volumes, shape (N, C), and their classes, shape (N,): metric learning pairs these too.
    names : tuple of str
        Of the organs.
    """

    network: MultiFieldUNet
    settings: Settings
    n_classes: int
    um_per_px: float
    features: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Organ:
    """Its volume, and the volumes of what is organ with a chance of 3/4 and of 1/4, mm3."""

    label: int
    volume_mm3: float
    interval_mm3: tuple[float, float]


@dataclass(frozen=True)
class Segmentation:
    """What the strokes became.

    Parameters
    ----------
    labels : LabelMap
        0 background, 1, 2, ... the organs, as the strokes are numbered.
    heat_maps : ndarray of float32
        Chance of each class, shape (L, Z, Y, X), in [0, 1].
    uncertainty : ndarray of float32
        Chance that the label is wrong, shape (Z, Y, X), in [0, 1].
    organs : tuple of Organ
        One row an organ.
    suggestions : tuple of int
        Up to three sections to draw on next, the most uncertain first.
    cut : CutOptions
        What the graph cut used.
    chosen : mapping of str to float
        Share of left-out strokes that came out right, by gamma; empty where gamma was given.
    seconds : mapping of str to float
        By stage.
    notes : tuple of str
        What the user should know.
    """

    labels: LabelMap
    heat_maps: NDArray[np.float32]
    uncertainty: NDArray[np.float32]
    organs: tuple[Organ, ...]
    suggestions: tuple[int, ...]
    cut: CutOptions
    chosen: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# ---- the network --------------------------------------------------------------------------------------------------


def build(settings: Settings, n_classes: int, channels: int) -> MultiFieldUNet:
    """The untrained network, its weights drawn by `Settings.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        widths = (settings.width, 2 * settings.width, 4 * settings.width)
        return MultiFieldUNet(n_classes, channels, widths, MAGNIFICATIONS[: settings.fields])


def train(
    network: MultiFieldUNet,
    sections: Sequence[tuple[Tensor, NDArray[np.integer[Any]]]],
    settings: Settings,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
) -> list[float]:
    """Minimise the cross-entropy of known pixels on augmented sections (Adam, decoupled weight decay).

    Parameters
    ----------
    network : MultiFieldUNet
        Changed in place.
    sections : sequence of (Tensor, ndarray of int)
        Inputs (C, Y, X) and classes (Y, X) with `UNKNOWN` where nothing is known; all of one size.
    settings : Settings
        Steps, batch, rate, patch, seed.
    device, progress
        As of `segment`.

    Returns
    -------
    list of float
        Loss of each step.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=1e-2)
    network.train().to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU
    losses = []
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            warm = min(1.0, (step + 1) / 20)
            group["lr"] = settings.rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        chosen = torch.randint(len(sections), (settings.batch,), generator=generator).tolist()
        images = torch.stack([sections[i][0] for i in chosen])
        targets = torch.from_numpy(np.stack([sections[i][1] for i in chosen]).astype(np.int64))
        images, targets, inside = augment(images, targets, Augmentation(), generator)
        regions = [_region(target, settings.patch, generator) for target in targets]
        known = torch.stack(
            [t[r] * (i[r] > 0) + UNKNOWN * (i[r] == 0) for t, i, r in zip(targets, inside, regions, strict=True)]
        )
        logits = network(images.to(device, memory_format=torch.channels_last), regions)
        total = F.cross_entropy(logits, known.to(device), ignore_index=UNKNOWN, reduction="sum")
        loss = total / max(1, int((known != UNKNOWN).sum()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        progress("network", step + 1, settings.steps)
    network.eval()
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as when read from a file
    return losses


def _region(targets: Tensor, patch: int, generator: torch.Generator) -> tuple[slice, slice]:
    """At most `patch` pixels a side, around a known pixel."""
    known = (targets != UNKNOWN).nonzero()
    centre = known[torch.randint(len(known), (), generator=generator)] if len(known) else torch.tensor([0, 0])
    spans = []
    for middle, n in zip(centre.tolist(), targets.shape, strict=True):
        first = min(max(0, middle - patch // 2), max(0, n - patch))
        spans.append(slice(first, min(first + patch, n)))
    return spans[0], spans[1]


def fit(
    volumes: Sequence[LabelledVolume], settings: Settings, device: str = "cpu", progress: Progress = lambda *_: None
) -> tuple[Model, list[float]]:
    """Train the network on volumes that are labelled in full.

    Parameters
    ----------
    volumes : sequence of LabelledVolume
        All grey or all RGB, of nearly one pixel size.
    settings : Settings
        Network and schedule.
    device, progress
        As of `segment`.

    Returns
    -------
    model : Model
        In evaluation.
    losses : list of float
        Of each step.

    Raises
    ------
    ValueError
        If a setting is out of range, no organ is labelled, or the volumes do not go together.
    """
    settings.check()
    n_classes = 1 + max(int(volume.labels.max()) for volume in volumes)
    if n_classes < 2:
        raise ValueError("fit(): no organ is labelled; give labels in which organs are 1, 2, ...")
    grids = [Grid.of(volume.images, settings.working_um) for volume in volumes]
    if len({grid.levels.shape[3] for grid in grids}) > 1:
        raise ValueError("fit(): some volumes are grey and some RGB; give volumes of one kind")
    if settings.working_um is None and len({grid.factor for grid in grids}) > 1:  # one of them is a large volume
        coarsest = max(grid.um_per_px for grid in grids)
        grids = [Grid.of(volume.images, coarsest) for volume in volumes]
    smallest, *_, largest = sorted([grid.um_per_px for grid in grids] * 2)
    if largest > 1.2 * smallest:
        raise ValueError(f"fit(): pixels measure {smallest:g} to {largest:g} um; resample them to one size")
    height, width = (max(grid.levels.shape[axis] for grid in grids) for axis in (1, 2))
    sections = []
    for grid, volume in zip(grids, volumes, strict=True):
        labels = grid.middles(np.asarray(volume.labels))
        for image, target in zip(grid.inputs(slice(None), located=False), labels, strict=True):
            margins = (0, width - image.shape[2], 0, height - image.shape[1])
            padded = F.pad(image[None], margins, mode="replicate")[0]
            known = np.pad(target.astype(np.int64), ((0, margins[3]), (0, margins[1])), constant_values=UNKNOWN)
            sections.append((padded, known))
    network = build(settings, n_classes, grids[0].levels.shape[3])
    losses = train(network, sections, settings, device, progress)
    features, classes = _some_pixels(network, sections, settings, device)
    um_per_px = float(np.mean([grid.um_per_px for grid in grids]))
    return Model(network, settings, n_classes, um_per_px, features, classes), losses


def _some_pixels(
    network: MultiFieldUNet,
    sections: Sequence[tuple[Tensor, NDArray[np.integer[Any]]]],
    settings: Settings,
    device: str,
) -> tuple[Tensor, Tensor]:
    """Features and classes of `SAMPLED_PIXELS` pixels, half of them from sections with an organ."""
    draw = np.random.default_rng(settings.seed)
    with_organ = [i for i, (_, labels) in enumerate(sections) if labels.max() > 0]
    chosen = [*draw.choice(len(sections), SAMPLED_SECTIONS // 2), *draw.choice(with_organ, SAMPLED_SECTIONS // 2)]
    features, classes = [], []
    for i in chosen:
        image, labels = sections[i]
        known = np.flatnonzero(labels != UNKNOWN)
        some = draw.choice(known, min(len(known), SAMPLED_PIXELS // SAMPLED_SECTIONS), replace=False)
        seen = described(network, image[None].to(device))[0].flatten(1)[:, some]
        features.append(seen.T.cpu())
        classes.append(torch.from_numpy(labels.ravel()[some].astype(np.int64)))
    return torch.cat(features), torch.cat(classes)


@torch.no_grad()
def described(network: MultiFieldUNet, image: Tensor) -> Tensor:
    """Frozen features of sections: the layer before the last, and the logits; (B, C, Y, X) to (B, C', Y, X)."""
    features = network.features(image)
    return torch.cat([features, network.head(features)], dim=1)


def train_on_strokes(
    grid: Grid,
    marks: NDArray[np.int32],
    chances: NDArray[np.float32],
    settings: Settings,
    device: str,
    progress: Progress,
) -> MultiFieldUNet:
    """Train the network on one stack: on its strokes, and on what the random walker is sure of."""
    sure = chances.argmax(axis=0)
    targets = np.where(chances.max(axis=0) >= settings.sure, sure, UNKNOWN) if settings.sure < 1 else UNKNOWN
    targets = np.where(marks > 0, marks - 1, targets)
    usable = np.flatnonzero((targets > UNKNOWN).any(axis=(1, 2)))
    with_organ = np.flatnonzero((targets > 0).any(axis=(1, 2)))  # seen three times as often as those without
    inputs = grid.inputs(slice(None), located=True)
    sections = [(inputs[z], targets[z]) for z in [*usable.tolist(), *with_organ.tolist() * 2]]
    network = build(settings, len(chances), inputs.shape[1])
    train(network, sections, settings, device, progress)
    return network


# ---- metric learning on frozen features -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What tells classes apart: the mean and deviation by which features are normalised, embedding and 1 x 1 layer."""

    mean: Tensor
    deviation: Tensor
    head: HeatMapHead

    def __call__(self, features: Tensor) -> Tensor:
        """Heat maps (B, L, Y, X) of features (B, C, Y, X)."""
        normal = (features - self.mean.view(-1, 1, 1)) / self.deviation.view(-1, 1, 1)
        return self.head.heat_maps(normal)


def learn(features: Tensor, labels: Tensor, n_classes: int, settings: Settings) -> Learned:
    """Metric learning by pairs of pixels, then, with the embedding frozen, the 1 x 1 discriminating layer.

    Parameters
    ----------
    features : Tensor
        Of the pixels to learn from, shape (N, C).
    labels : Tensor of int
        Their classes, shape (N,).
    n_classes : int
        L.
    settings : Settings
        tau, beta, lam, steps, seed.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-3
    pixels = (features - mean) / deviation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = HeatMapHead(features.shape[1], n_classes)
    if settings.metric_learning:
        _learn_metric(head, pixels, labels, settings, generator)
    trained = head.discriminating if settings.metric_learning else head
    optimiser = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for chosen in torch.randint(len(pixels), (settings.learning_steps, min(len(pixels), 2048)), generator=generator):
        loss = F.cross_entropy(head(pixels[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Learned(mean, deviation, head.eval())


def _learn_metric(
    head: HeatMapHead, pixels: Tensor, labels: Tensor, settings: Settings, generator: torch.Generator
) -> None:
    optimiser = torch.optim.Adam(head.embedding.parameters(), lr=3e-3)
    layers: list[nn.Linear] = list(head.embedding.layers)  # type: ignore[arg-type]
    firsts, seconds, sames = sample_pairs(labels, 512 * settings.learning_steps, generator)
    for first, second, same in zip(firsts.view(-1, 512), seconds.view(-1, 512), sames.view(-1, 512), strict=True):
        places = head.embedding(pixels[first]), head.embedding(pixels[second])
        loss = metric_learning_loss(*places, same, layers, tau=settings.tau, beta=settings.beta, lam=settings.lam)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


# ---- a stack that is being drawn on ---------------------------------------------------------------------------------


@dataclass
class Session:
    """A stack with its frozen features: strokes come, are changed, come again.

    Parameters
    ----------
    images : Volume
        The stack.
    settings : Settings
        All settings.
    grid : Grid
        The stack as the method sees it.
    model : Model or None
        Trained on other volumes; None: the network learns from the first strokes.
    device : str
        ``cpu`` or ``cuda``.
    store : Store or None
        Where network and features are kept.
    progress : callable
        Called with a stage, what is done of it and what there is.

    Examples
    --------
    >>> session = Session.open(images, Settings())  # doctest: +SKIP
    >>> session.segment(scribbles).organs  # doctest: +SKIP
    >>> session.heat_map(more_scribbles, 40).shape  # doctest: +SKIP
    """

    images: Volume
    settings: Settings
    grid: Grid
    model: Model | None = None
    device: str = "cpu"
    store: Store | None = None
    progress: Progress = lambda *_: None
    seconds: dict[str, float] = field(default_factory=dict)
    _features: NDArray[np.float16] | None = None
    _chances: NDArray[np.float32] | None = None
    _cut: dict[str, NDArray[Any]] | None = None

    @classmethod
    def open(
        cls,
        images: Volume,
        settings: Settings,
        model: Model | None = None,
        device: str = "cpu",
        store: Store | None = None,
        progress: Progress = lambda *_: None,
    ) -> Session:
        """Check settings and model against the stack; nothing is computed yet.

        Raises
        ------
        ValueError
            If a setting is out of range, or the model is for other channels or pixels.
        """
        settings.check()
        wanted = settings.working_um
        if model is not None and wanted is None:
            own = 1000 * math.sqrt(images.space.spacing[1] * images.space.spacing[2])
            wanted = max(model.um_per_px, own)
        grid = Grid.of(images, wanted)
        if model is not None:
            channels = model.network.fields[0].down[0][0].in_channels  # type: ignore[index, union-attr]
            kinds = {1: "grey", 3: "RGB"}
            if channels != grid.levels.shape[3]:
                raise ValueError(
                    f"segment(): the model is for {kinds[channels]} sections, the images are "
                    f"{kinds[grid.levels.shape[3]]}; train one on images like these"
                )
            if not 1 / 1.5 <= grid.um_per_px / model.um_per_px <= 1.5:
                raise ValueError(
                    f"segment(): the model works at {model.um_per_px:g} um a pixel, the images at {grid.um_per_px:g}; "
                    "resample the images"
                )
        return cls(images, settings, grid, model, device, store, progress)

    @property
    def prior_weight(self) -> float:
        """How far the walker follows the heat maps."""
        given = self.settings.prior_weight
        return given if given is not None else 0.0 if self.model is None else 0.1

    def heat_maps(self, scribbles: Scribbles, marks: NDArray[np.int32] | None = None) -> NDArray[np.float32]:
        """Heat maps of every section, (L, Z, Y, X) on the working grid: features, metric learning, 1 x 1 layer."""
        marks = self.grid.marks(scribbles) if marks is None else marks
        features = self.features(marks)
        learned = self._learned(features, marks)
        with self._timed("heat maps"):
            return np.stack([self._heat(learned, features, z) for z in range(len(marks))], axis=1)

    def heat_map(self, scribbles: Scribbles, z: int) -> NDArray[np.float32]:
        """Heat maps of one section, (L, Y, X) on the working grid, at once: what changes after each stroke.

        Where no network is used, the walker's chances, of the sections from the drawn one below to the one above.
        """
        marks = self.grid.marks(scribbles)
        if self.prior_weight > 0:
            features = self.features(marks)
            return self._heat(self._learned(features, marks), features, z)
        part = sections_around(marks, z)
        chances: NDArray[np.float32] = self.spread(marks, None, part)[:, z - part.start]
        return chances

    def features(self, marks: NDArray[np.int32]) -> NDArray[np.float16]:
        """Frozen features (Z, C, Y, X): made once, of the network that the first strokes or the model gave."""
        if self._features is not None:
            return self._features
        model = None if self.model is None else [str(self.model.um_per_px), *_weights(self.model.network)]
        key = content_key(ALGORITHM, self.settings.of_features(), self.grid.levels, model)
        network = self.model.network if self.model is not None else self._network(marks, key)
        with self._timed("features"):
            sections = []
            for z in range(len(marks)):
                made = stored(self.store, f"features-{z:05}", key, partial(self._seen, network, z))
                sections.append(made["features"])
                self.progress("features", z + 1, len(marks))
        self._features = np.stack(sections)
        return self._features

    def spread(
        self,
        marks: NDArray[np.int32],
        heat: NDArray[np.float32] | None,
        sections: slice = slice(None),
        anew: bool = False,
    ) -> NDArray[np.float32]:
        """Chances (L, Z, Y, X) of a random walker from the strokes of some sections; the heat maps are its prior.

        It goes on from the chances of earlier strokes, unless `anew`.
        """
        options = walker_options(self.grid, marks, self.settings, self.prior_weight)
        earlier = None if anew or self._chances is None or len(self._chances) != marks.max() else self._chances
        start = None if earlier is None else earlier[:, sections]
        prior = None if heat is None else heat[:, sections]
        return random_walker(self.grid.levels[sections], marks[sections], self.grid.spacing, options, prior, start)

    def segment(self, scribbles: Scribbles) -> Segmentation:
        """From strokes to organs; arguments and errors as of the function `segment`."""
        marks = self.grid.marks(scribbles)
        _check_kept(scribbles, marks)
        began = time.monotonic()
        heat = self.heat_maps(scribbles, marks) if self.prior_weight > 0 else None
        with self._timed("random walker"):
            self._chances = self.spread(marks, heat)
        with self._timed("choice of gamma"):
            options, chosen = self._options(marks, heat)
        with self._timed("graph cut"):
            seeds = np.stack([marks == label + 1 for label in range(len(self._chances))])
            levels = np.rint(self.grid.levels).astype(np.uint8)
            levels = levels[..., 0] if levels.shape[-1] == 1 else levels
            labels = cut_labels(self._chances, levels, self.grid.spacing, options, seeds)
        result = self._at_full_size(scribbles, labels, options, chosen)
        self.seconds["all"] = time.monotonic() - began
        return replace(result, seconds=dict(self.seconds))

    def _network(self, marks: NDArray[np.int32], key: str) -> MultiFieldUNet:
        """Trained on the strokes that came first; later ones do not change it, nor the features."""

        def make() -> dict[str, NDArray[Any]]:
            with self._timed("random walker"):
                chances = self.spread(marks, None)
            self._chances = chances
            with self._timed("network"):
                trained = train_on_strokes(self.grid, marks, chances, self.settings, self.device, self.progress)
            return {name: weight.cpu().numpy() for name, weight in trained.state_dict().items()}

        weights = stored(self.store, "network", key, make)
        n_classes = len(weights["head.bias"])
        network = build(self.settings, n_classes, self.grid.levels.shape[3] + 3)
        network.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        return network.eval()

    def _seen(self, network: MultiFieldUNet, z: int) -> dict[str, NDArray[Any]]:
        section = self.grid.inputs([z], located=self.model is None).to(self.device)
        return {"features": described(network.to(self.device), section)[0].cpu().numpy().astype(np.float16)}

    def _learned(self, features: NDArray[np.float16], marks: NDArray[np.int32]) -> Learned:
        with self._timed("metric learning"):
            z, y, x = np.nonzero(marks)
            classes = marks[z, y, x].astype(np.int64) - 1
            if self.model is None:
                chances = self.spread(marks, None)
                sure = np.flatnonzero(chances.max(axis=0) >= self.settings.sure)
                some = np.random.default_rng(self.settings.seed).choice(sure, min(len(sure), 20000), replace=False)
                sz, sy, sx = np.unravel_index(some, marks.shape)
                z, y, x = np.r_[z, sz], np.r_[y, sy], np.r_[x, sx]
                classes = np.r_[classes, chances[:, sz, sy, sx].argmax(axis=0)]
            pixels = torch.from_numpy(features[z, :, y, x].astype(np.float32))
            labels = torch.from_numpy(classes)
            if self.model is not None and self.model.n_classes == marks.max():
                pixels, labels = torch.cat([pixels, self.model.features]), torch.cat([labels, self.model.labels])
            return learn(pixels, labels, int(marks.max()), self.settings)

    def _heat(self, learned: Learned, features: NDArray[np.float16], z: int) -> NDArray[np.float32]:
        heat: NDArray[np.float32] = learned(torch.from_numpy(features[z].astype(np.float32))[None])[0].numpy()
        return heat

    def _options(
        self, marks: NDArray[np.int32], heat: NDArray[np.float32] | None
    ) -> tuple[CutOptions, dict[str, float]]:
        given = self.settings
        base = CutOptions(
            0.0 if given.gamma is None else given.gamma,
            10.0 if given.contrast is None else given.contrast,
            0.1 if given.delta is None else given.delta,
        )
        if given.gamma is not None:
            return base, {}
        model = None if self.model is None else _weights(self.model.network)
        key = content_key(ALGORITHM, int(marks.max()), asdict(self.settings), self.grid.levels, model)
        kept = self._cut or (self.store.load("gamma", key) if self.store is not None else None)
        if kept is None:  # the first strokes decide: a choice takes longer than a result
            options, right = choose_cut(self, marks, heat, base)
            if not right:
                return options, {}
            kept = {
                "gamma": np.array(options.gamma),
                "tried": np.array([*right]),
                "right": np.array([*right.values()]),
                "drawn": np.asarray(marks.any(axis=(1, 2))),
            }
            if self.store is not None:
                self.store.save("gamma", key, kept)
        self._cut = kept
        right = dict(zip(kept["tried"].tolist(), kept["right"].tolist(), strict=True))
        return replace(base, gamma=float(kept["gamma"])), right

    def _at_full_size(
        self, scribbles: Scribbles, labels: NDArray[np.integer[Any]], options: CutOptions, chosen: dict[str, float]
    ) -> Segmentation:
        shape, n_classes = self.grid.full_shape, len(scribbles.classes)
        assert self._chances is not None
        heat = np.empty((n_classes, *shape), np.float32)
        full = np.zeros(shape, np.int32)
        for z in range(shape[0]):
            heat[:, z] = self.grid.enlarged(self._chances[:, z])
            indicator = np.stack([labels[z] == label for label in range(n_classes)])
            full[z] = self.grid.enlarged(indicator).argmax(axis=0)
        marked = scribbles.weights > 0
        for label, own in enumerate(scribbles.classes):
            full[marked & (scribbles.label_map.labels == own)] = label
        certain = np.take_along_axis(heat, full[None], axis=0)[0]
        uncertainty = np.where(marked, 0, 1 - certain).astype(np.float32)
        voxel = math.prod(self.images.space.spacing)
        organs = tuple(
            Organ(
                own,
                voxel * int((full == label).sum()),
                (
                    voxel * int(((full == label) & (heat[label] >= 0.75)).sum()),
                    voxel * int(((full == label) | (heat[label] >= 0.25)).sum()),
                ),
            )
            for label, own in enumerate(scribbles.classes)
            if label
        )
        own_labels = np.array(scribbles.classes)[full]
        label_map = LabelMap(own_labels, self.images.space, scribbles.label_map.table, self.images.source)
        suggestions = suggest_sections(uncertainty, scribbles.sections)
        return Segmentation(
            label_map, heat, uncertainty, organs, suggestions, options, chosen, notes=self._notes(scribbles, chosen)
        )

    def _notes(self, scribbles: Scribbles, chosen: Mapping[str, float]) -> tuple[str, ...]:
        notes = []
        if chosen and self._cut is not None:
            before = np.flatnonzero(self._cut["drawn"]).tolist()
            if tuple(before) != scribbles.sections:
                notes.append(
                    f"gamma was chosen when {len(before)} sections were drawn on, now there are "
                    f"{len(scribbles.sections)}; it is chosen anew in a new folder."
                )
            if max(chosen.values()) < FEW_RIGHT:
                notes.append(
                    f"Of strokes that were left out for a test {max(chosen.values()):.0%} came out right: the drawn "
                    "sections lie far apart; draw on sections between them."
                )
        n_classes = len(scribbles.classes)
        if self.model is not None and self.model.n_classes != n_classes:
            notes.append(
                f"The model knows {self.model.n_classes - 1} organs, the strokes {n_classes - 1}: only its features "
                "are used, not what it has learnt of its organs."
            )
        elif self.model is not None and scribbles.classes != tuple(range(n_classes)):
            notes.append("The strokes leave out numbers of organs: they are taken for the model's organs in order.")
        return tuple(notes)

    def _timed(self, stage: str) -> _Timer:
        return _Timer(self.seconds, stage)


@dataclass
class _Timer:
    seconds: dict[str, float]
    stage: str
    began: float = 0.0

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.monotonic() - self.began


def walker_options(grid: Grid, marks: NDArray[np.int32], settings: Settings, prior_weight: float) -> WalkerOptions:
    """What is given, else what suits the image's noise and how far apart the drawn sections are."""
    contrast, delta = settings.walker_contrast, settings.walker_delta
    if contrast is None:
        tissue = tissue_mask(grid.levels)
        change = np.linalg.norm(np.diff(grid.levels, axis=2), axis=-1)[tissue[:, :, 1:] & tissue[:, :, :-1]]
        contrast = max(LEAST_CONTRAST, 0.8 * float(np.median(change))) if change.size else LEAST_CONTRAST
    if delta is None:
        drawn = np.flatnonzero(marks.any(axis=(1, 2)))
        sections = float(np.median(np.diff(drawn))) if len(drawn) > 1 else len(marks) / 2
        gap = max(1.0, sections * grid.spacing[0] / math.sqrt(grid.spacing[1] * grid.spacing[2]))
        delta = min(0.05, max(1e-4, 0.4 / gap**2))
    return WalkerOptions(contrast, delta, prior_weight)


def sections_around(marks: NDArray[np.int32], z: int) -> slice:
    """From the drawn section below z, itself left out, to the one above; the stack where these lack a class."""
    drawn = np.flatnonzero(marks.any(axis=(1, 2)))
    part = slice(int(max(drawn[drawn < z], default=0)), int(min(drawn[drawn > z], default=len(marks) - 1)) + 1)
    return part if len(np.unique(marks[part])) > marks.max() else slice(0, len(marks))


def choose_cut(
    session: Session, marks: NDArray[np.int32], heat: NDArray[np.float32] | None, base: CutOptions
) -> tuple[CutOptions, dict[str, float]]:
    """The gamma at which most left-out strokes come out right, of equals .3, else the smallest.

    Each drawn section but the first and last loses its strokes in turn; the sections between the drawn ones around it,
    these included, are walked and cut without them.

    Returns
    -------
    options : CutOptions
        `base` with that gamma.
    right : dict of str to float
        Share of the left-out pixels that came out right, mean over classes and sections, by gamma.
    """
    drawn = np.flatnonzero(marks.any(axis=(1, 2))).tolist()
    inner = drawn[1:-1]
    inner = [inner[i] for i in np.linspace(0, len(inner) - 1, min(len(inner), MOST_LEFT_OUT)).round().astype(int)]
    right: dict[float, list[float]] = {gamma: [] for gamma in GAMMAS}
    for done, z in enumerate(inner):
        session.progress("choice of gamma", done, len(inner))
        below, above = max(d for d in drawn if d < z), min(d for d in drawn if d > z)
        part = slice(below, above + 1)
        without = marks.copy()
        without[z] = 0
        if len(np.unique(without[part])) <= marks.max():
            continue
        chances = session.spread(without, heat, part, anew=True)  # what is hidden must not shine through
        levels = np.rint(session.grid.levels[part]).astype(np.uint8)
        levels = levels[..., 0] if levels.shape[-1] == 1 else levels
        seeds = np.stack([without[part] == label + 1 for label in range(len(chances))])
        for gamma in GAMMAS:
            found = cut_labels(chances, levels, session.grid.spacing, replace(base, gamma=gamma), seeds)[z - below]
            truth = marks[z]
            right[gamma].append(
                float(np.mean([(found[truth == m] == m - 1).mean() for m in np.unique(truth[truth > 0])]))
            )
    scores = {gamma: float(np.mean(shares)) for gamma, shares in right.items() if shares}
    if not scores:
        return replace(base, gamma=1.0), {}
    best = max(scores, key=lambda gamma: (round(scores[gamma], 3), gamma == USUAL_GAMMA, -gamma))
    return replace(base, gamma=best), {f"{gamma:g}": share for gamma, share in scores.items()}


def suggest_sections(uncertainty: NDArray[np.float32], drawn: Sequence[int], most: int = 3) -> tuple[int, ...]:
    """Sections to draw on next: the most uncertain ones, apart from each other and from those that were drawn on."""
    total = uncertainty.sum(axis=(1, 2))
    apart = max(2, len(total) // 20)
    taken, chosen = list(drawn), list[int]()
    for z in np.argsort(-total, kind="stable").tolist():
        if total[z] > 0 and all(abs(z - other) >= apart for other in taken) and len(chosen) < most:
            chosen.append(z)
            taken.append(z)
    return tuple(chosen)


def segment(
    images: Volume,
    scribbles: Scribbles,
    settings: Settings,
    model: Model | None = None,
    device: str = "cpu",
    store: Store | None = None,
    progress: Progress = lambda *_: None,
) -> Segmentation:
    """Organs in 3D from strokes.

    Parameters
    ----------
    images : Volume
        The stack.
    scribbles : Scribbles
        Strokes for background and for one or more organs, on its grid.
    settings : Settings
        All settings.
    model : Model, optional
        Trained on other volumes with `fit`; else the network learns from the strokes.
    device : str
        ``cpu`` or ``cuda``.
    store : Store, optional
        Where network and features are kept: with more strokes only what follows is done again.
    progress : callable
        Called with a stage, what is done of it and what there is.

    Returns
    -------
    Segmentation
        At the images' own size.

    Raises
    ------
    ValueError
        If a setting is out of range, strokes and images are of different shapes, or the model does not fit.
    """
    if scribbles.label_map.space.shape != images.space.shape:
        raise ValueError(
            f"segment(): strokes have shape {scribbles.label_map.space.shape}, images {images.space.shape} (z, y, x); "
            "draw on the images themselves"
        )
    return Session.open(images, settings, model, device, store, progress).segment(scribbles)


def _check_kept(scribbles: Scribbles, marks: NDArray[np.int32]) -> None:
    """A stroke one pixel wide may vanish under another's on a coarser grid."""
    kept = set(np.unique(marks[marks > 0]).tolist())
    lost = [own for index, own in enumerate(scribbles.classes) if index + 1 not in kept]
    if lost:
        raise ValueError(f"segment(): strokes of label {lost[0]} are lost at this --working-um; give a smaller one")


def _weights(network: nn.Module) -> list[NDArray[Any]]:
    return [weight.detach().cpu().numpy() for weight in network.state_dict().values()]


def to_model(model: Model, record: Mapping[str, Any]) -> ModelFile:
    """A trained network with its settings and training record, to be written to a file."""
    about = {**asdict(model.settings), "n_classes": model.n_classes, "names": list(model.names)}
    weights = {**model.network.state_dict(), "pixels.features": model.features, "pixels.labels": model.labels}
    return ModelFile(TASK, weights, about, model.um_per_px, record)


def from_model(file: ModelFile) -> Model:
    """The trained network of a file, in evaluation.

    Raises
    ------
    ValueError
        If the file's settings or weights are not those of this method.
    """
    about = dict(file.settings)
    try:
        n_classes, names = int(about.pop("n_classes")), tuple(about.pop("names"))
        settings = Settings(**about)
        channels = int(file.weights["fields.0.down.0.0.weight"].shape[1])
        network = build(settings, n_classes, channels)
        weights = dict(file.weights)
        features, labels = weights.pop("pixels.features"), weights.pop("pixels.labels")
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        found = str(error).splitlines()[0]
        raise ValueError(
            f"from_model(): settings and weights do not fit together ({found}); train the model anew"
        ) from None
    return Model(network.eval(), settings, n_classes, file.pixel_size, features, labels, names)
