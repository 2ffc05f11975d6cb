"""Find all nuclei on H&E images when only some are outlined.

For the pathologist who outlined some nuclei on some tiles of their own stain and wants the rest, as objects. The method
is that of Mercadier, Besbinar and Frossard 2019 [1]_: an unlabelled pixel may be background or a nucleus that nobody
drew, so the background term of the cross-entropy is weighted by how sure background is at each pixel.

==================================  =================================================
equation                            function
==================================  =================================================
m, the distance term                `distance_weight`
B, the cluster term                 `background_cluster`
m_hat                               `background_weight`
the loss                            `weighted_background_loss` (minus signs put back)
==================================  =================================================

Departures: the paper stops at a pixel mask; `separate` splits it into nuclei by a watershed on the distance transform.
alpha, beta, the disc and lam were chosen on MoNuSeg tiles held out (docs/benchmarks.md). The schedule is shorter than
the paper's 100,000 steps, so that it fits two processor cores, and ends in a cooldown; the loss is divided by what is
known, so that its size does not hang on how much is annotated.

References
----------
.. [1] Mercadier, Besbinar, Frossard, "Automatic segmentation of nuclei in histopathology images using encoding-decoding
   convolutional neural networks", ICASSP 2019
"""

# mypy: disable-error-code="no-untyped-call"
# scikit-image has no type hints.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from skimage.color import rgb2hed
from skimage.measure import label
from skimage.morphology import disk, local_maxima, remove_small_holes, remove_small_objects
from skimage.segmentation import relabel_sequential, watershed
from torch import Tensor, nn
from tyro.conf import arg

from limner.augmentation import elastic
from limner.checkpoint import Checkpoint
from limner.inference import Image, Options, predict
from limner.model_file import ModelFile
from limner.networks.tiled_unet import TiledUNet
from limner.tiles import Tile

Device = Literal["auto", "cpu", "cuda"]
TASK = "nuclei"
NUCLEUS, BACKGROUND = 1, 0  # channels of the network's output
RANGES = {  # of each number in Settings, both ends included; ANY where it is not named
    **{"um_per_px": (0.05, 10), "beta": (1e-6, 1e6), "width": (1, 256), "patch": (32, 4096), "stride": (1, 4096)},
    **dict.fromkeys(("least_weight", "cluster_weight", "least_foreground", "least_background"), (0, 1)),
    **{"steps": (1, 1e9), "batch": (1, 4096), "rate": (1e-12, 1), "decay": (1e-6, 1), "decay_steps": (1, 1e9)},
    **{"cooldown": (0, 1), "seed": (0, 2**31 - 1)},
}
ANY = (0, 1000)


@dataclass(frozen=True)
class Settings:
    """What can be chosen. Values of the paper are named; a default that differs says why."""

    um_per_px: Annotated[float, arg(name="network-um-per-px")] = 0.25  # --um-per-px is the images' own
    """Pixel size at which the network works, micrometres; images of another are resampled. 0.25 is 40x."""
    loss: Literal["weighted", "plain"] = "weighted"
    """'weighted' background (paper), or 'plain': what is not annotated counts as background, for comparison."""
    alpha_um: float = 1.0
    """Up to this distance from annotated nuclei background is sure, micrometres (paper: no value; so on MoNuSeg)."""
    beta: float = 1.0
    """Decay of that certainty beyond, per micrometre (paper: no value; so on MoNuSeg)."""
    least_weight: float = 0.05
    """Certainty below this counts as 0 (paper: 0.05)."""
    cluster_weight: float = 0.5
    """lam: certainty of background in the lighter cluster of pixels (paper: 0.5)."""
    disc_um: float = 1.0
    """Radius by which that cluster is eroded, micrometres (paper: no value; so on MoNuSeg)."""
    width: int = 8
    """Channels of the network's first level; they double at each of five (paper: 64; 8 suffices for 2 cores)."""
    patch: int = 256
    """Side of training patches, pixels (paper: 256)."""
    stride: int = 128
    """Step between patches, pixels (paper: 128)."""
    least_foreground: float = 0.1
    """Share of annotated nucleus pixels, dilated, that a patch needs (paper: 0.1)."""
    least_background: float = 0.4
    """Share of pixels with background weight that a patch needs (paper: 0.4)."""
    steps: int = 1000
    """Gradient steps (paper: 100,000; 1,000 take some 10 minutes on 2 cores)."""
    batch: int = 6
    """Patches a step (paper: 6)."""
    rate: float = 1e-3
    """Adam's learning rate at first (paper: 1e-3)."""
    decay: float = 0.95
    """Factor on the rate every `decay_steps` (paper: 0.95)."""
    decay_steps: int = 1000
    """Steps between decays (paper: 1,000)."""
    least_rate: float = 1e-5
    """The rate does not fall under this (paper: 1e-5)."""
    cooldown: float = 0.3
    """Last share of the steps, in which the rate falls to `least_rate` (paper: 0; short training gains by it)."""
    weight_decay: float = 1e-5
    """gamma, on the squared weights (paper: 1e-5)."""
    elastic_um: float = 1.0
    """Standard deviation of elastic displacements, micrometres (paper: elastic, no value)."""
    seed: int = 0
    """Seed of every random draw."""

    def check(self) -> None:
        """Raise ValueError for a number out of range or a loss that is none of the choices."""
        for name, value in asdict(self).items():
            if name == "loss":
                continue
            low, high = RANGES.get(name, ANY)
            if not low <= value <= high:  # NaN is not
                raise ValueError(f"Settings(): {name} is {value}; give a number from {low:g} to {high:g}")
        if self.loss not in ("weighted", "plain"):
            raise ValueError(f"Settings(): loss is {self.loss!r}; give weighted or plain")


