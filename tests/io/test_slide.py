"""Slides written by tifffile, Pillow, tensorstore and by hand; read against tifffile, tiffslide and Pillow."""

import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import tiffslide
from PIL import Image

from limner.io import open_slide, write_ome_zarr
from limner.io.slide import Slide, level_of_array
from limner.space import Space
from limner.volume import Volume

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (300, 420, 3)).astype(np.uint8)
TILED = {"photometric": "rgb", "tile": (64, 48)}
SVS = "Aperio Image Library v11.2.1\n420x300 [0,0 420x300] (64x48) -> 420x300|AppMag = 20|MPP = 0.4990|Left = 25"
DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "slides" / "images"


def reduced(pixels, factor):
    return np.asarray(Image.fromarray(pixels).reduce(factor))


def svs(path, pixels=RGB):
    """A baseline, a thumbnail in strips and one level, in the order of Aperio's files."""
    with tifffile.TiffWriter(path) as tif:
        tif.write(pixels, description=SVS, metadata=None, compression="zlib", **TILED)
        tif.write(reduced(pixels, 7), description=SVS, metadata=None, photometric="rgb")
        tif.write(reduced(pixels, 4), description=SVS, metadata=None, **TILED)
    return path


def ome(path, pixels=RGB, n_levels=3, **kwargs):
    sizes = {"PhysicalSizeY": 0.25, "PhysicalSizeX": 0.2, "axes": "YXS"}
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(pixels, subifds=n_levels - 1, metadata=sizes, **(TILED | kwargs))
        for level in range(1, n_levels):
            tif.write(reduced(pixels, 2**level), subfiletype=1, **(TILED | kwargs))
    return path


def generic(path, pixels=RGB, resolution=(40000, 40000)):
    """A pyramid as libvips writes it: one page a level."""
    with tifffile.TiffWriter(path) as tif:
        for level in range(3):
            page = reduced(pixels, 2**level) if level else pixels
            tif.write(page, metadata=None, resolution=resolution, resolutionunit="CENTIMETER", **TILED)
    return path


