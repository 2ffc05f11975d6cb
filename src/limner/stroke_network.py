"""The network that tells an organ's pixels from others, trained on volumes labelled in full or on strokes.

Multi-field-of-view U-Net of Harada et al. 2019; its frozen features, a vector for each pixel; and what is learnt on
these from strokes within seconds: discriminative metric learning (Hu et al. 2014,
https://doi.org/10.1109/CVPR.2014.242) and the 1 x 1 layer, which gives heat maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from limner.augmentation import Augmentation, augment
from limner.losses.metric_learning import metric_learning_loss, sample_pairs
from limner.model_file import ModelFile
from limner.networks.embedding import HeatMapHead
from limner.networks.multi_field_unet import MultiFieldUNet
from limner.scribble_settings import MAGNIFICATIONS, Settings
from limner.volume import Volume
from limner.working_grid import Grid

TASK = "scribbles"
ARCHITECTURE = 2  # raised with every change of the network that its weights do not tell of
UNKNOWN = -1
SAMPLED_SECTIONS, SAMPLED_PIXELS = 60, 15_000  # of the volumes that a model was trained on
LAYER_BATCH, STROKES_SHARE = 2048, 0.1  # pixels a step of the 1 x 1 layer; share of strokes where there are others
Progress = Callable[[str, int, int], None]
Pixels = tuple[Tensor, Tensor]  # features (N, C) and classes (N,)


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


def in_order(model: Model, names: Sequence[str]) -> Model:
    """The model with its organs numbered in the order of `names`; as it is where these are not its organs' names."""
    places = _places(model, names)
    return model if places is None else replace(model, labels=places[model.labels], names=tuple(names))


def own_scores(model: Model, names: Sequence[str]) -> tuple[int, ...]:
    """For each class, in the order of `names`, the feature that is the network's own score; as in `described`."""
    places = _places(model, names)
    order = range(model.n_classes) if places is None else places.argsort().tolist()
    return tuple(label - model.n_classes for label in order)


def _places(model: Model, names: Sequence[str]) -> Tensor | None:
    """The class that each of the model's classes is among background and `names`; None where names differ."""
    learnt, wanted = ([name.casefold() for name in some] for some in (model.names, names))
    if len(set(learnt)) < len(learnt) or sorted(learnt) != sorted(wanted):
        return None
    return torch.tensor([0, *(1 + wanted.index(name) for name in learnt)])


# ---- metric learning on frozen features -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What tells classes apart.

    Parameters
    ----------
    mean, deviation : Tensor
        By which features are normalised, shape (C,).
    head : HeatMapHead
        Embedding and 1 x 1 layer.
    own : tuple of int
        For each class the feature that is the network's own score, to which the 1 x 1 layer's is added; empty: none.
    """

    mean: Tensor
    deviation: Tensor
    head: HeatMapHead
    own: tuple[int, ...] = ()

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Heat maps (B, L, Y, X) of features (B, C, Y, X)."""
        return torch.softmax(self.scores(features.movedim(1, -1)), dim=-1).movedim(-1, 1)

    def scores(self, pixels: Tensor) -> Tensor:
        """Logits (..., L) of pixels (..., C)."""
        scores: Tensor = self.head((pixels - self.mean) / self.deviation)
        return scores + pixels[..., list(self.own)] if self.own else scores


def learn(groups: Sequence[Pixels], n_classes: int, settings: Settings, own: Sequence[int] = ()) -> Learned:
    """Metric learning by pairs of pixels, then, with the embedding frozen, the 1 x 1 discriminating layer.

    Parameters
    ----------
    groups : sequence of (Tensor, Tensor)
        Features (N, C) and classes (N,) of the pixels drawn on; then, if any, of others whose class is known.
    n_classes : int
        L.
    settings : Settings
        Metric learning or not, tau, beta, lam, steps, seed.
    own : sequence of int
        For each class the feature that is the network's own score: the 1 x 1 layer then begins with 0 and corrects it,
        so that what the network knows is not learned anew from strokes. Empty where its classes are not those drawn.
    """
    features, labels = torch.cat([f for f, _ in groups]), torch.cat([c for _, c in groups])
    generator = torch.Generator().manual_seed(settings.seed)
    mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        learned = Learned(mean, deviation, HeatMapHead(features.shape[1], n_classes), tuple(own))
    if settings.metric_learning:
        _learn_metric(learned.head, (features - mean) / deviation, labels, settings, generator)
    if own:
        nn.init.zeros_(learned.head.discriminating.weight)
        nn.init.zeros_(learned.head.discriminating.bias)
    trained = learned.head.discriminating if settings.metric_learning else learned.head
    optimiser = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for _ in range(settings.learning_steps):
        drawn = _draw(groups, generator)
        loss = F.cross_entropy(learned.scores(features[drawn]), labels[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learned.head.eval()
    return learned


def _draw(groups: Sequence[Pixels], generator: torch.Generator) -> Tensor:
    """Indices of `LAYER_BATCH` pixels of all groups; of two, `STROKES_SHARE` are from the first."""
    first = LAYER_BATCH if len(groups) == 1 else round(STROKES_SHARE * LAYER_BATCH)
    sizes = [len(labels) for _, labels in groups]
    drawn = torch.randint(sizes[0], (first,), generator=generator)
    if len(groups) == 1:
        return drawn
    return torch.cat([drawn, sizes[0] + torch.randint(sizes[1], (LAYER_BATCH - first,), generator=generator)])


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


# ---- in a file ------------------------------------------------------------------------------------------------------


def to_model(model: Model, record: Mapping[str, Any]) -> ModelFile:
    """A trained network with its settings and training record, to be written to a file."""
    about = {**asdict(model.settings), "n_classes": model.n_classes, "names": list(model.names)}
    about["architecture"] = ARCHITECTURE
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
    if about.pop("architecture", None) != ARCHITECTURE:
        raise ValueError("from_model(): the model is of an earlier version of Limner; train it anew")
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
