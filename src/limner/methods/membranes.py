"""Membranes and cells in sections of electron micrographs, from a handful of traced sections.

For the electron microscopist who traced some sections and has hundreds. The method is that of Chen, Qi, Cheng and Heng
2016 [1]_: a deep contextual network whose three branches are classifiers of their own, and a watershed that closes
membranes that fade.

| step | function |
| --- | --- |
| the network, C1, C2, C3 | `limner.networks.contextual.ContextualNetwork` |
| the loss | `contextual_loss`, `auxiliary_weight`; lam is the optimiser's weight decay |
| mean over symmetries and crops | `membrane_map`, with `limner.networks.symmetry_average` |
| p_w and p_f = w_f p_w + (1 - w_f) p | `limner.watershed.closed_contours`, `fuse` |
| w_f on training sections | `choose_fusion` |

Departures, with what they gained (docs/benchmarks.md):

- Sections are brought to mean 0 and deviation 1 each, so that contrast may change from one to the next.
- Batch normalisation, Adam and a rate that falls along a cosine: a training of half an hour on two cores. `--optimiser
  sgd --rate 0.01 --decay-steps 2000 --patch 480` is the paper's.
- w_f is chosen together with the depth below which basins are one, for the best V_rand at the threshold 0.5, so that
  the map needs no tuned threshold.

References
----------
.. [1] Chen, Qi, Cheng, Heng, "Deep contextual networks for neuronal structure segmentation", AAAI 2016,
   https://doi.org/10.1609/aaai.v30i1.10141
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.augmentation import elastic
from limner.checkpoint import Checkpoint
from limner.inference import Image, Options, predict
from limner.metrics.neurites import thin, v_rand
from limner.model_file import ModelFile
from limner.networks.contextual import ContextualNetwork
from limner.networks.nuclei_unet import NucleiUNet
from limner.networks.symmetry_average import SymmetryAverage
from limner.tiles import Tile
from limner.watershed import cells_between, closed_contours, fuse

TASK = "membranes"
MEMBRANE = 1  # channel of the network's output; 0 is the cells'
UNKNOWN = -1
SAMPLED = 1_000_000  # pixels of a section that its mean and deviation are taken from
ROOM = 8  # a patch is cut out with an eighth of its side around it, so that bending brings in what lies beside it
WEIGHTS_OF_FUSION = tuple(round(0.1 * i, 1) for i in range(7))
DEPTHS = (0.02, 0.05, 0.1, 0.2)
Network = ContextualNetwork | NucleiUNet
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
    """Gradient steps; 0: 2,000, on a GPU 10,000 (paper: 2 to 3 hours on a GPU of 2015)."""
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
    seed: int = 0
    """Seed of every random draw."""

    def check(self) -> None:
        """Raise ValueError for a setting that cannot be."""
        above = ("batch", "patch", "rate")
        not_below = ("width", "auxiliary", "steps", "decay_steps", "weight_decay", "elastic_px", "contrast", "seed")
        for name in above:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name}: {getattr(self, name)} is not possible; give a number above 0")
        for name in not_below:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not possible; give 0 or more")
        if self.patch % 16:
            raise ValueError(f"--patch: {self.patch} is no multiple of 16; give 128, 256, 480, ...")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout: {self.dropout} is no share; give 0 or more, below 1")
        if self.network not in ("contextual", "unet") or self.optimiser not in ("adam", "sgd"):
            raise ValueError("Settings(): network is contextual or unet, optimiser adam or sgd")


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
    """

    image: NDArray[Any]
    membrane: NDArray[np.bool_]


@dataclass(frozen=True)
class Model:
    """A trained network.

    Parameters
    ----------
    network : ContextualNetwork or NucleiUNet
        In evaluation.
    settings : Settings
        It was trained with.
    fusion : Fusion
        Chosen on the traced sections.
    um_per_px : float
        Pixel size of the traced sections, micrometres; NaN: not stated.
    """

    network: Network
    settings: Settings
    fusion: Fusion
    um_per_px: float = math.nan


