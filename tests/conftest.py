"""What tests share: a network that finds what is dark, images with dark blobs, two organs and strokes on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from limner.annotations import Scribbles, simulate_scribbles
from limner.methods.partial_nuclei import Settings, build
from limner.space import Space
from limner.volume import LabelMap, Volume


def finds_what_is_dark(settings):
    """A `TiledUNet` with weights set by hand: the probability of nucleus is sigmoid(20 (darkness - 0.5))."""
    network = build(settings)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    first, last = network.down[0], network.up[-1]
    with torch.no_grad():
        first[0].weight[0, :, 1, 1], first[0].bias[0] = -1 / 3, 1.0  # darkness
        for convolution in (first[3], last[0], last[3]):
            convolution.weight[0, 0, 1, 1] = 1.0  # hands it on; the first channels of last[0] come from the skip
        network.head.weight[1, 0], network.head.bias[1] = 20.0, -10.0
    return network.eval()


def dark_blobs(shape, n, seed=0):
    """RGB of 8 bit: ellipses with radii of 5 to 11 pixels on pale ground, many of them touching."""
    draw = np.random.default_rng(seed)
    y, x = np.indices(shape)
    mask = np.zeros(shape, bool)
    for _ in range(n):
        cy, cx = draw.uniform(0, shape[0]), draw.uniform(0, shape[1])
        ry, rx = draw.uniform(5, 11, 2)
        mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    noise = draw.integers(0, 40, (*shape, 3))
    return np.where(mask[..., None], 40 + noise, 200 + noise).astype(np.uint8)


def two_organs(rgb=False, seed=0, shape=(20, 40, 48)):
    """A bent ellipsoid that is brighter than its surroundings by as much as the noise, and another, darker organ."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    labels = np.zeros(shape, np.uint8)
    labels[(z / 0.9) ** 2 + ((y - 0.3 * z) / 0.5) ** 2 + ((x + 0.4) / 0.35) ** 2 < 1] = 1
    labels[(z / 0.9) ** 2 + (y / 0.4) ** 2 + ((x - 0.5) / 0.3) ** 2 < 1] = 2
    draw = np.random.default_rng(seed)
    levels = 100 + 40.0 * (labels == 1) - 40.0 * (labels == 2) + draw.normal(0, 12, shape)
    pixels = np.clip(levels, 0, 255).astype(np.uint8)
    space = Space(shape, (0.1, 0.05, 0.05))
    return Volume(np.stack([pixels] * 3, axis=-1) if rgb else pixels, space), labels


def drawn_strokes(images, labels, organs, drawn=(4, 10, 16), seed=0):
    return Scribbles.from_marks(LabelMap(simulate_scribbles(labels, organs, drawn, seed), images.space))


@pytest.fixture(scope="session")
def dark_settings():
    return Settings(width=2, um_per_px=0.25)


@pytest.fixture
def dark_network(dark_settings):
    return finds_what_is_dark(dark_settings)


@pytest.fixture
def blobs():
    return dark_blobs


@pytest.fixture(scope="session")
def phantom():
    return two_organs


@pytest.fixture(scope="session")
def strokes_on():
    return drawn_strokes
