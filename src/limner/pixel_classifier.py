"""A network that classifies the pixels of a stack's sections: made, trained on all labelled sections, then adapted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from limner.augmentation import Augmentation
from limner.networks.fcn_vgg import IMAGENET_DEVIATION, IMAGENET_MEAN, FCN8s, load_vgg16_weights
from limner.networks.unet import UNet
from limner.run_record import hash_file
from limner.training import Schedule, train, with_coordinates


@dataclass(frozen=True)
class ClassifierOptions:
    """Which network, and how it is trained.

    Parameters
    ----------
    network : {'unet', 'fcn_vgg16'}
        The small U-Net, which also sees where a pixel lies, or FCN-8s on VGG-16.
    vgg16_weights : str
        File of VGG-16 weights; empty: from scratch.
    network_pixels : int
        Longer side of the reduced sections.
    training_steps : int
        Gradient steps of global training, four sections each.
    halved : float
        The part of global training, from its beginning, in which the U-Net sees sections half as long and wide.
    placement : float
        How far training sections are rotated, shifted and scaled, as a share of `Augmentation`'s ranges.
    trained_layers : {'last', 'all'}
        What is moved after global training.
    seed : int
        Seed of weights and augmentation.
    """

    network: Literal["unet", "fcn_vgg16"] = "unet"
    vgg16_weights: str = ""
    network_pixels: int = 136
    training_steps: int = 4000
    halved: float = 0.0
    placement: float = 0.3
    trained_layers: Literal["last", "all"] = "last"
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What global training depends on; of a file of weights its content, not its name.

        Raises
        ------
        OSError
            If that file cannot be read.
        """
        from_file = self.network == "fcn_vgg16" and self.vgg16_weights
        weights = hash_file(Path(self.vgg16_weights)) if from_file else ""
        return {**asdict(self), "trained_layers": "", "vgg16_weights": weights}


@dataclass
class PixelClassifier:
    """A network with the reduced sections that it sees.

    Later training moves a copy of its `top`: the last layer, for which `fixed` gives features computed once, or all of
    it, for which `fixed` gives the network's input.

    Parameters
    ----------
    network : nn.Module
        A UNet or an FCN8s.
    images : Tensor
        Reduced sections in [0, 1], shape (Z, C, y, x).
    labels : ndarray of int
        Reduced labels, shape (Z, y, x).
    positions : Tensor
        Section positions, shape (Z,), mm.
    classes : list of int
        Structures that the outputs stand for; empty where they stand for tissue types.
    options : ClassifierOptions
        Which network, and how it is trained.
    """

    network: nn.Module
    images: Tensor
    labels: NDArray[Any]
    positions: Tensor
    classes: list[int]
    options: ClassifierOptions

    @property
    def places(self) -> bool:
        """Whether the network sees coordinates."""
        return isinstance(self.network, UNet)

    def input(self, images: Tensor, indices: Sequence[int] | Tensor) -> Tensor:
        """What the network takes for sections `indices`, whose (perhaps changed) pixels are `images`.

        Parameters
        ----------
        images : Tensor
            Shape (B, C, y, x), in [0, 1].
        indices : sequence of int
            Which sections they are, B of them.

        Returns
        -------
        Tensor
            With three channels more, of coordinates, for a UNet; less ImageNet's mean and over its deviation, with
            three channels, for an FCN8s.
        """
        if not self.places:
            mean, deviation = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
            return (images - mean) / deviation  # grey becomes three channels
        z = self.positions[torch.as_tensor(indices)]
        return with_coordinates(images, z, (float(self.positions[0]), float(self.positions[-1])))

    def fixed(self, images: Tensor, indices: Sequence[int] | Tensor) -> Tensor:
        """The part that is computed once: features before the last layer, or the network's input."""
        with torch.no_grad():
            x = self.input(images, indices)
            return self.network.features(x) if self._only_last else x  # type: ignore[operator]

    @property
    def _only_last(self) -> bool:
        return isinstance(self.network, UNet) and self.options.trained_layers == "last"

    def top(self, structures: Sequence[int], generator: torch.Generator) -> nn.Module:
        """A copy of what later training moves, with one output for each of `structures`, in eval mode.

        Parameters
        ----------
        structures : sequence of int
            Where all are among `classes` their outputs are kept, else the outputs begin anew (those of FCN8s always).
        generator : torch.Generator
            Decides new weights.
        """
        top: Any = copy.deepcopy(self.network.head if self._only_last else self.network)
        known = [self.classes.index(s) for s in structures] if set(structures) <= set(self.classes) else None
        if isinstance(top, FCN8s):
            top.replace_head(len(structures))
            return top.eval()
        head = top if isinstance(top, nn.Conv2d) else top.head
        assert isinstance(head, nn.Conv2d)
        new: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, head.in_channels, len(structures), 1)
        new.to(head.weight.device)
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

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The network's weights, for storing."""
        return {name: weight.cpu().numpy() for name, weight in self.network.state_dict().items()}

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take weights from `to_arrays`, and go to eval mode."""
        self.network.load_state_dict({name: torch.from_numpy(np.asarray(a)) for name, a in arrays.items()})
        self.network.eval()

    def targets(self, z: int, structures: Sequence[int]) -> Tensor:
        """Labels of a labelled section on the reduced grid as indices into `structures`; -1: none of them."""
        lookup = {s: i for i, s in enumerate(structures)}
        found = np.vectorize(lambda s: lookup.get(int(s), -1), otypes=[np.int64])(self.labels[z])
        return torch.from_numpy(found).to(self.images.device)


def enlarged_window(values: Tensor, shape: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """A window of values (L, y, x) enlarged linearly to (L, *shape); the rest is not computed.

    Parameters
    ----------
    values : Tensor
        On a coarse grid that covers the same section.
    shape : tuple of int
        (Y, X) of the section, of which the grid has no more pixels along y and x.
    rows, columns : slice
        The window, with both ends given.

    Returns
    -------
    Tensor
        Shape (L, rows, columns): a part of what ``F.interpolate(..., mode='bilinear')`` gives, but for rounding.
    """
    places = [_between(n, full, at) for n, full, at in zip(values.shape[1:], shape, (rows, columns), strict=True)]
    (top, below, down), (left, right, across) = ([part.to(values.device) for part in place] for place in places)
    first = int(top[0])
    needed = values[:, first : int(below[-1]) + 1]
    along = needed[:, :, left] * (1 - across) + needed[:, :, right] * across
    return along[:, top - first] * (1 - down[:, None]) + along[:, below - first] * down[:, None]


def _between(n: int, full: int, at: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Which two of `n` pixels lie around each of a part of `full`, and how far from the first to the second it lies."""
    position = ((torch.arange(at.start, at.stop) + 0.5) * (n / full) - 0.5).clamp_min(0)
    before = position.long()
    return before, (before + 1).clamp_max(n - 1), position - before


