"""Fully connected layers on the features of each pixel, and the layer that tells classes apart on what they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PixelEmbedding(nn.Module):
    """The function f of metric learning: pixels of one class come close together, those of others go far apart.

    Parameters
    ----------
    n_features : int
        Number of features C of a pixel.
    widths : tuple of int
        Outputs of each fully connected layer; ReLU between layers, none after the last, so that places are not bounded.

    References
    ----------
    .. [1] Hu, Lu, Tan, "Discriminative deep metric learning for face verification in the wild", CVPR 2014,
       https://doi.org/10.1109/CVPR.2014.242. Departure: ReLU for tanh.

    Examples
    --------
    >>> PixelEmbedding(16, widths=(32, 8))(torch.rand(500, 16)).shape
    torch.Size([500, 8])
    """

    def __init__(self, n_features: int, widths: tuple[int, ...] = (32, 32, 16)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip((n_features, *widths), widths, strict=False))
        self.n_outputs = widths[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        """Places of pixels: (..., C) -> (..., widths[-1])."""
        for depth, layer in enumerate(self.layers):
            pixels = layer(torch.relu(pixels) if depth else pixels)
        return pixels


class HeatMapHead(nn.Module):
    """An embedding and the discriminating layer on it: from frozen features to a score of each class.

    The two are trained one after the other: `embedding` by pairs, then `discriminating` on what the embedding, frozen,
    gives.

    Parameters
    ----------
    n_features : int
        Number of features C of a pixel.
    n_classes : int
        Number of classes L, background included: one output each.
    widths : tuple of int
        As of `PixelEmbedding`.

    Examples
    --------
    >>> head = HeatMapHead(n_features=16, n_classes=3)
    >>> head(torch.rand(500, 16)).shape
    torch.Size([500, 3])
    """

    def __init__(self, n_features: int, n_classes: int, widths: tuple[int, ...] = (32, 32, 16)) -> None:
        super().__init__()
        self.embedding = PixelEmbedding(n_features, widths)
        self.discriminating = nn.Linear(self.embedding.n_outputs, n_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of pixels: (..., C) -> (..., L)."""
        return self.discriminating(self.embedding(pixels))
