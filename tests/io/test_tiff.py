"""TIFF stacks against tifffile and Pillow."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from limner.io import read, write_result
from limner.io.tiff import save_ome_tiff

PIXELS = np.arange(4 * 5 * 6, dtype=np.uint16).reshape(4, 5, 6)
PER_MICRON = (1 / 10, 1 / 20)  # x, y: pixels of 10 and 20 um


def imagej(path, unit="um", spacing=50.0, pixels=PIXELS, **kwargs):
    metadata = {"axes": "ZYX", "unit": unit} | ({"spacing": spacing} if spacing else {})
    tifffile.imwrite(path, pixels, imagej=True, resolution=PER_MICRON, metadata=metadata, **kwargs)
    return path


@pytest.mark.parametrize(
    ("unit", "mm"),
    [("um", 1e-3), ("micron", 1e-3), ("\\u00B5m", 1e-3), ("mm", 1), ("cm", 10), ("inch", 25.4), ("nm", 1e-6)],
)
def test_imagej_spacing(tmp_path, unit, mm):
    stack = read(imagej(tmp_path / "a.tif", unit))
    assert np.array_equal(stack.pixels, PIXELS)
    assert stack.space.spacing == pytest.approx((50 * mm, 20 * mm, 10 * mm), rel=1e-6)


@pytest.mark.parametrize("kwargs", [{"unit": "pixel"}, {"unit": ""}, {"spacing": None}])
def test_imagej_without_unit_or_z_spacing_needs_spacing(tmp_path, kwargs):
    path = imagej(tmp_path / "a.tif", **kwargs)
    with pytest.raises(ValueError, match="no spacing"):
        read(path)
    assert read(path, spacing=(0.3, 0.2, 0.1)).space.spacing == (0.3, 0.2, 0.1)


@pytest.mark.parametrize(("dpi", "unit"), [(72, "INCH"), (96, "INCH"), (1, "NONE"), (28, "CENTIMETER")])
def test_resolution_for_printing_is_no_spacing(tmp_path, dpi, unit):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS[0], resolution=(dpi, dpi), resolutionunit=unit)
    with pytest.raises(ValueError, match="no spacing"):
        read(tmp_path / "a.tif")


def test_ome_spacing(tmp_path):
    sizes = {"PhysicalSizeZ": 50, "PhysicalSizeY": 0.02, "PhysicalSizeYUnit": "mm", "PhysicalSizeX": 10}
    tifffile.imwrite(tmp_path / "a.ome.tif", PIXELS, metadata={"axes": "ZYX"} | sizes)
    assert read(tmp_path / "a.ome.tif").space.spacing == pytest.approx((0.05, 0.02, 0.01))


def test_given_spacing_goes_before_the_files(tmp_path):
    assert read(imagej(tmp_path / "a.TIF"), spacing=(1, 2, 3)).space.spacing == (1, 2, 3)


RGB = np.stack([PIXELS, PIXELS + 1, PIXELS + 2], axis=-1)


@pytest.mark.parametrize(
    ("pixels", "kwargs", "expected"),
    [
        (PIXELS, {"metadata": None, "photometric": "minisblack"}, PIXELS),
        (PIXELS, {"imagej": True, "metadata": {"axes": "ZYX"}}, PIXELS),
        (PIXELS, {"byteorder": ">", "photometric": "minisblack"}, PIXELS),
        (PIXELS[0], {}, PIXELS[:1]),
        (PIXELS.astype(np.float16), {"photometric": "minisblack"}, PIXELS.astype(np.float32)),
        (PIXELS % 2 == 0, {"photometric": "minisblack"}, (PIXELS % 2 == 0).astype(np.uint8)),
        (RGB, {"photometric": "rgb"}, RGB),
        (RGB[0], {"photometric": "rgb"}, RGB[:1]),
        (np.moveaxis(RGB[0], -1, 0), {"photometric": "rgb", "planarconfig": "separate"}, RGB[:1]),
        (np.moveaxis(RGB, -1, 1), {"imagej": True, "metadata": {"axes": "ZCYX"}}, RGB),
        (np.moveaxis(RGB[0], -1, 0), {"imagej": True, "metadata": {"axes": "CYX"}}, RGB[:1]),
        (RGB[..., [0, 1, 2, 0]], {"photometric": "rgb", "extrasamples": ["unassalpha"]}, RGB),
    ],
)
def test_layouts(tmp_path, pixels, kwargs, expected):
    tifffile.imwrite(tmp_path / "a.tif", pixels, **kwargs)
    stack = read(tmp_path / "a.tif", spacing=(1, 1, 1))
    assert stack.pixels.dtype == expected.dtype
    assert stack.pixels.dtype.isnative
    assert np.array_equal(stack.pixels, expected)


def test_pages_appended_one_by_one_are_sections(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for page in PIXELS:
            tif.write(page)
    assert np.array_equal(read(tmp_path / "a.tif", spacing=(1, 1, 1)).pixels, PIXELS)


def test_pages_by_pillow(tmp_path):
    first, *rest = (Image.fromarray(page) for page in PIXELS.astype(np.uint8))
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
    assert np.array_equal(read(tmp_path / "a.tif", spacing=(1, 1, 1)).pixels, PIXELS)


@pytest.mark.parametrize(("axes", "shape"), [("TYX", (4, 5, 6)), ("ZCYX", (3, 2, 5, 6)), ("TZYX", (2, 2, 5, 6))])
def test_time_points_and_channels_are_refused(tmp_path, axes, shape):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), imagej=True, metadata={"axes": axes})
    with pytest.raises(ValueError, match=rf"a.tif has axes {axes}"):
        read(tmp_path / "a.tif", spacing=(1, 1, 1))


def test_pages_of_different_shapes_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(PIXELS[0])
        tif.write(PIXELS[0, :3])
    with pytest.raises(ValueError, match="2 images of different shapes"):
        read(tmp_path / "a.tif", spacing=(1, 1, 1))


def test_cmyk_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 6, 4), np.uint8), photometric="separated")
    with pytest.raises(ValueError, match="CMYK"):
        read(tmp_path / "a.tif", spacing=(1, 1, 1))


def write_pages(path, pixels):
    with tifffile.TiffWriter(path) as tif:
        for page in pixels:
            tif.write(page, compression="zlib")


WRITERS = {
    "plain": lambda path, pixels: tifffile.imwrite(path, pixels, photometric="minisblack"),
    "zlib": lambda path, pixels: tifffile.imwrite(path, pixels, compression="zlib", photometric="minisblack"),
    "imagej": lambda path, pixels: imagej(path, pixels=pixels),
    "imagej zlib": lambda path, pixels: imagej(path, pixels=pixels, compression="zlib"),
    "ome": lambda path, pixels: tifffile.imwrite(path, pixels, ome=True, metadata={"axes": "ZYX"}),
    "pages": write_pages,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.5, 0.8])
def test_truncated_tiff(tmp_path, capfd, noise, make_truncated, writer, fraction):
    WRITERS[writer](tmp_path / "a.tif", noise)
    make_truncated(tmp_path / "a.tif", fraction)
    with pytest.raises(ValueError, match=r"^read\(\): .*a.tif cannot be read \(truncated.*") as raised:
        read(tmp_path / "a.tif", spacing=(1, 1, 1))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("largest", [200, 60000, 70000, 0.5])
@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_result_comes_back_through_tifffile(tmp_path, largest, axis):
    stack = read(imagej(tmp_path / "a.tif"), section_axis=axis)
    result = np.zeros(stack.space.shape, type(largest))
    result[1, 2, 3] = largest
    written = write_result(tmp_path / "out", "labels", result, stack)
    assert written.name == "labels.tif"
    back = tifffile.imread(written)
    assert back.dtype == {200: np.uint8, 60000: np.uint16, 70000: np.uint32, 0.5: np.float32}[largest]
    assert np.array_equal(np.moveaxis(back, "zyx".index(axis), 0), result)
    again = read(written, section_axis=axis)
    assert again.space.spacing == pytest.approx(stack.space.spacing, rel=1e-6)
    with tifffile.TiffFile(written) as tif:
        assert tif.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert tif.is_imagej == (largest != 70000)


def test_three_sections_are_not_written_as_colours(tmp_path):
    stack = read(imagej(tmp_path / "a.tif", pixels=PIXELS[:3]))
    for largest in (3, 70000):
        written = write_result(tmp_path / "out", "labels", np.full((3, 5, 6), largest), stack)
        assert read(written).pixels.shape == (3, 5, 6)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("shape", [(3, 90, 71), (1, 90, 71)])
def test_ome_tiff_with_a_pyramid_comes_back_through_tifffile(tmp_path, monkeypatch, colour, shape):
    monkeypatch.setattr("limner.io.tiff.OME_SMALLEST_LEVEL", 40)
    monkeypatch.setattr("limner.io.tiff.OME_TILE", (16, 16))
    pixels = np.random.default_rng(0).integers(0, 70000, (*shape, 3) if colour else shape)
    pixels = pixels.astype(np.uint8 if colour else np.uint32)
    save_ome_tiff(tmp_path / "a.ome.tif", pixels, (0.05, 0.02, 0.0003))
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tif:
        (series,) = tif.series
        assert [level.shape[-2 - colour] for level in series.levels] == [90, 45, 23]
        assert np.array_equal(series.asarray().reshape(pixels.shape), pixels)
        coarse = series.levels[1].asarray().reshape(-1, 45, 36, *[3] * colour)
        if colour:
            assert abs(coarse[0, 3, 4, 0] - pixels[0, 6:8, 8:10, 0].mean()) <= 0.5
        else:
            assert np.array_equal(coarse, pixels[:, ::2, ::2])
        assert 'PhysicalSizeX="0.3"' in tif.ome_metadata
    back = read(tmp_path / "a.ome.tif")
    assert np.array_equal(back.pixels, pixels)
    assert back.space.spacing == pytest.approx((0.05, 0.02, 0.0003))


def test_ome_tiff_stays_ome_tiff(tmp_path):
    sizes = {"PhysicalSizeZ": 50, "PhysicalSizeY": 20, "PhysicalSizeX": 10}
    tifffile.imwrite(tmp_path / "a.ome.tif", PIXELS, metadata={"axes": "ZYX"} | sizes)
    stack = read(tmp_path / "a.ome.tif")
    written = write_result(tmp_path / "out", "labels", np.full(PIXELS.shape, 9), stack)
    assert written.name == "labels.ome.tif"
    with tifffile.TiffFile(written) as tif:
        assert tif.is_ome
        assert tif.series[0].axes == "ZYX"
    assert read(written).space.spacing == pytest.approx((0.05, 0.02, 0.01))