def network_log_probabilities(top: nn.Module, inputs: Tensor) -> Tensor:
    """log p_d, (B, L, y, x)."""
    return torch.log_softmax(top(inputs), dim=1)


def make_classifier(
    images: NDArray[np.float32],
    labels: NDArray[Any],
    labelled: Sequence[int],
    positions: NDArray[np.float64],
    options: ClassifierOptions,
    tissues: Mapping[int, int] | None = None,
    device: str = "cpu",
) -> PixelClassifier:
    """A fresh network with the reduced sections it will see.

    Parameters
    ----------
    images : ndarray
        8-bit grey levels, shape (Z, C, Y, X).
    labels : ndarray of int
        Shape (Z, Y, X).
    labelled : sequence of int
        Labelled sections.
    positions : ndarray
        Section positions, shape (Z,), mm.
    options : ClassifierOptions
        Which network.
    tissues : mapping of int to int, optional
        Tissue type of each structure; then these are its classes, and `PixelClassifier.top` begins anew.
    device : str
        Where to compute.

    Returns
    -------
    PixelClassifier
        Not trained yet; its sections keep their shape where that is smaller than `network_pixels`.
    """
    shape = images.shape[2:]
    shrink = max(1.0, max(shape) / options.network_pixels)
    level = (max(1, round(shape[0] / shrink)), max(1, round(shape[1] / shrink)))
    reduced = (
        F.interpolate(torch.from_numpy(images), size=level, mode="bilinear", align_corners=False, antialias=True) / 255
    )
    at = [((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(level, shape, strict=True)]
    small = labels[:, at[0]][:, :, at[1]]
    seen = {0, *np.unique(labels[list(labelled)]).tolist()}
    classes = sorted({0, *tissues.values()} if tissues else seen)
    network: nn.Module
    with torch.random.fork_rng():  # the caller's random numbers go on as if nothing had been drawn
        torch.manual_seed(options.seed)
        if options.network == "unet":
            network = UNet(len(classes), images.shape[1] + 3, widths=(16, 32, 64, 128))
        else:
            network = FCN8s(len(classes))
            if options.vgg16_weights:
                load_vgg16_weights(network, Path(options.vgg16_weights))
    return PixelClassifier(
        network.to(device),
        reduced.to(device),
        small,
        torch.from_numpy(positions).float().to(device),
        [] if tissues else classes,
        options,
    )


def train_globally(
    classifier: PixelClassifier,
    labelled: Sequence[int],
    part: tuple[float, float],
    tissues: Mapping[int, int] | None,
    progress: Callable[[int, int], None],
) -> dict[str, NDArray[Any]]:
    """Stage 1: a part of the schedule, on labelled sections; tissue types where an ontology gives them.

    Parameters
    ----------
    classifier : PixelClassifier
        Its network is changed in place.
    labelled : sequence of int
        Sections to train on.
    part : tuple of float
        First and last fraction of the schedule to run.
    tissues : mapping of int to int, optional
        As for `make_classifier`.
    progress : callable
        Called with steps done and steps in all.

    Returns
    -------
    dict of str to ndarray
        The network's weights, for storing.
    """
    options = classifier.options
    classes = classifier.classes or sorted({0, *(tissues or {}).values()})
    lookup = np.vectorize(lambda s: classes.index((tissues or {}).get(int(s), 0 if tissues else int(s))))
    labels = classifier.labels[list(labelled)]
    values, inverse = np.unique(labels, return_inverse=True)
    targets = torch.from_numpy(lookup(values)[inverse].reshape(labels.shape)).long()
    batch = min(4, len(labelled))
    fcn = isinstance(classifier.network, FCN8s)
    rate, halved = (1e-4, 0.0) if fcn else (3e-3, options.halved)
    schedule = Schedule(options.training_steps, *part, batch=batch, rate=rate, halved=halved)
    groups = None
    if isinstance(classifier.network, FCN8s):
        first, last = classifier.network.parameter_groups(schedule.rate)
        groups = [{"params": first["params"], "scale": 1.0}, {"params": last["params"], "scale": 20.0}]
    index = torch.tensor(list(labelled))
    seed = options.seed + round(1000 * part[0])
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout draws from torch's own generator
        train(
            classifier.network,
            classifier.images[index],
            targets.to(classifier.images.device),
            schedule,
            lambda images, chosen: classifier.input(images, index[chosen]),
            torch.Generator().manual_seed(seed),
            augmentation=Augmentation().moved_by(options.placement),
            groups=groups,
            progress=progress,
        )
    return classifier.to_arrays()