# ---- training -------------------------------------------------------------------------------------------------------


def build(settings: Settings) -> Network:
    """The untrained network of `settings`, its weights drawn by `Settings.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.network == "unet":
            width = settings.width or 12
            return NucleiUNet(in_channels=1, widths=tuple(width * 2**level for level in range(5)))
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
    """Learning rate of a step."""
    if settings.decay_steps:
        return float(settings.rate * 0.1 ** (step // settings.decay_steps))
    return settings.rate * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def grey_statistics(image: Image) -> tuple[float, float]:
    """Mean and deviation of a section, of at most `SAMPLED` pixels spread over it."""
    stride = max(1, math.isqrt(max(1, image.shape[0] * image.shape[1] // SAMPLED)))
    rows = range(0, image.shape[0], stride)
    some = np.concatenate([np.asarray(image[y : y + 1, ::stride], np.float64).ravel() for y in rows])
    return float(some.mean()), max(float(some.std()), 1e-6)


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
    network : ContextualNetwork or NucleiUNet
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
        If the loss becomes infinite or no number.
    """
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
    for step in range(len(losses), settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, settings)
        images, targets = _batch(prepared, settings, generator)
        images = images.to(device, memory_format=torch.channels_last)
        with torch.random.fork_rng(devices=[]):  # what drops out follows from the step, also in one that goes on
            torch.manual_seed(settings.seed + step)
            scores = network.scores(images) if isinstance(network, ContextualNetwork) else [network(images)]
        auxiliary = auxiliary_weight(step, settings) if len(scores) > 1 else 0.0
        loss = contextual_loss(scores, targets.to(device), auxiliary)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"train(): the loss is {losses[-1]} at step {step + 1}; give a lower rate (--rate)")
        if checkpoint:
            checkpoint.keep(network, optimiser, generator, losses)
        progress(step + 1, settings.steps)
    network.eval()
    return losses


def _prepared(section: TracedSection, patch: int) -> Tensor:
    """Grey levels of mean 0 and deviation 1, membrane and what is known: (3, Y, X), at least of the patch's size."""
    mean, deviation = grey_statistics(section.image)
    image = (np.asarray(section.image, np.float32) - mean) / deviation
    maps = np.stack([image, section.membrane.astype(np.float32), np.ones(image.shape, np.float32)]).astype(np.float32)
    missing = [(0, 0), *((0, max(0, patch - n)) for n in image.shape)]
    return torch.from_numpy(np.concatenate([np.pad(maps[:2], missing, mode="symmetric"), np.pad(maps[2:], missing)]))


