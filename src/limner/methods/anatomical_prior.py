"""Brain scans segmented though none was ever labelled: an anatomical prior from label maps of other subjects.

For the lab with a contrast or a species that no trained tool knows. The method is that of Dalca, Guttag and Sabuncu
2018 [1]_: label maps teach a variational auto-encoder what anatomy looks like; its decoder, frozen, is the prior under
which scans without labels are explained.

| step | function |
| --- | --- |
| location prior p_loc | `limner.location_prior.label_frequencies` |
| auto-encoder of label maps, Eq. 10 and 11 | `limner.label_map_prior.fit`, `prior_loss`; `limner.networks.vae` |
| image auto-encoder that warms the encoder up | `warm_up` |
| explaining scans, Eq. 12 to 14 | `fit_encoder`, `explain_loss` |
| z of one scan, found anew from the encoder's | `own_codes` |
| argmax of f(mu_z), samples, entropy | `decoded`, `segment` |
| posterior with each voxel's own intensity | `tempered`, `refinement`; `limner.mixture_refinement` |

Departures (docs/benchmarks.md has what was measured of them):

- Labels given z are summed out exactly; `Inference.bound` is the paper's bound.
- Each scan's codes are moved for some steps from what the encoder reads, which falls short of the best for each.
- The result is refined by the voxel's own intensity, of which the paper's result knows nothing: folds come back. There
  the decoder, surer than it is right, is tempered by the location prior.
- Structures may share a tissue and so mu and sigma, as in Puonti et al. 2016 [2]_: else the fluid around the brain, a
  structure without a voxel that is surely its own, goes over to the grey level of the cortex beside it and takes it.
- Outside the brain of a scan without skull the label is known to be background, and counts as such; inside it
  background is a tenth as likely when labels are read out.
- sigma is learned for each label, never below the noise; the paper's is one for all.
- The decoder bends the location prior as well as adding scores to it, and ends at half the size: it learns from 20 maps
  in minutes. `--no-bends --coarse 0` is the paper's.
- The KL term counts late and the code begins with little noise: else the auto-encoder never leaves the location prior.
- The few label maps are bent and stretched at random, which stands in for more subjects.

References
----------
.. [1] Dalca, Guttag, Sabuncu, "Anatomical priors in convolutional networks for unsupervised biomedical segmentation",
   CVPR 2018, https://doi.org/10.1109/CVPR.2018.00968
.. [2] Puonti, Iglesias, Van Leemput, "Fast and sequence-adaptive whole-brain segmentation using parametric Bayesian
   modeling", NeuroImage 143, 2016, https://doi.org/10.1016/j.neuroimage.2016.09.011
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from limner.aligned_scan import AlignedScan, at_voxels
from limner.label_map_prior import (
    OF_VOLUMES,
    Prior,
    Progress,
    Settings,
    build,
    check_numbers,
    descend,
    falling,
    fast_on_cpu,
    set_rate,
    slices_of,
    together,
)
from limner.label_merging import Merging
from limner.losses.variational import (
    image_loss,
    kl_loss,
    mixture_bound_loss,
    mixture_loss,
)
from limner.mixture_refinement import Settings as MixtureSettings
from limner.mixture_refinement import fit_mixture, positions_in, posterior
from limner.model_file import ModelFile
from limner.networks.vae import Architecture, Encoder, ImageVAE, sample
from limner.registration.template import Template
from limner.space import Space

TASK = "anatomical prior"
SLICES = ("images", "inside", "outside", "place")
LEAST_F = 1e-6  # of a label, when each voxel's intensity is asked too
BACKGROUND_INSIDE = 0.1  # how much less likely a brain's mask makes background; best likelihood of one scan tried
VIEWS, LEAST_STEPS = 15, 300
CODE_RATE = 0.03  # Adam's, in standard deviations of a code
LEAST_INSIDE = 0.005  # share of a slice that must be brain for the encoder to learn from it


@dataclass(frozen=True)
class Inference:
    """How scans are explained."""

    warm_up: int = 200
    """Steps of the image auto-encoder that the encoder comes from."""
    steps: int = 0
    """Steps in which the encoder learns to explain scans; 0: until each slice was seen 15 times, 300 at least."""
    batch: int = 24
    """Slices a step; of whole volumes a twelfth of it."""
    rate: float = 1.0
    """Learning rate of Adadelta (its default; paper: no value); falls along a cosine to 0."""
    bound: bool = False
    """Minimise the paper's bound rather than the exact loss."""
    own_steps: int = 8
    """Steps in which each scan's codes are moved to explain it better than the encoder does; 0: none (paper)."""
    refine: bool = True
    """Use each voxel's own intensity under the decoder's prior, by EM for each scan."""
    location_share: float = 0.5
    """Power of the location prior beside the decoder's when refining, 0 to 1 (paper: no refining)."""
    bias_order: int = 3
    """Highest degree of the polynomial that shading is fitted with."""
    draws: int = 5
    """Codes drawn of each slice for the uncertainty."""
    samples: int = 0
    """Plausible segmentations to give for each scan, of the codes drawn."""
    seed: int = 0
    """Seed of every random draw."""

    def check(self) -> None:
        """Raise ValueError for a setting that cannot be."""
        check_numbers(self, ("batch", "rate"))
        if self.location_share > 1:
            raise ValueError(f"--location-share: {self.location_share} is above 1; give 0 to 1")


