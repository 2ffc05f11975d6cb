import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from limner.tissue import TissueMap, find_tissue, optical_density

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data"))
PINK, PURPLE, PALE, BROWN = (225, 170, 205), (120, 80, 150), (235, 205, 225), (150, 110, 80)


def slide(*blocks, glass=240, noise=3.0, size=(200, 260), shading=0.0, seed=0):
    """Glass with noise, darker by `shading` towards one corner, and blocks (rows, columns, colour before glass 245)."""
    image = np.full((*size, 3), glass, float)
    for rows, columns, colour in blocks:
        image[rows, columns] = np.multiply(colour, glass / 245)
    y, x = np.mgrid[: size[0], : size[1]]
    image *= (1 - shading * (y / size[0] + x / size[1]) / 2)[..., np.newaxis]
    image += np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("colour", [PINK, PURPLE, PALE, BROWN])
@pytest.mark.parametrize("glass", [210, 240, 255])
def test_a_block_of_tissue_is_found(colour, glass):
    block = (slice(50, 120), slice(60, 200))
    mask = find_tissue(slide((*block, colour), glass=glass), (200, 260)).mask
    expected = np.zeros_like(mask)
    expected[block] = True
    # the blur moves the border by a few pixels
    assert mask[ndimage.binary_erosion(expected, iterations=4)].all()
    assert not mask[~ndimage.binary_dilation(expected, iterations=5)].any()


@pytest.mark.parametrize("glass", [205, 240, 255])
@pytest.mark.parametrize("shading", [0.0, 0.06])
def test_bare_glass_has_no_tissue(glass, shading):
    tissue = find_tissue(slide(glass=glass, shading=shading), (20000, 26000))
    assert tissue.fraction == 0
    assert not tissue.holds_tissue((0, 20000), (0, 26000))
    assert not find_tissue(np.full((5, 5, 3), glass, np.uint8), (5, 5)).mask.any()


@pytest.mark.parametrize("colours", [(PINK, PINK), (PURPLE, PINK), (BROWN, PURPLE)])
def test_a_slide_full_of_tissue_is_all_tissue(colours):
    half = slice(0, 100), slice(0, 260)
    image = slide((slice(0, 200), slice(0, 260), colours[0]), (*half, colours[1]))
    assert find_tissue(image, (200, 260)).fraction == 1


def test_faint_and_strong_tissue_are_both_found():
    """Otsu alone would cut between faint and strong."""
    strong, faint = (slice(20, 80), slice(20, 80)), (slice(120, 180), slice(120, 240))
    mask = find_tissue(slide((*strong, (60, 20, 90)), (*faint, PINK)), (200, 260)).mask
    assert mask[strong].mean() > 0.95 and mask[faint].mean() > 0.95
    assert mask.mean() == pytest.approx((60 * 60 + 60 * 120) / (200 * 260), rel=0.15)


def test_specks_and_holes_below_the_smallest_go():
    image = slide((slice(50, 150), slice(50, 150), PURPLE), noise=0)
    image[100:102, 100:102] = 240
    image[10:12, 10:12] = PURPLE
    image[70:90, 70:90] = 240
    mask = find_tissue(image, (200, 260), smallest=20 / (200 * 260), sigma=0).mask
    expected = np.zeros_like(mask)
    expected[50:150, 50:150] = True
    expected[70:90, 70:90] = False
    np.testing.assert_array_equal(mask, expected)


def test_black_margins_are_no_tissue():
    image = slide((slice(0, 200), slice(0, 60), (0, 0, 0)), (slice(80, 120), slice(120, 200), PINK), noise=0)
    mask = find_tissue(image, (200, 260)).mask
    assert not mask[:, :58].any()
    assert mask[82:118, 122:198].all()


def test_density_by_hand():
    """Glass 250; 25 in the darkest channel is a tenth of it, 250 / 10 ** 0.3 half."""
    image = np.full((40, 50, 3), 250, np.uint8)
    image[0, 0] = (250, 25, 90)
    image[0, 1] = (200, 125, 130)
    density = optical_density(image)
    assert density[0, 0] == pytest.approx(1)
    assert density[0, 1] == pytest.approx(np.log10(2))
    assert density[1:].max() == 0


def test_regions_touch_tissue_by_brute_force():
    """A full image of 103 x 95 pixels under a mask of 7 x 5: every region against the mask blown up pixel by pixel."""
    rng = np.random.default_rng(0)
    mask = rng.random((7, 5)) < 0.2
    tissue = TissueMap(mask, (103, 95))
    for _ in range(300):
        y0, y1 = sorted(rng.integers(0, 104, 2))
        x0, x1 = sorted(rng.integers(0, 96, 2))
        touched = [
            mask[r, c]
            for r in range(7)
            for c in range(5)
            # pixel r of the mask covers rows 103 r / 7 to 103 (r + 1) / 7
            if y0 * 7 < 103 * (r + 1) and y1 * 7 > 103 * r and x0 * 5 < 95 * (c + 1) and x1 * 5 > 95 * c
        ]
        assert tissue.holds_tissue((y0, y1), (x0, x1)) == (y1 > y0 and x1 > x0 and any(touched))
    assert not tissue.holds_tissue((200, 300), (0, 50))
    one = TissueMap(np.eye(2, dtype=bool), (100, 100))
    assert not one.holds_tissue((10, 40), (60, 90))
    assert one.holds_tissue((10, 40), (60, 90), margin=11)


def test_what_is_no_thumbnail_is_refused():
    with pytest.raises(ValueError, match="give RGB of 8 bit"):
        find_tissue(np.zeros((5, 5), np.uint8), (5, 5))


@pytest.mark.skipif(not DATA.exists(), reason="no data: slides, nuclei_tnbc")
def test_real_slides():
    image = tifffile.imread(DATA / "slides" / "images" / "cmu1_small_region.svs", key=0)[::4, ::4]
    tissue = find_tissue(np.ascontiguousarray(image), (2967, 2220))
    assert 0.3 < tissue.fraction < 0.95