@dataclass(frozen=True)
class Separation:
    """How the probability of nucleus becomes objects. The paper stops at a mask; this is the least that splits it."""

    threshold: float = 0.5
    """Probability above which a pixel belongs to a nucleus (paper: the larger of the two maps, 0.5)."""
    split: bool = True
    """Split touching nuclei by a watershed on the distance to the border."""
    neck_um: float = 0.25
    """How much deeper than the neck between them two nuclei must be, micrometres."""
    smooth_um: float = 0.25
    """Gaussian smoothing of the distance, micrometres."""
    least_um2: float = 5.0
    """Smaller objects are dropped, square micrometres."""
    hole_um2: float = 20.0
    """Smaller holes are filled, square micrometres: pale nuclei, not the lumen of a gland."""


# ---- what is known about a pixel ----------------------------------------------------------------------------------


def distance_weight(nuclei: NDArray[np.bool_], alpha: float, beta: float, least: float = 0.05) -> NDArray[np.float32]:
    """m: 1 up to `alpha` from an annotated nucleus, exp(-beta (d - alpha)) beyond, 0 once under `least`.

    Parameters
    ----------
    nuclei : ndarray of bool
        Annotated nuclei, shape (Y, X).
    alpha : float
        Pixels.
    beta : float
        Per pixel.
    least : float
        In [0, 1].

    Returns
    -------
    ndarray of float32
        Shape (Y, X), in [0, 1]; all 0 where nothing is annotated.

    Examples
    --------
    >>> distance_weight(np.array([[True, False, False, False, False]]), alpha=1.0, beta=1.0, least=0.2).round(2)
    array([[1.  , 1.  , 0.37, 0.  , 0.  ]], dtype=float32)
    """
    if not nuclei.any():
        return np.zeros(nuclei.shape, dtype=np.float32)
    distance = ndimage.distance_transform_edt(~nuclei)
    weight = np.exp(-beta * np.maximum(distance - alpha, 0))
    return np.where(weight < least, 0, weight).astype(np.float32)


def background_cluster(image: NDArray[np.uint8], radius: int, seed: int = 0) -> NDArray[np.bool_]:
    """B, eroded: the larger of two clusters of pixels by their haematoxylin and eosin, less a disc's radius.

    Parameters
    ----------
    image : ndarray of uint8
        RGB, shape (Y, X, 3).
    radius : int
        Of the disc, pixels.
    seed : int
        Of k-means.

    Returns
    -------
    ndarray of bool
        Shape (Y, X); all False where the image has one colour only.
    """
    stains = rgb2hed(image)[..., :2].reshape(-1, 2)
    if (stains.std(axis=0) < 1e-6).any():
        return np.zeros(image.shape[:2], dtype=bool)
    _, cluster = kmeans2(stains, 2, minit="++", seed=seed)
    larger = cluster.reshape(image.shape[:2]) == np.bincount(cluster, minlength=2).argmax()
    return ndimage.binary_erosion(larger, disk(radius), border_value=1) if radius else larger


