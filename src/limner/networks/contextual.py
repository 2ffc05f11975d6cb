"""The deep contextual network: three branches from three depths, each a classifier of its own, summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

CONVOLUTIONS = (2, 2, 3, 3)  # of 3 x 3 at each level; with a 3 x 3 and a 1 x 1 in each of three branches 16 in all


class ContextualNetwork(nn.Module):
    """Fully convolutional network whose maps, from half, a quarter and an eighth of the size, are summed.

    A trunk of ten 3 x 3 convolutions with three 2 x 2 max-poolings; after each pooling and the convolutions that follow
    it a branch leaves: a deconvolution back to full size (stride 2, 4, 8), a 3 x 3 and a 1 x 1 convolution. The 1 x 1
    convolutions are the auxiliary classifiers; the sum of the three score maps is the network's own.

    The output is as large as the input, of any size: where a side is odd, the last pixel is pooled alone, and enlarged
    maps are cut to the image. In evaluation every output pixel depends on the pixels of its receptive field alone, and
    without gradients normalisation is folded into the convolutions: the same but for rounding, in a seventh less time.

    Parameters
    ----------
    in_channels : int
        Number of input channels C.
    n_maps : int
        Number of classes L.
    widths : tuple of int
        Channels at full size and after each pooling; the default has 0.78 M parameters.
    branch_width : int
        Channels of a branch at full size.
    dropout : float
        Share of the deepest level's channels that are dropped in training.

    References
    ----------
    .. [1] Chen, Qi, Cheng, Heng, "Deep contextual networks for neuronal structure segmentation", AAAI 2016,
       https://doi.org/10.1609/aaai.v30i1.10141. Departures: batch normalisation, fewer channels, zero padding.

    Examples
    --------
    >>> network = ContextualNetwork(widths=(4, 4, 8, 8)).eval()
    >>> network(torch.zeros(1, 1, 21, 30)).shape, network.alignment, network.halo
    (torch.Size([1, 2, 21, 30]), 8, 50)
    """

    def __init__(
        self,
        in_channels: int = 1,
        n_maps: int = 2,
        widths: tuple[int, int, int, int] = (16, 32, 64, 128),
        branch_width: int = 8,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(*(_Convolution(i if n == 0 else o, o) for n in range(convolutions)))
            for i, o, convolutions in zip((in_channels, *widths), widths, CONVOLUTIONS, strict=False)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.branches = nn.ModuleList(_Branch(width, branch_width, 2**i) for i, width in enumerate(widths[1:], start=1))
        self.classifiers = nn.ModuleList(nn.Conv2d(branch_width, n_maps, 1) for _ in self.branches)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def alignment(self) -> int:
        """Product of the poolings: tiles begin at multiples of it."""
        return int(2 ** len(self.branches))

    @property
    def halo(self) -> int:
        """How many pixels beyond a region that begins and ends at multiples of `alignment` its outputs depend on."""
        first, last = self.receptive_field(0, self.alignment - 1)
        return max(-first, last - self.alignment + 1)

    def receptive_field(self, first: int, last: int) -> tuple[int, int]:
        """First and last pixel, along either axis of an endless image, on which outputs `first` to `last` depend."""
        spans = [self._span(first, last, depth) for depth in range(1, len(self.levels))]
        return min(a for a, _ in spans), max(b for _, b in spans)

    def _span(self, first: int, last: int, depth: int) -> tuple[int, int]:
        """The same of the branch that leaves after `depth` poolings."""
        stride = 2**depth
        first, last = first - 1, last + 1
        first, last = -((stride + stride // 2 - 1 - first) // stride), (last + stride // 2) // stride
        for convolutions in CONVOLUTIONS[depth:0:-1]:
            first, last = 2 * (first - convolutions), 2 * (last + convolutions) + 1
        return first - CONVOLUTIONS[0], last + CONVOLUTIONS[0]

    def scores(self, image: Tensor) -> list[Tensor]:
        """Logits of the three auxiliary classifiers, each (B, L, Y, X), of images (B, C, Y, X)."""
        x = self.levels[0](image)
        scores: list[Tensor] = []
        for level, branch, classifier in zip(self.levels[1:], self.branches, self.classifiers, strict=True):
            x = level(F.max_pool2d(x, 2, ceil_mode=True))
            deepest = len(scores) == len(self.branches) - 1
            enlarged = branch(self.dropout(x) if deepest else x, image.shape[2:])
            scores.append(classifier(enlarged))
        return scores

    def forward(self, image: Tensor, region: tuple[slice, slice] | None = None) -> Tensor:
        """Logits of the image (B, C, Y, X), the sum of the three: (B, L, Y, X), or (B, L, y, x) of a region."""
        fused: Tensor = torch.stack(self.scores(image)).sum(dim=0)
        return fused if region is None else fused[:, :, region[0], region[1]]


class _Convolution(nn.Sequential):
    """A 3 x 3 convolution, zero-padded, normalisation and ReLU: (B, n_in, Y, X) -> (B, n_out, Y, X)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        convolution = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same size."""
        if self.training or torch.is_grad_enabled():
            for layer in self:
                maps = layer(maps)
            return maps
        weight, bias = _folded(self[0], self[1])
        return F.conv2d(maps, weight, bias, padding=1).relu_()


class _Branch(nn.Module):
    """Back to full size: a deconvolution and a 3 x 3 convolution."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.enlarge = nn.ConvTranspose2d(n_in, n_out, 2 * stride, stride, padding=stride // 2, bias=False)
        self.normalise = nn.Sequential(nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))
        self.refine = _Convolution(n_out, n_out)

    def forward(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Maps (B, n_in, y, x) at full size (B, n_out, Y, X)."""
        refined: Tensor = self.refine(self._enlarged(maps)[:, :, : size[0], : size[1]])
        return refined

    def _enlarged(self, maps: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            normalised: Tensor = self.normalise(self.enlarge(maps))
            return normalised
        weight, bias = _folded(self.enlarge, self.normalise[0], transpose=True)
        return F.conv_transpose2d(maps, weight, bias, self.stride, padding=self.stride // 2).relu_()


def _folded(convolution: Any, normalisation: Any, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what both do in evaluation."""
    n = normalisation
    return fuse_conv_bn_weights(
        convolution.weight, None, n.running_mean, n.running_var, n.eps, n.weight, n.bias, transpose=transpose
    )