@dataclass(frozen=True)
class ImageModel:
    """What scans of one contrast taught.

    Parameters
    ----------
    encoder : Encoder
        From slices of an image to their codes.
    means, sigmas : Tensor
        Of each label, in the unit of `AlignedScan.image`, shape (L,).
    tissues : Tensor of int
        The tissue of each label, 0, 1, ..., shape (L,); those of one tissue have one mean and sigma.
    """

    encoder: Encoder
    means: Tensor
    sigmas: Tensor
    tissues: Tensor


@dataclass(frozen=True)
class Found:
    """Of one scan, at the N voxels of its brain.

    Parameters
    ----------
    classes : ndarray of int
        Likeliest class, shape (N,).
    uncertainty : ndarray of float32
        Entropy of the mean over the codes drawn, from 0 to 1 (that of all labels alike), shape (N,).
    volumes : ndarray of int
        Voxels of each class, shape (L,).
    intervals : ndarray of int
        Least and most voxels of each class in `classes` and the segmentations of the codes drawn, shape (2, L).
    samples : ndarray of int
        Plausible segmentations, shape (S, N).
    bound : tuple of float
        Log likelihood of each iteration of EM, nats; empty without refining.
    """

    classes: NDArray[np.integer[Any]]
    uncertainty: NDArray[np.float32]
    volumes: NDArray[np.integer[Any]]
    intervals: NDArray[np.integer[Any]]
    samples: NDArray[np.integer[Any]]
    bound: tuple[float, ...] = ()


# ---- scans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """Slices of scans, as the encoder sees them.

    Parameters
    ----------
    images : Tensor
        Shape (B, 1, *size).
    inside, outside : Tensor
        Weights, shape (B, *size): where the image is to be explained, and where the label is background for sure.
    place : Tensor of int
        Which slice of the template each is, shape (B,).
    """

    images: Tensor
    inside: Tensor
    outside: Tensor
    place: Tensor

    def __getitem__(self, i: Tensor) -> Slices:
        return Slices(self.images[i], self.inside[i], self.outside[i], self.place[i])

    def to(self, device: torch.device | str) -> Slices:
        """The same on a device."""
        return Slices(*(getattr(self, name).to(device) for name in SLICES))


def slices_of_scans(scans: Sequence[AlignedScan], prior: Prior) -> Slices:
    """Those of all scans that show enough brain to learn from."""
    parts: list[Slices] = []
    for scan in scans:
        every = _slices(scan, prior)
        parts.append(every[every.inside.flatten(1).mean(dim=1) > LEAST_INSIDE])
    return Slices(*(torch.cat([getattr(part, name) for part in parts]) for name in SLICES))


def _slices(scan: AlignedScan, prior: Prior) -> Slices:
    image, inside, known = (
        slices_of(torch.from_numpy(np.asarray(maps, np.float32)), prior.settings)
        for maps in (scan.image, scan.inside, scan.known)
    )
    return Slices(image[:, None], inside, known * (1 - inside), torch.arange(len(image)))


def warm_up(
    slices: Slices, architecture: Architecture, noise: float, inference: Inference, device: str, progress: Progress
) -> Encoder:
    """The encoder of an image auto-encoder: the paper's start of `fit_encoder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(inference.seed)
        network = ImageVAE(1, architecture)
    network.to(device)
    fast_on_cpu(network)
    generator = torch.Generator().manual_seed(inference.seed)
    optimiser = torch.optim.Adam(network.parameters())
    for step in range(inference.warm_up):
        images = slices.images[_drawn(slices, inference, generator)].to(device)
        reconstruction, mean, log_variance = network(images, generator)
        descend(optimiser, image_loss(reconstruction, images, noise) + kl_loss(mean, log_variance), step)
        progress(step + 1, inference.warm_up + inference.steps)
    return network.encoder


