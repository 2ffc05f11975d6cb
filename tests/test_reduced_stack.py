"""Large sections at coarser pixels, and labels back at full size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage
from skimage.measure import block_reduce
from torch.nn import functional as F

from limner.io import Section, open_sections, read
from limner.reduced_stack import (
    chosen_factor,
    enlarged_labels,
    reduced_labels,
    reduced_section,
    reduced_space,
    widths,
)
from limner.space import Space


def section_of(pixels: np.ndarray) -> Section:
    shape = (pixels.shape[0], pixels.shape[1])
    return Section("s", shape, pixels.dtype, Path("s"), lambda y0, y1, x0, x1: pixels[y0:y1, x0:x1])


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_sections_are_reduced_to_means(channels: tuple[int, ...], dtype: type) -> None:
    """Higher than a band; with the edge repeated where a pixel is not whole."""
    pixels = np.random.default_rng(0).integers(0, 250, (1203, 70, *channels)).astype(dtype)
    small = reduced_section(section_of(pixels), (1203, 70), 4)
    whole = np.pad(pixels, [(0, 1), (0, 2), *([(0, 0)] * len(channels))], mode="edge")
    means = block_reduce(whole.astype(float), (4, 4, *([1] * len(channels))), np.mean)
    assert small.dtype == dtype
    np.testing.assert_allclose(small, means if dtype == np.float32 else np.rint(means), rtol=1e-6)


def test_smaller_sections_lie_on_the_canvas_as_they_are_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    for i, size in enumerate([(1100, 64), (1021, 51)]):
        tifffile.imwrite(tmp_path / f"{i}.tif", draw.integers(0, 250, (*size, 3), dtype=np.uint8), photometric="rgb")
    whole = read(tmp_path, spacing=(0.1, 0.01, 0.01)).pixels
    stack = open_sections(tmp_path)
    for z in range(2):
        means = np.rint(block_reduce(whole[z].astype(float), (4, 4, 1), np.mean))
        np.testing.assert_array_equal(reduced_section(stack[z], (1100, 64), 4), means)


def test_the_commonest_label_stays_and_of_equals_the_lowest() -> None:
    labels = np.random.default_rng(2).choice([0, 3, 900], (1034, 45), p=[0.2, 0.4, 0.4]).astype(np.uint16)
    labels[:200] = 3  # whole blocks of one label too
    small = reduced_labels(labels, 5)
    whole = (
        np.pad(labels, ((0, 1), (0, 0)), mode="edge").reshape(207, 5, 9, 5).transpose(0, 2, 1, 3).reshape(207, 9, 25)
    )
    counts = np.stack([(whole == label).sum(axis=2) for label in (0, 3, 900)])
    np.testing.assert_array_equal(small, np.array([0, 3, 900])[counts.argmax(axis=0)])
    assert small.dtype == np.uint16


@pytest.mark.parametrize(
    ("factor", "shape"), [(1, (9, 11)), (2, (18, 21)), (3, (27, 31)), (7, (57, 77)), (40, (360, 401))]
)
def test_enlarged_labels_are_the_likeliest_of_enlarged_probabilities(factor: int, shape: tuple[int, int]) -> None:
    height, width = -(-shape[0] // factor), -(-shape[1] // factor)
    generator = torch.Generator().manual_seed(factor)
    probabilities = torch.softmax(3 * torch.randn(5, height, width, generator=generator), dim=0)
    size = (height * factor, width * factor)
    oracle = F.interpolate(probabilities[None], size, mode="bilinear")[0][:, : shape[0], : shape[1]]
    structures = np.array([0, 4, 5, 300, 301])
    found = enlarged_labels(probabilities.numpy(), structures, factor, shape)
    ahead = oracle.sort(dim=0).values
    clear = (ahead[-1] - ahead[-2] > 1e-5).numpy()  # of two equally likely ones either will do
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], structures[oracle.argmax(dim=0).numpy()][clear])


def test_enlarged_borders_are_smooth() -> None:
    """A disc whose coarse probabilities are soft comes back rounder than its pixels."""
    y, x = np.mgrid[:320, :400]
    disc = np.hypot(y - 150.3, x - 190.7) < 97
    inside = block_reduce(ndimage.gaussian_filter(disc.astype(float), 8), (8, 8), np.mean)
    smooth = enlarged_labels(np.stack([1 - inside, inside]), np.array([0, 1]), 8, (320, 400))
    blocks = np.kron(inside > 0.5, np.ones((8, 8), bool))
    assert (smooth != disc).sum() < 0.25 * (blocks != disc).sum()


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 5, 5\); give \(2, 5, 6\)"):
        enlarged_labels(np.ones((2, 5, 5)) / 2, np.array([0, 1]), 4, (20, 24))


def test_the_first_pixel_lies_in_the_middle_of_its_own() -> None:
    space = Space((2, 8, 8), (0.1, 0.02, 0.01), (5.0, 1.0, 2.0), ((1, 0, 0), (0, -1, 0), (0, 0, 1)))
    small = reduced_space(space, 4)
    np.testing.assert_allclose(small.to_physical((1, 0.0, 1.0)), space.to_physical((1, 1.5, 5.5)))
    assert small.shape == (2, 2, 2)


def test_width_is_that_of_the_ribbon_and_sets_the_pixel_size() -> None:
    y, x = np.mgrid[:2000, :1500]
    labels = np.zeros((2000, 1500), np.uint8)
    labels[np.hypot(y - 900, x - 700) < 500] = 9
    labels[np.abs(y - 1800) < 10.5] = 2
    found = widths(labels)
    assert found[2] == pytest.approx(21)
    assert found[9] == pytest.approx(500 * np.pi / 4, rel=0.02)
    assert chosen_factor(labels.shape, 12.0) == 3
    assert chosen_factor(labels.shape, 400) == 5  # 400 pixels are left
    assert chosen_factor(labels.shape, 2) == 2  # no more than 1,000
    assert chosen_factor((999, 1000), 1) == 1