def ndpi(path):
    """Two levels as Hamamatsu stores them: one JPEG a level, offsets of the directories in 64 bit."""
    pages = [RGB, reduced(RGB, 4)]
    encoded = [imagecodecs.jpeg_encode(p, level=95) for p in pages]
    file = bytearray(b"II*\0" + bytes(8))
    offsets = []
    for jpeg in encoded:
        offsets.append(len(file))
        file += jpeg + b"\0" * (len(jpeg) % 2)
    link = 4
    for i, (page, jpeg) in enumerate(zip(pages, encoded, strict=True)):
        make, resolution, bits = len(file), len(file) + 10, len(file) + 18
        file += b"Hamamatsu\0" + struct.pack("<2I", 22000 // 4**i, 1) + struct.pack("<3H", 8, 8, 8)
        tags = [(256, 4, 1, page.shape[1]), (257, 4, 1, page.shape[0]), (258, 3, 3, bits), (259, 3, 1, 7)]
        tags += [
            (262, 3, 1, 6),
            (271, 2, 10, make),
            (273, 4, 1, offsets[i]),
            (277, 3, 1, 3),
            (278, 4, 1, page.shape[0]),
        ]
        tags += [(279, 4, 1, len(jpeg)), (282, 5, 1, resolution), (283, 5, 1, resolution), (284, 3, 1, 1)]
        tags += [(296, 3, 1, 3), (65420, 4, 1, 1), (65421, 11, 1, struct.unpack("<I", struct.pack("<f", 20 / 4**i))[0])]
        file[link : link + 8] = struct.pack("<Q", len(file))
        file += struct.pack("<H", len(tags)) + b"".join(struct.pack("<2H2I", *tag) for tag in tags)
        link = len(file)
        file += bytes(8) + bytes(4 * len(tags))
    path.write_bytes(file)
    return path, [imagecodecs.jpeg_decode(jpeg) for jpeg in encoded]


def ome_zarr(path, version="0.5"):
    write_ome_zarr(path, Volume(RGB[np.newaxis], Space((1, *RGB.shape[:2]), (1.0, 0.00025, 0.0002))), version)
    return path


@pytest.mark.parametrize(
    ("write", "name", "um_per_px", "shapes"),
    [
        (svs, "a.svs", (0.499, 0.499), [(300, 420), (75, 105)]),
        (ome, "a.ome.tif", (0.25, 0.2), [(300, 420), (150, 210), (75, 105)]),
        (generic, "a.tif", (0.25, 0.25), [(300, 420), (150, 210), (75, 105)]),
        (ome_zarr, "a.zarr", (0.25, 0.2), [(300, 420)]),
    ],
)
def test_levels_sizes_and_pixels(tmp_path, write, name, um_per_px, shapes):
    slide = open_slide(write(tmp_path / name))
    assert [level.shape for level in slide.levels] == [(*s, 3) for s in shapes]
    assert slide.um_per_px == pytest.approx(um_per_px)
    for level in slide.levels:
        factor = 300 // level.shape[0]
        assert level.downsample == (factor, factor)
        assert level.um_per_px == pytest.approx((um_per_px[0] * factor, um_per_px[1] * factor))
        expected = reduced(RGB, factor)
        for region in [np.s_[:, :], np.s_[13:77, 40:60], np.s_[64:, -5:], np.s_[70:9999]]:
            assert np.array_equal(level[region], expected[region])
    assert slide.levels[0][5:5, 3:9].shape == (0, 6, 3)


def test_svs_as_tiffslide_reads_it(tmp_path):
    path = svs(tmp_path / "a.svs")
    slide = open_slide(path)
    with tiffslide.TiffSlide(path) as other:
        assert other.properties["tiffslide.mpp-x"] == slide.um_per_px[1]
        for i, (width, height) in enumerate(other.level_dimensions):
            assert slide.levels[i].shape == (height, width, 3)
        region = np.asarray(other.read_region((50, 70), 0, (90, 80)).convert("RGB"))
    assert np.array_equal(region, slide.levels[0][70:150, 50:140])


def test_ndpi(tmp_path):
    path, pages = ndpi(tmp_path / "a.ndpi")
    slide = open_slide(path)
    assert slide.um_per_px == pytest.approx((10 / 22, 10 / 22), rel=1e-3)
    for level, page in zip(slide.levels, pages, strict=True):
        assert np.array_equal(level[:], page)
        assert np.array_equal(level[20:40, 30:70], page[20:40, 30:70])


@pytest.mark.skipif(not DATA.exists(), reason="no data: slides")
@pytest.mark.parametrize(
    ("name", "um_per_px"),
    [
        ("cmu1_small_region.svs", 0.499),
        ("os1_he_detail.ome.tif", 0.2271),
        ("os2_ki67_ndpi.ome.tif", 0.2271),
        ("os2_ki67_vsi.ome.tif", 0.3460),
    ],
)
def test_slides_of_scanners(name, um_per_px):
    slide = open_slide(DATA / name)
    assert slide.um_per_px == pytest.approx((um_per_px, um_per_px), rel=2e-3)
    expected = tifffile.imread(DATA / name, key=0)
    assert np.array_equal(slide.levels[0][200:700, 333:999], expected[200:700, 333:999])


GREY16 = RNG.integers(0, 2**16, (40, 50)).astype(np.uint16)
ALPHA = np.dstack([RGB[:40, :50], RNG.integers(0, 256, (40, 50))]).astype(np.uint8)
OVER_WHITE = np.asarray(Image.alpha_composite(Image.new("RGBA", (50, 40), "white"), Image.fromarray(ALPHA)))[..., :3]


@pytest.mark.parametrize(
    ("pixels", "kwargs", "expected"),
    [
        (RGB[..., 0], {}, RGB[..., :1].repeat(3, -1)),
        (RGB[..., 0], {"photometric": "miniswhite"}, 255 - RGB[..., :1].repeat(3, -1)),
        (GREY16, {"tile": (16, 32)}, np.rint(GREY16 / 257)[..., np.newaxis].repeat(3, -1)),
        (GREY16 >> 4, {}, np.rint((GREY16 >> 4) / 4095 * 255)[..., np.newaxis].repeat(3, -1)),
        (ALPHA, {"photometric": "rgb", "extrasamples": ["unassalpha"], "tile": (16, 16)}, OVER_WHITE),
        (np.moveaxis(RGB, -1, 0), {"photometric": "rgb", "planarconfig": "separate", "tile": (64, 64)}, RGB),
        (RGB, {"photometric": "rgb", "rowsperstrip": 7}, RGB),
        (RGB, {"photometric": "rgb", "rowsperstrip": 7, "compression": "zlib"}, RGB),
    ],
)
def test_every_tiff_becomes_rgb_of_8_bit(tmp_path, pixels, kwargs, expected):
    tifffile.imwrite(tmp_path / "a.tif", pixels, **({"photometric": "minisblack"} | kwargs))
    level = open_slide(tmp_path / "a.tif").levels[0]
    found = level[:]
    assert found.dtype == np.uint8
    assert found.shape == level.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1 if pixels is ALPHA else 0)
    assert np.array_equal(level[3:30, 11:39], found[3:30, 11:39])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_png(tmp_path, mode):
    Image.fromarray(ALPHA).convert(mode).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")
    expected = {"RGB": ALPHA[..., :3], "RGBA": OVER_WHITE}.get(mode)
    if expected is None:
        expected = np.asarray(Image.fromarray(ALPHA).convert("L"))[..., np.newaxis].repeat(3, -1)
    np.testing.assert_allclose(slide.levels[0][:], expected, atol=1)
    assert slide.um_per_px is None
    with pytest.raises(ValueError, match=r"a.png does not state its pixel size; give um_per_px"):
        slide.at(0.5)
    assert open_slide(tmp_path / "a.png", um_per_px=0.5).at(1.0).shape == (20, 25, 3)