def _drawn(slices: Slices, inference: Inference, generator: torch.Generator) -> Tensor:
    """Which slices a step takes; of whole volumes fewer."""
    return torch.randint(len(slices.images), (_batch_of(slices, inference),), generator=generator)


def _batch_of(slices: Slices, inference: Inference) -> int:
    volumes = slices.images.ndim == 5
    return max(1, inference.batch // OF_VOLUMES) if volumes else inference.batch


def explain_loss(
    log_f: Tensor, code: tuple[Tensor, Tensor], slices: Slices, means: Tensor, sigmas: Tensor, bound: bool = False
) -> Tensor:
    """KL[q(z | x) || Normal(0, 1)] - log p(x | z), nats a slice; Eq. 12 to 14, exact unless `bound`.

    Parameters
    ----------
    log_f : Tensor
        Log probabilities of labels given z, shape (B, L, *size).
    code : (Tensor, Tensor)
        Mean and log-variance of z, each (B, D).
    slices : Slices
        The images.
    means, sigmas : Tensor
        Of each label, shape (L,).
    bound : bool
        The paper's bound.
    """
    intensities = (mixture_bound_loss if bound else mixture_loss)(log_f, slices.images, means, sigmas, slices.inside)
    outside = -(slices.outside * log_f[:, 0]).flatten(1).sum(dim=1).mean()
    return intensities + outside + kl_loss(*code)


def fit_encoder(
    scans: Sequence[AlignedScan],
    prior: Prior,
    inference: Inference,
    device: str = "cpu",
    progress: Progress = lambda *_: None,
    tissues: Sequence[int] | None = None,
) -> tuple[ImageModel, list[float]]:
    """Learn to read codes from scans of one contrast: minimise `explain_loss`, the decoder frozen.

    Parameters
    ----------
    scans : sequence of AlignedScan
        Unlabelled, aligned to the prior's template.
    prior : Prior
        As of `fit`.
    inference : Inference
        Schedule.
    device : str
        Where to compute.
    progress : callable
        Called with steps done and steps in all.
    tissues : sequence of int, optional
        The tissue of each label, all of 0, 1, ... in use; else each label is a tissue of its own.

    Returns
    -------
    ImageModel
    list of float
        Loss of each step, nats a slice.

    Raises
    ------
    ValueError
        If no slice shows enough brain, or the loss becomes no number.
    """
    slices = slices_of_scans(scans, prior)
    if not len(slices.images):
        raise ValueError("fit_encoder(): no slice shows a brain; give scans with one")
    if not inference.steps:
        steps = max(LEAST_STEPS, VIEWS * len(slices.images) // inference.batch)
        inference = replace(inference, steps=steps)
    noise = float(np.mean([scan.noise * scan.scale for scan in scans]))
    encoder = warm_up(slices, prior.network.encoder.architecture, max(noise, 0.1), inference, device, progress)
    log_location = prior.log_location.to(device)
    of_labels = torch.arange(log_location.shape[1]) if tissues is None else torch.tensor(tissues)
    means, spreads = (v.to(device) for v in first_intensities(slices, log_location, of_labels))
    of_labels = of_labels.to(device)
    means, log_spreads = nn.Parameter(means), nn.Parameter(spreads.clamp_min(1e-2).log())
    decoder = prior.network.decoder.to(device).requires_grad_(False)
    optimiser = torch.optim.Adadelta(encoder.parameters(), inference.rate)
    # a step of Adadelta is too short at first for numbers as few as these
    of_intensities = torch.optim.Adam([means, log_spreads], 1e-2)
    generator, losses = torch.Generator().manual_seed(inference.seed), []
    for step in range(inference.steps):
        some = slices[_drawn(slices, inference, generator)].to(device)
        code = encoder(some.images)
        log_f = decoder(sample(code[0], code[1], generator), log_location[some.place])
        sigmas = noise + log_spreads.exp()
        loss = explain_loss(log_f, code, some, means[of_labels], sigmas[of_labels], inference.bound)
        set_rate(optimiser, inference.rate * falling(step, inference.steps))
        of_intensities.zero_grad()
        losses.append(descend(optimiser, loss, step))
        of_intensities.step()
        progress(inference.warm_up + step + 1, inference.warm_up + inference.steps)
    sigmas = (noise + log_spreads.exp()).detach()
    return ImageModel(encoder.eval(), means.detach()[of_labels], sigmas[of_labels], of_labels), losses


def first_intensities(slices: Slices, log_location: Tensor, tissues: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each tissue's intensities under the location prior, each (T,); tissues of labels, (L,)."""
    size, sums, squares = torch.zeros(3, int(tissues.max()) + 1)
    for image, inside, place in zip(slices.images[:, 0], slices.inside, slices.place, strict=True):
        weights = summed_by_tissue((log_location[place].cpu().exp() * inside).flatten(1), tissues)
        size += weights.sum(dim=1)
        sums += weights @ image.flatten()
        squares += weights @ image.flatten() ** 2
    means = sums / size.clamp_min(1e-6)
    return means, (squares / size.clamp_min(1e-6) - means**2).clamp_min(0).sqrt()


def own_codes(scan: AlignedScan, prior: Prior, model: ImageModel, inference: Inference) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the code of each slice of a scan, each (B, D).

    What the encoder reads, its mean then moved by `Inference.own_steps` steps of Adam down `explain_loss` of the scan
    itself. Slices are free of one another, so some at a time give the same as all.
    """
    slices, device = _slices(scan, prior), model.means.device
    means, log_variances = [], []
    for some in torch.arange(len(slices.images)).split(_batch_of(slices, inference)):
        part = slices[some].to(device)
        with torch.no_grad():
            mean, log_variance = model.encoder(part.images)
        log_location = prior.log_location[some].to(device)
        mean = nn.Parameter(mean)
        optimiser = torch.optim.Adam([mean], CODE_RATE)
        for _ in range(inference.own_steps):
            with torch.enable_grad():
                log_f = prior.network.decoder(mean, log_location)
                loss = explain_loss(log_f, (mean, log_variance), part, model.means, model.sigmas, inference.bound)
            (mean.grad,) = torch.autograd.grad(loss, [mean])  # the decoder's weights stay without one
            optimiser.step()
        means.append(mean.detach())
        log_variances.append(log_variance)
    return torch.cat(means), torch.cat(log_variances)


def decoded(prior: Prior, codes: tuple[Tensor, Tensor], draws: int, seed: int) -> Iterator[Tensor]:
    """Label probabilities f on the template's grid: of the mean code, then of codes drawn; each (L, Z, Y, X)."""
    mean, log_variance = codes
    generator = torch.Generator().manual_seed(seed)
    log_location = prior.log_location.to(mean.device)
    for i in range(draws + 1):
        with torch.no_grad():
            z = sample(mean, log_variance, generator) if i else mean
            log_f = prior.network.decoder(z, log_location)
            yield together(log_f.exp(), prior.settings).cpu()


def in_brain(maps: Tensor, prior: Prior, scan: AlignedScan) -> Tensor:
    """Probabilities (L, Z, Y, X) on the template's grid at the scan's N voxels, given that these are brain: (L, N)."""
    f = at_voxels(maps, prior.template.space, scan).clamp_min(LEAST_F)
    f[0] *= BACKGROUND_INSIDE
    return f / f.sum(dim=0)


def tempered(f: Tensor, location: Tensor, share: float) -> Tensor:
    """f^(1 - share) p_loc^share, normalised over labels: (L, N) and (L, N) to (L, N)."""
    both = f ** (1 - share) * location**share
    return both / both.sum(dim=0)


def summed_by_tissue(p: Tensor, tissues: Tensor) -> Tensor:
    """Probabilities of tissues from those of labels: (L, N) and the tissue of each label, (L,), to (T, N).

    Examples
    --------
    >>> summed_by_tissue(torch.tensor([[0.2], [0.3], [0.5]]), torch.tensor([0, 1, 0]))
    tensor([[0.7000],
            [0.3000]])
    """
    return p.new_zeros(int(tissues.max()) + 1, *p.shape[1:]).index_add_(0, tissues, p)


def refinement(
    f: Tensor, scan: AlignedScan, inference: Inference, tissues: Tensor
) -> tuple[Callable[[Tensor], Tensor], tuple[float, ...]]:
    """From f(z) to p(s | x, z), proportional to f(z) Normal(x; g mu_s, sigma_s): the mixture is fitted to the scan.

    Labels of one tissue share mu and sigma, so their share of the tissue's posterior is that which f gives them.

    Parameters
    ----------
    f : Tensor
        Probabilities at the scan's N voxels under which mu, sigma and the gain g are found, shape (L, N).
    scan : AlignedScan
        Its raw intensities.
    inference : Inference
        Order of the gain.
    tissues : Tensor of int
        The tissue of each label, shape (L,).

    Returns
    -------
    callable
        From f of this or another code, (L, N), to the posterior, (L, N).
    tuple of float
        Log likelihood of each iteration, nats; it never falls.
    """
    image = torch.from_numpy(scan.volume.pixels[scan.brain].astype(np.float32))
    places = positions_in(scan.brain)
    settings = MixtureSettings(order=inference.bias_order)
    mixture, bound = fit_mixture(image, summed_by_tissue(f, tissues).log(), places, scan.noise, settings)

    def refine(other: Tensor) -> Tensor:
        of_tissues = summed_by_tissue(other, tissues)
        found = posterior(image, of_tissues.log(), places, mixture)
        return other * (found / of_tissues)[tissues]

    return refine, tuple(bound)


def segment(scan: AlignedScan, prior: Prior, model: ImageModel, inference: Inference) -> Found:
    """Segment one scan.

    Parameters
    ----------
    scan : AlignedScan
        As of `limner.aligned_scan.place`.
    prior : Prior
        As of `fit`.
    model : ImageModel
        As of `fit_encoder`, on this scan or others of its contrast.
    inference : Inference
        Whether to refine, and how many codes to draw.

    Returns
    -------
    Found
    """
    draws = max(inference.draws, inference.samples)
    maps = decoded(prior, own_codes(scan, prior, model, inference), draws, inference.seed)
    every = (in_brain(f, prior, scan) for f in maps)
    bound = tuple[float, ...]()
    refine: Callable[[Tensor], Tensor] = lambda f: f  # noqa: E731
    if inference.refine:
        location = in_brain(prior.location, prior, scan)
        every = (tempered(f, location, inference.location_share) for f in every)
    first = next(every)
    if inference.refine:
        refine, bound = refinement(first, scan, inference, model.tissues.cpu())
    p = refine(first)
    mean, labels = torch.zeros_like(p) if draws else p, [_likeliest(p)]
    sizes = [np.bincount(labels[0], minlength=len(p))]
    for f in every:  # one at a time: they may be large
        p = refine(f)
        mean += p / draws
        drawn = _likeliest(p)
        sizes.append(np.bincount(drawn, minlength=len(p)))
        if len(labels) <= inference.samples:
            labels.append(drawn)
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum(dim=0) / math.log(len(mean))
    return Found(
        classes=labels[0],
        uncertainty=entropy.clamp(0, 1).numpy(),
        volumes=sizes[0],
        intervals=np.stack([np.min(sizes, axis=0), np.max(sizes, axis=0)]),
        samples=np.stack(labels)[1:],
        bound=bound,
    )


def _likeliest(p: Tensor) -> NDArray[np.integer[Any]]:
    return p.argmax(dim=0).to(torch.uint8 if len(p) < 256 else torch.int32).numpy()


# ---- model files and small parts ------------------------------------------------------------------------------------


def to_model(prior: Prior, record: dict[str, Any], model: ImageModel | None = None) -> ModelFile:
    """A file of the prior, and of what scans taught where `model` is given."""
    space = prior.template.space
    weights = {f"network.{name}": value for name, value in prior.network.state_dict().items()}
    weights |= {"location": prior.location.half(), "template": torch.from_numpy(prior.template.pixels)}
    if model is not None:
        weights |= {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
        weights |= {"means": model.means, "sigmas": model.sigmas, "tissues": model.tissues}
    settings = {
        **asdict(prior.settings),
        "structures": [[name, list(labels)] for name, labels in prior.merging.structures],
        "space": {"spacing": space.spacing, "origin": space.origin, "direction": space.direction},
    }
    return ModelFile(TASK, weights, settings, 1000 * space.spacing[0], record)


def from_model(file: ModelFile) -> tuple[Prior, ImageModel | None]:
    """The prior that `to_model` wrote, and what scans taught where the file has it."""
    settings = dict(file.settings)
    merging = Merging(tuple((name, tuple(labels)) for name, labels in settings.pop("structures")))
    grid = settings.pop("space")
    pixels = file.weights["template"].numpy()
    direction = tuple(tuple(row) for row in grid["direction"])
    space = Space(pixels.shape, tuple(grid["spacing"]), tuple(grid["origin"]), direction)
    network = build(len(merging.names), space.shape, Settings(**settings)).eval()
    network.load_state_dict(_of(file, "network"))
    prior = Prior(network, file.weights["location"].float(), Template(pixels, space), merging, Settings(**settings))
    if "means" not in file.weights:
        return prior, None
    encoder = Encoder(1, network.encoder.architecture).eval()
    encoder.load_state_dict(_of(file, "encoder"))
    each = torch.arange(len(merging.names))  # as it was before labels could share a tissue
    tissues = file.weights.get("tissues", each)
    return prior, ImageModel(encoder, file.weights["means"], file.weights["sigmas"], tissues)


def _of(file: ModelFile, part: str) -> dict[str, Tensor]:
    own = f"{part}."
    return {name.removeprefix(own): value for name, value in file.weights.items() if name.startswith(own)}