def _batch(sections: Sequence[Tensor], settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches, each turned, mirrored, bent and changed in contrast: images (B, 1, Y, X) and classes (B, Y, X)."""

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
    return batch[:, :1] * (1 + change[0]) + change[1], targets


def fit(
    sections: Sequence[TracedSection],
    settings: Settings,
    um_per_px: float = math.nan,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
    checkpoint: Checkpoint | None = None,
    validation: Sequence[TracedSection] = (),
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
    validation : sequence of TracedSection
        Others, to choose the fusion on; where there are none it is chosen on `sections`.

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
    chosen_on, options = validation or sections, Options(device="cuda" if device.startswith("cuda") else "cpu")
    fusion = choose_fusion([membrane_map(network, s.image, options=options) for s in chosen_on], chosen_on)
    return Model(network, settings, fusion, um_per_px), losses


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
    return replace(settings, steps=settings.steps or (10_000 if device.startswith("cuda") else 2_000))


# ---- from an image to membranes -----------------------------------------------------------------------------------


def membrane_map(
    network: Network,
    image: Image,
    options: Options | None = None,
    *,
    symmetries: bool = True,
    shifts: Sequence[int] = (0,),
    device: str = "cpu",
    write: Callable[[Tile, NDArray[np.float32]], None] | None = None,
    **more: Any,
) -> NDArray[np.float32]:
    """p: probability of membrane of a section, mean over symmetries and crops.

    Parameters
    ----------
    network : ContextualNetwork or NucleiUNet
        Trained.
    image : array-like
        Grey, shape (Y, X), or anything that gives the pixels of two slices.
    options : Options, optional
        Windows; nothing in them changes the result.
    symmetries : bool
        Average over the eight symmetries.
    shifts : sequence of int
        Average over crops that begin so many pixels earlier (paper: overlapping crops).
    device : str
        Where to compute.
    write : callable, optional
        Called with each tile and its probabilities (y, x) in place of the result, which is then empty.
    **more
        As of `limner.inference.predict`.

    Returns
    -------
    ndarray of float32
        Shape (Y, X), in [0, 1].
    """
    mean, deviation = grey_statistics(image)
    found = np.zeros(image.shape if write is None else (0, 0), np.float32)

    def keep(tile: Tile, probabilities: NDArray[np.float32]) -> None:
        found[tile.kept.slices] = probabilities

    def prepare(pixels: NDArray[Any]) -> NDArray[np.float32]:
        return (pixels.astype(np.float32) - np.float32(mean)) / np.float32(deviation)

    hand_over = write or keep
    chosen = options or Options(device="cuda" if device.startswith("cuda") else "cpu")
    averaged = SymmetryAverage(network, symmetries, shifts)
    predict(averaged, image, lambda tile, p: hand_over(tile, p[MEMBRANE]), chosen, prepare=prepare, **more)
    return found


def fused_map(probability: NDArray[np.float32], fusion: Fusion) -> NDArray[np.float32]:
    """p_f of a section, shape (Y, X): its map with the contours that the watershed closes."""
    if fusion.w_f == 0:
        return probability
    return fuse(probability, closed_contours(probability, fusion.sigma, fusion.depth), fusion.w_f)


def choose_fusion(
    maps: Sequence[NDArray[np.float32]],
    sections: Sequence[TracedSection],
    progress: Progress = lambda *_: None,
) -> Fusion:
    """The w_f and depth with the best V_rand at the threshold 0.5; of equals the smaller w_f, then depth.

    Parameters
    ----------
    maps : sequence of ndarray of float32
        p of each section, shape (Y, X).
    sections : sequence of TracedSection
        With the truth.
    progress : callable
        Called with the depths tried and to be tried.
    """
    truths = [cells_between(section.membrane) for section in sections]
    best = Fusion(0.0, DEPTHS[0], v_rand=-1.0)
    for tried, depth in enumerate(DEPTHS, start=1):
        contours = [closed_contours(p, best.sigma, depth) for p in maps]
        for w_f in WEIGHTS_OF_FUSION:
            fused = [fuse(p, lines, w_f) for p, lines in zip(maps, contours, strict=True)]
            score = float(np.mean([v_rand(thin(f < 0.5), t).score for f, t in zip(fused, truths, strict=True)]))
            if score > (best.v_rand or 0.0):
                best = Fusion(w_f, depth, best.sigma, score)
        progress(tried, len(DEPTHS))
    return best


# ---- in a file ------------------------------------------------------------------------------------------------------


def to_model(model: Model, record: Mapping[str, Any]) -> ModelFile:
    """A trained network with its settings, fusion and training record, to be written to a file."""
    about = {**asdict(model.settings), "fusion": asdict(model.fusion)}
    return ModelFile(TASK, model.network.state_dict(), about, model.um_per_px, record)


def from_model(file: ModelFile) -> Model:
    """The trained network of a file, in evaluation.

    Raises
    ------
    ValueError
        If the file's settings or weights are not those of this method.
    """
    about = dict(file.settings)
    try:
        fusion = Fusion(**about.pop("fusion"))
        settings = Settings(**about)
        network = build(settings)
        network.load_state_dict(dict(file.weights))
    except (KeyError, TypeError, RuntimeError) as error:
        found = str(error).splitlines()[0]
        raise ValueError(
            f"from_model(): settings and weights do not fit together ({found}); train the model anew"
        ) from None
    network.eval()
    return Model(network, settings, fusion, file.pixel_size)