def test_resolution_for_printing_is_no_pixel_size(tmp_path):
    assert open_slide(generic(tmp_path / "a.tif", resolution=(118, 118))).um_per_px is None


@pytest.mark.parametrize("um_per_px", [0.3, 0.5, 0.77, 1.0, 3.1, 0.11])
def test_regions_do_not_depend_on_how_the_image_is_cut(tmp_path, um_per_px):
    view = open_slide(ome(tmp_path / "a.ome.tif")).at(um_per_px)
    whole = view[:]
    assert whole.shape == view.shape
    rows, columns = sorted({0, 1, 7, 20, view.shape[0]}), sorted({0, 3, 19, view.shape[1]})
    for y0, y1 in pairwise(rows):
        for x0, x1 in pairwise(columns):
            assert np.array_equal(view[y0:y1, x0:x1], whole[y0:y1, x0:x1])


def test_large_regions_are_read_in_parts(monkeypatch):
    level = level_of_array(RGB, (0.5, 0.5))
    expected = _view(level, 2.7)[:]
    monkeypatch.setattr("limner.io.slide.LARGEST_SOURCE", 5000)
    read = []
    level = level_of_array(RGB, (0.5, 0.5))
    object.__setattr__(level, "read", lambda *r, inner=level.read: read.append(r) or inner(*r))
    assert np.array_equal(_view(level, 2.7)[:], expected)
    assert max((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in read) < 7000


def _view(level, um_per_px):
    return Slide(Path("a.png"), (level,)).at(um_per_px)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_whole_factors_are_the_mean(factor):
    """Pillow's `reduce` is the mean of squares of whole pixels."""
    cut = RGB[: 300 // factor * factor, : 420 // factor * factor]
    found = _view(level_of_array(cut, (0.5, 0.5)), 0.5 * factor)[:]
    np.testing.assert_allclose(found, reduced(cut, factor), atol=1)


def test_smooth_images_keep_their_place():
    """A ramp of one grey level a pixel: a view pixel's value is the position of its centre."""
    ramp = np.tile(np.arange(200, dtype=np.uint8)[:, np.newaxis], (1, 60))
    for um_per_px in (0.8, 1.3, 2.9):
        view = _view(level_of_array(ramp, (1.0, 1.0)), um_per_px)
        centres = (np.arange(view.shape[0]) + 0.5) * view.downsample[0] - 0.5
        inside = slice(1, -1)
        np.testing.assert_allclose(view[:][inside, 5, 0], centres[inside], atol=0.51)


def test_the_level_is_the_nearest_finer_one(tmp_path):
    slide = open_slide(svs(tmp_path / "a.svs"))
    assert slide.at(0.5) is slide.levels[0]  # within 1 %
    assert slide.at(1.996) is slide.levels[1]
    half = slide.at(0.998)
    np.testing.assert_allclose(half[:], reduced(RGB, 2), atol=1)
    assert slide.thumbnail(105) is slide.levels[1]
    assert slide.thumbnail(50).shape == (36, 50, 3)


def test_threads_and_pickles(tmp_path):
    slide = open_slide(svs(tmp_path / "a.svs"), um_per_px=0.7)
    again = pickle.loads(pickle.dumps(slide))
    assert again.um_per_px == (0.7, 0.7)
    with ThreadPoolExecutor(4) as pool:
        strips = list(pool.map(lambda y: again.levels[0][y : y + 10], range(0, 300, 10)))
    assert np.array_equal(np.concatenate(strips), RGB)


@pytest.mark.parametrize("write", [svs, ome, generic])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.4, 0.9])
def test_truncated_slides_are_named(tmp_path, capfd, make_truncated, write, fraction):
    path = make_truncated(write(tmp_path / "bad.tif"), fraction)
    with pytest.raises(ValueError, match=r"bad.tif cannot be read") as raised:
        for level in open_slide(path).levels:
            level[:]
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("rows", "message"), [(0, "a size of 0 pixels"), (900, "it has no tile 9")])
def test_a_size_that_does_not_fit_the_pixels_is_named(tmp_path, rows, message):
    path = tmp_path / "bad.tif"
    tifffile.imwrite(path, np.zeros((300, 300, 3), np.uint8), tile=(128, 128), photometric="rgb", metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["ImageLength"].overwrite(rows)
    with pytest.raises(ValueError, match=rf"bad.tif cannot be read .*{message}"):
        open_slide(path, 0.25).levels[0][:]


@pytest.mark.parametrize(
    ("name", "pixels", "kwargs", "message"),
    [
        ("a.tif", np.zeros((5, 40, 50), np.uint8), {"photometric": "minisblack"}, "is a stack"),
        ("a.tif", np.zeros((40, 50), np.float32), {}, "type float32"),
        ("a.tif", np.zeros((40, 50, 4), np.uint8), {"photometric": "separated"}, "CMYK"),
        ("a.ome.tif", np.zeros((5, 40, 50), np.uint8), {"metadata": {"axes": "CYX"}}, "5 channels"),
        ("a.bmp", np.zeros((40, 50), np.uint8), {}, "no known format"),
    ],
)
def test_what_is_no_slide_is_refused(tmp_path, name, pixels, kwargs, message):
    tifffile.imwrite(tmp_path / name, pixels, **kwargs)
    with pytest.raises(ValueError, match=message) as raised:
        open_slide(tmp_path / name)
    assert name in str(raised.value)
    with pytest.raises(ValueError, match="does not exist"):
        open_slide(tmp_path / "none.svs")


def test_tiles_left_out_are_white(tmp_path):
    path = tmp_path / "a.tif"
    tiles = (RGB[:16, :16] if i == 0 else None for i in range(4))
    tifffile.imwrite(
        path, tiles, shape=(32, 32, 3), dtype=np.uint8, tile=(16, 16), photometric="rgb", compression="zlib"
    )
    found = open_slide(path).levels[0][:]
    assert np.array_equal(found[:16, :16], RGB[:16, :16])
    assert (found[16:] == 255).all() and (found[:, 16:] == 255).all()


def test_only_tiles_touched_are_read(tmp_path):
    """Every tile but the one of rows 64 to 128 and columns 48 to 96 is spoilt."""
    path = ome(tmp_path / "a.ome.tif", n_levels=1, compression="zlib")
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        tiles = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    file = bytearray(path.read_bytes())
    for i, (offset, n_bytes) in enumerate(tiles):
        if i != 1 * 9 + 1:
            file[offset : offset + n_bytes] = bytes(n_bytes)
    path.write_bytes(file)
    level = open_slide(path).levels[0]
    assert np.array_equal(level[64:128, 48:96], RGB[64:128, 48:96])
    with pytest.raises(ValueError, match="cannot be read"):
        level[63:128, 48:96]
