"""Variational auto-encoders: a shape code for label maps, and the same code read from an image.

Learning the prior goes from label maps to the code z and back, by `LabelMapVAE`; segmenting goes from an image to z by
an `Encoder` of one channel, and on by the label decoder, frozen. `ImageVAE` warms that encoder up.

References
----------
Dalca, Guttag, Sabuncu, "Anatomical priors in convolutional networks for unsupervised biomedical segmentation",
CVPR 2018, https://doi.org/10.1109/CVPR.2018.00968. Departures: convolutions reduce by their stride; scores of labels
go through a softmax with the location prior, where the paper has a sigmoid first; a label decoder may also bend the
location prior, as in Ashburner and Friston, "Unified segmentation", NeuroImage 26, 2005,
https://doi.org/10.1016/j.neuroimage.2005.02.018; and decoders may end at a part of the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
LINEAR = {2: "bilinear", 3: "trilinear"}
BEND_STEP = 4.0  # pixels: displacements that an untrained decoder's outputs of size 1 stand for


@dataclass(frozen=True)
class Architecture:
    """What encoders and decoders that share a code have in common.

    Parameters
    ----------
    size : tuple of int
        (Y, X) of sections, or (Z, Y, X) of volumes: it decides between 2D and 3D. Any size; inside the networks it is
        extended to a multiple of 2**levels.
    latent : int
        Length D of the code z.
    width : int
        Features of each convolution.
    levels : int
        Convolutions, each of which halves the size.
    steepness : float
        a of `latent_activation`.
    coarse : int
        A decoder leaves out its last so many levels and interpolates what it has to full size, linearly: each spares
        three quarters of its time and more. 0: none (paper).

    Raises
    ------
    ValueError
        If `size` is not of two or three numbers, or one of the others is not positive.
    """

    size: tuple[int, ...]
    latent: int = 1000
    width: int = 32
    levels: int = 5
    steepness: float = 1.0
    coarse: int = 0

    def __post_init__(self) -> None:
        if len(self.size) not in CONVOLUTIONS or min(self.size) < 1:
            raise ValueError(f"Architecture(): size is {self.size}; give (Y, X) or (Z, Y, X), each 1 or more")
        if min(self.latent, self.width, self.levels, self.steepness) <= 0:
            raise ValueError(f"Architecture(): {self} found; latent, width, levels and steepness are above 0")
        if not 0 <= self.coarse < self.levels:
            raise ValueError(
                f"Architecture(): coarse is {self.coarse}, levels {self.levels}; give 0 or more, below levels"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Size at the deepest level."""
        return tuple(-(-n // 2**self.levels) for n in self.size)

    @property
    def features(self) -> int:
        """Number of features at the deepest level, of all its pixels together."""
        return self.width * math.prod(self.grid)


def latent_activation(x: Tensor, steepness: float = 1.0) -> Tensor:
    """softsign(a x) log(2 + a |x|), softsign(t) = t / (1 + |t|): odd, increasing, and slow to grow.

    The paper does not define its softsign_a; this is the one with slope a log 2 at 0.

    Examples
    --------
    >>> latent_activation(torch.tensor([-1e4, 0.0, 1e4]))
    tensor([-9.2096,  0.0000,  9.2096])
    """
    return F.softsign(steepness * x) * torch.log(2 + steepness * x.abs())


def sample(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """z = mean + sqrt(variance) eps, eps ~ Normal(0, 1): gradients reach mean and variance.

    The generator decides every draw: one on the CPU gives the same for a mean on any device.
    """
    eps = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
    return mean + torch.exp(0.5 * log_variance) * eps


class Encoder(nn.Module):
    """From maps to the normal distribution of their code, q(z | maps).

    Parameters
    ----------
    in_channels : int
        Channels C: one for each label, or those of an image.
    architecture : Architecture
        Size of the maps, length of the code.

    Examples
    --------
    >>> encode = Encoder(1, Architecture(size=(21, 30), latent=7, width=4))
    >>> mean, log_variance = encode(torch.rand(2, 1, 21, 30))
    >>> mean.shape, log_variance.shape
    (torch.Size([2, 7]), torch.Size([2, 7]))
    """

    def __init__(self, in_channels: int, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        convolution = CONVOLUTIONS[len(a.size)]
        widths = (in_channels, *(a.width,) * a.levels)
        self.convolutions = nn.ModuleList(convolution(i, o, 3, stride=2, padding=1) for i, o in pairwise(widths))
        self.mean = nn.Linear(a.features, a.latent)
        self.log_variance = nn.Linear(a.features, a.latent)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z, each (B, D), of maps (B, C, Y, X) or (B, C, Z, Y, X)."""
        a = self.architecture
        missing = [-n % 2**a.levels for n in a.size]
        x = F.pad(maps, [p for after in reversed(missing) for p in (0, after)], mode="replicate")
        for convolution in self.convolutions:
            x = F.elu(convolution(x))
        x = x.flatten(1)
        return latent_activation(self.mean(x), a.steepness), latent_activation(self.log_variance(x), a.steepness)


class Decoder(nn.Module):
    """From the code back to maps: the encoder's mirror. Untrained, it gives 0 everywhere.

    Parameters
    ----------
    out_channels : int
        Channels C of the maps.
    architecture : Architecture
        As of the encoder.

    Examples
    --------
    >>> Decoder(3, Architecture(size=(21, 30), latent=7, width=4))(torch.rand(2, 7)).shape
    torch.Size([2, 3, 21, 30])
    """

    def __init__(self, out_channels: int, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        convolution = CONVOLUTIONS[len(a.size)]
        self.dense = nn.Linear(a.latent, a.features)
        levels = range(a.levels - a.coarse)
        self.convolutions = nn.ModuleList(convolution(a.width, a.width, 3, padding=1) for _ in levels)
        self.head = convolution(a.width, out_channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Tensor:
        """Maps (B, C, Y, X) or (B, C, Z, Y, X) of codes (B, D)."""
        a = self.architecture
        x = F.elu(self.dense(z)).reshape(-1, a.width, *a.grid)
        for convolution in self.convolutions:
            x = F.elu(convolution(F.interpolate(x, scale_factor=2.0, mode="nearest")))
        maps = self.head(x)
        if a.coarse:
            maps = F.interpolate(maps, scale_factor=2.0**a.coarse, mode=LINEAR[len(a.size)], align_corners=False)
        return maps[(..., *(slice(n) for n in a.size))]


class LabelDecoder(nn.Module):
    """f(z): what the code and the place say about the label of each pixel. Untrained, it is the location prior.

    Parameters
    ----------
    n_labels : int
        Number of labels L, background included.
    architecture : Architecture
        As of the encoder.
    bends : bool
        The code also gives a displacement of each pixel by which the location prior is bent: what boundaries shifted
        alike is learned from few maps. False: scores alone (paper).

    Examples
    --------
    >>> decode = LabelDecoder(3, Architecture(size=(21, 30), latent=7, width=4))
    >>> location_prior = torch.full((1, 3, 21, 30), 1 / 3)
    >>> log_f = decode(torch.rand(2, 7), location_prior.log())
    >>> bool(torch.allclose(log_f.exp().sum(dim=1), torch.ones(2, 21, 30)))
    True
    """

    def __init__(self, n_labels: int, architecture: Architecture, bends: bool = False) -> None:
        super().__init__()
        self.n_labels = n_labels
        self.bends = bends
        self.scores = Decoder(n_labels + len(architecture.size) * bends, architecture)

    def forward(self, z: Tensor, log_location_prior: Tensor) -> Tensor:
        """Log probabilities log f.

        Parameters
        ----------
        z : Tensor
            Codes, shape (B, D).
        log_location_prior : Tensor
            log p_loc, shape (B or 1, L, Y, X) or (B or 1, L, Z, Y, X); finite.

        Returns
        -------
        Tensor
            Shape (B, L, Y, X) or (B, L, Z, Y, X), normalised over labels.
        """
        maps = self.scores(z)
        if self.bends:
            log_location_prior = bent(log_location_prior, BEND_STEP * maps[:, self.n_labels :])
        return torch.log_softmax(maps[:, : self.n_labels] + log_location_prior, dim=1)


def bent(maps: Tensor, displacement: Tensor) -> Tensor:
    """Maps looked up at each pixel's place plus a displacement, linear between pixels; beyond the border they go on.

    Parameters
    ----------
    maps : Tensor
        Shape (B or 1, C, Y, X) or (B or 1, C, Z, Y, X).
    displacement : Tensor
        Pixels along each axis in the order of the axes, shape (B, 2, Y, X) or (B, 3, Z, Y, X).

    Examples
    --------
    >>> one_right = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    >>> bent(torch.tensor([[[[1.0, 2.0, 4.0]]]]), one_right)
    tensor([[[[2., 4., 4.]]]])
    """
    n, axes, *size = displacement.shape
    unit = displacement.new_tensor([2 / length for length in size[::-1]])  # grid_sample counts halves of the size
    identity = torch.eye(axes, axes + 1).expand(n, axes, axes + 1).to(displacement)
    grid = F.affine_grid(identity, [n, 1, *size], align_corners=False) + displacement.flip(1).movedim(1, -1) * unit
    return F.grid_sample(maps.expand(n, *maps.shape[1:]), grid, padding_mode="border", align_corners=False)


class LabelMapVAE(nn.Module):
    """Auto-encoder of label maps: its decoder, trained, is the anatomical prior.

    Parameters
    ----------
    n_labels : int
        Number of labels L, background included.
    architecture : Architecture
        Size of the maps, length of the code.
    bends : bool
        As of `LabelDecoder`.

    Examples
    --------
    >>> network = LabelMapVAE(3, Architecture(size=(21, 30), latent=7, width=4))
    >>> labels = torch.randint(3, (2, 21, 30))
    >>> log_f, mean, log_variance = network(labels, torch.zeros(1, 3, 21, 30), torch.Generator().manual_seed(0))
    >>> log_f.shape, mean.shape
    (torch.Size([2, 3, 21, 30]), torch.Size([2, 7]))
    """

    def __init__(self, n_labels: int, architecture: Architecture, bends: bool = False) -> None:
        super().__init__()
        self.n_labels = n_labels
        self.encoder = Encoder(n_labels, architecture)
        self.decoder = LabelDecoder(n_labels, architecture, bends)

    def encode(self, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z, each (B, D).

        Parameters
        ----------
        labels : Tensor of int
            Shape (B, Y, X) or (B, Z, Y, X), 0 to L - 1; anything where the weight is 0.
        weights : Tensor, optional
            Same shape, in [0, 1]; 0: unknown, and shown to the network as no label at all.
        """
        if weights is not None:
            labels = labels.masked_fill(weights == 0, 0)
        maps = F.one_hot(labels.long(), self.n_labels).movedim(-1, 1).to(self.encoder.mean.weight)
        return self.encoder(maps if weights is None else maps * weights[:, None])

    def forward(
        self, labels: Tensor, log_location_prior: Tensor, generator: torch.Generator, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log f(z) of a drawn z, as `LabelDecoder` gives it, and mean and log-variance of z, as `encode` does."""
        mean, log_variance = self.encode(labels, weights)
        return self.decoder(sample(mean, log_variance, generator), log_location_prior), mean, log_variance


class ImageVAE(nn.Module):
    """Auto-encoder of images; its encoder, trained, is where learning to segment begins.

    Parameters
    ----------
    in_channels : int
        Channels C of the images.
    architecture : Architecture
        As of the label maps' auto-encoder, so that codes are of one length.

    Examples
    --------
    >>> network = ImageVAE(1, Architecture(size=(21, 30), latent=7, width=4))
    >>> network(torch.rand(2, 1, 21, 30), torch.Generator().manual_seed(0))[0].shape
    torch.Size([2, 1, 21, 30])
    """

    def __init__(self, in_channels: int, architecture: Architecture) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, architecture)
        self.decoder = Decoder(in_channels, architecture)

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images of a drawn z, (B, C, Y, X) or (B, C, Z, Y, X) as those given; mean and log-variance of z, (B, D)."""
        mean, log_variance = self.encoder(images)
        return self.decoder(sample(mean, log_variance, generator)), mean, log_variance