def background_weight(nuclei: NDArray[np.bool_], cluster: NDArray[np.bool_], settings: Settings) -> NDArray[np.float32]:
    """m_hat: the larger of m and lam B; 0 on annotated nuclei, which are never background.

    Parameters
    ----------
    nuclei, cluster : ndarray of bool
        Shape (Y, X), at `Settings.um_per_px`.
    settings : Settings
        alpha, beta, lam.

    Returns
    -------
    ndarray of float32
        Shape (Y, X), in [0, 1]; never under m but on the nuclei themselves.
    """
    if settings.loss == "plain":
        return (~nuclei).astype(np.float32)
    px = settings.um_per_px
    m = distance_weight(nuclei, settings.alpha_um / px, settings.beta * px, settings.least_weight)
    return np.where(nuclei, 0, np.maximum(m, settings.cluster_weight * cluster)).astype(np.float32)


def weighted_background_loss(logits: Tensor, nuclei: Tensor, weight: Tensor) -> Tensor:
    """- sum y log p_fg - sum m_hat (1 - y) log p_bg, over the sum of what is known.

    Parameters
    ----------
    logits : Tensor
        Background and nucleus, shape (B, 2, Y, X).
    nuclei : Tensor
        y: 1 on annotated nuclei, else 0, shape (B, Y, X).
    weight : Tensor
        m_hat, shape (B, Y, X), in [0, 1]. Pixels with y = 0 and m_hat = 0 are unknown: no loss and no gradient.

    Returns
    -------
    Tensor
        Scalar, nats a known pixel; 0 where nothing is known.
    """
    log_p = torch.log_softmax(logits, dim=1)
    known = weight * (1 - nuclei)
    total = -(nuclei * log_p[:, NUCLEUS] + known * log_p[:, BACKGROUND]).sum()
    return total / (nuclei + known).sum().clamp_min(1)


# ---- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnotatedTile:
    """An image of which some nuclei are annotated, at `Settings.um_per_px`.

    Parameters
    ----------
    image : ndarray of uint8
        RGB, shape (Y, X, 3).
    nuclei : ndarray of bool
        Annotated nuclei, shape (Y, X).
    weight : ndarray of float32
        m_hat, shape (Y, X).
    """

    image: NDArray[np.uint8]
    nuclei: NDArray[np.bool_]
    weight: NDArray[np.float32]

    @classmethod
    def from_labels(
        cls, image: NDArray[np.uint8], labels: NDArray[np.integer[Any]], settings: Settings
    ) -> AnnotatedTile:
        """From instance labels (Y, X) in which 0 is not annotated; smaller images are filled up with unknown pixels."""
        nuclei = labels > 0
        cluster = background_cluster(image, round(settings.disc_um / settings.um_per_px), settings.seed)
        weight = background_weight(nuclei, cluster, settings)
        missing = [(0, max(0, settings.patch - n)) for n in nuclei.shape]
        image = np.pad(image, [*missing, (0, 0)], mode="symmetric")
        return cls(image, np.pad(nuclei, missing), np.pad(weight, missing))


def choose_patches(tile: AnnotatedTile, settings: Settings) -> list[tuple[int, int]]:
    """First row and column of the patches to train on.

    Kept are those with enough annotated nucleus (dilated) and enough known background; where a tile has none, as when
    few nuclei are annotated, those with any annotated nucleus.
    """
    around = max(1, round(settings.alpha_um / settings.um_per_px))
    dilated = ndimage.binary_dilation(tile.nuclei, disk(around))
    rows, columns = (_starts(n, settings.patch, settings.stride) for n in tile.nuclei.shape)
    strict, loose = [], []
    for y in rows:
        for x in columns:
            part = slice(y, y + settings.patch), slice(x, x + settings.patch)
            if tile.nuclei[part].any():
                loose.append((y, x))
                enough = dilated[part].mean() >= settings.least_foreground
                if enough and (tile.weight[part] > 0).mean() >= settings.least_background:
                    strict.append((y, x))
    return strict or loose


def _starts(length: int, patch: int, stride: int) -> list[int]:
    """Steps along an axis, the last patch ending where the image ends."""
    return sorted({*range(0, length - patch, stride), length - patch})


def rate_at(step: int, settings: Settings) -> float:
    """Learning rate of a step: times `decay` every `decay_steps`, in the end down to `least_rate`, never under it."""
    rate = settings.rate * settings.decay ** (step // settings.decay_steps)
    left = (settings.steps - step) / max(1.0, settings.cooldown * settings.steps)
    return max(rate * min(1.0, left), settings.least_rate)


def train(
    network: nn.Module,
    tiles: Sequence[AnnotatedTile],
    settings: Settings,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Minimise `weighted_background_loss` on augmented patches (Adam); the network is changed in place.

    Parameters
    ----------
    network : nn.Module
        (B, 3, Y, X) in [0, 1] to logits (B, 2, Y, X).
    tiles : sequence of AnnotatedTile
        At least one with an annotated nucleus.
    settings : Settings
        Schedule, patches, augmentation.
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
        If no tile has an annotated nucleus, or the loss becomes infinite or no number.
    """
    patches = [(tile, at) for tile in tiles for at in choose_patches(tile, settings)]
    if not patches:
        raise ValueError("train(): no nucleus is annotated on any image; annotate some")
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate, weight_decay=settings.weight_decay)
    network.train().to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # up to twice as fast on a CPU
    losses = checkpoint.restore(network, optimiser, generator) if checkpoint else []
    for step in range(len(losses), settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, settings)
        chosen = torch.randint(len(patches), (settings.batch,), generator=generator).tolist()
        images, nuclei, weights = _batch([patches[i] for i in chosen], settings, generator)
        loss = weighted_background_loss(network(images.to(device)), nuclei.to(device), weights.to(device))
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


def _batch(
    patches: Sequence[tuple[AnnotatedTile, tuple[int, int]]], settings: Settings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, each turned, mirrored and bent in its own way: images (B, 3, Y, X), nuclei and weights (B, Y, X)."""
    stacked = []
    for tile, (y, x) in patches:
        part = slice(y, y + settings.patch), slice(x, x + settings.patch)
        image = torch.from_numpy(tile.image[part]).permute(2, 0, 1) / 255
        known = torch.from_numpy(np.stack([tile.nuclei[part].astype(np.float32), tile.weight[part]]))
        turned = torch.rot90(torch.cat([image, known]), int(torch.randint(4, (), generator=generator)), (1, 2))
        stacked.append(turned.flip(1) if torch.rand((), generator=generator) < 0.5 else turned)
    batch = elastic(torch.stack(stacked), settings.elastic_um / settings.um_per_px, generator)
    nuclei = (batch[:, 3] > 0.5).float()
    return batch[:, :3].contiguous(memory_format=torch.channels_last), nuclei, batch[:, 4] * (1 - nuclei)


def build(settings: Settings) -> TiledUNet:
    """The untrained network of `settings`, its weights drawn by `Settings.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return TiledUNet(widths=tuple(settings.width * 2**level for level in range(5)))


def fit(
    tiles: Sequence[AnnotatedTile],
    settings: Settings,
    start: ModelFile | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
    checkpoint: Checkpoint | None = None,
) -> tuple[TiledUNet, list[float]]:
    """Train a network on partially annotated tiles, from scratch or from another model on.

    Parameters
    ----------
    tiles : sequence of AnnotatedTile
        At least one with an annotated nucleus.
    settings : Settings
        Network, schedule, patches, augmentation.
    start : ModelFile, optional
        A model for nuclei whose weights to start from: what it has learnt of other stains helps where few nuclei are
        annotated. Its width and pixel size must be those of `settings`.
    device, progress, checkpoint
        As of `train`.

    Returns
    -------
    network : TiledUNet
        In evaluation.
    losses : list of float
        Of each step.

    Raises
    ------
    ValueError
        If a setting is out of range, `start` does not fit, or no nucleus is annotated.
    """
    settings.check()
    network = build(settings) if start is None else _started(start, settings)
    return network, train(network, tiles, settings, device, progress, checkpoint)


def _started(start: ModelFile, settings: Settings) -> TiledUNet:
    network, its_own = from_model(start)
    for name in ("width", "um_per_px"):
        found, wanted = getattr(its_own, name), getattr(settings, name)
        if found != wanted:
            raise ValueError(
                f"fit(): the model to start from has {name} {found:g}, the settings {wanted:g}; give {found:g}"
            )
    return network


def find_nuclei(
    network: TiledUNet, image: Image, um_per_px: float, separation: Separation | None = None, device: Device = "cpu"
) -> NDArray[np.int32]:
    """All nuclei of an image that fits into memory.

    Parameters
    ----------
    network : TiledUNet
        Trained.
    image : array-like
        RGB, shape (Y, X, 3), uint8, with the pixel size that the network was trained at.
    um_per_px : float
        That pixel size, micrometres.
    separation : Separation, optional
        How to split.
    device : {'auto', 'cpu', 'cuda'}
        Where to compute.

    Returns
    -------
    ndarray of int32
        Shape (Y, X), 1 to the number of nuclei; 0 is background.

    Examples
    --------
    >>> find_nuclei(build(Settings(width=2)), np.zeros((40, 50, 3), np.uint8), um_per_px=0.25).shape
    (40, 50)
    """
    probability = np.zeros(image.shape[:2], np.float32)

    def write(tile: Tile, probabilities: NDArray[np.float32]) -> None:
        probability[tile.kept.slices] = probabilities[NUCLEUS]

    predict(network, image, write, Options(device=device))
    return separate(probability, um_per_px, separation or Separation())


def to_model(network: TiledUNet, settings: Settings, record: Mapping[str, Any]) -> ModelFile:
    """A trained network with its settings and training record, to be written to a file."""
    return ModelFile(TASK, network.state_dict(), asdict(settings), settings.um_per_px, record)


def from_model(model: ModelFile) -> tuple[TiledUNet, Settings]:
    """The trained network of a model, in evaluation, and the settings it was trained with.

    Raises
    ------
    ValueError
        If the model's settings or weights are not those of this method.
    """
    try:
        settings = Settings(**model.settings)
        network = build(settings)
        network.load_state_dict(dict(model.weights))
    except (TypeError, RuntimeError) as error:
        found = str(error).splitlines()[0]
        raise ValueError(
            f"from_model(): settings and weights do not fit together ({found}); train the model anew"
        ) from None
    return network.eval(), settings


# ---- from the two maps to nuclei ----------------------------------------------------------------------------------


def separate(probability: NDArray[np.float32], um_per_px: float, settings: Separation) -> NDArray[np.int32]:
    """Instances from the probability of nucleus: connected pixels above the threshold, split where they touch.

    Parameters
    ----------
    probability : ndarray
        Shape (Y, X), in [0, 1].
    um_per_px : float
        Pixel size, micrometres.
    settings : Separation
        How to split.

    Returns
    -------
    ndarray of int32
        Shape (Y, X), 1 to the number of nuclei; 0 is background.
    """
    mask = remove_small_holes(probability > settings.threshold, max_size=int(settings.hole_um2 / um_per_px**2))
    mask = remove_small_objects(mask, max_size=int(settings.least_um2 / um_per_px**2))
    parts = label(mask, connectivity=1)
    if not settings.split:
        return np.asarray(parts, dtype=np.int32)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), settings.smooth_um / um_per_px)
    seeds = label(_deep_maxima(depth, settings.neck_um / um_per_px) & mask)
    shallow = ~np.isin(parts, parts[seeds > 0]) & mask  # parts with no maximum as deep: each is one nucleus
    seeds = np.where(shallow, parts + seeds.max(), seeds)
    return np.asarray(relabel_sequential(watershed(-depth, seeds, mask=mask))[0], dtype=np.int32)


def _deep_maxima(depth: NDArray[np.floating[Any]], neck: float) -> NDArray[np.bool_]:
    """Maxima parted from every higher one by a neck at least so much lower (ITK: eight times scikit-image's speed)."""
    cut = sitk.HMaxima(sitk.GetImageFromArray(depth.astype(np.float32)), neck)
    return np.asarray(local_maxima(sitk.GetArrayFromImage(cut))).astype(bool)
