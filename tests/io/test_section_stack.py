"""Stacks read by windows against `read`, and and a network on it."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import imageio.v3 as iio
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
import zarr
from torch import nn

from limner.inference import Options, predict
from limner.io import open_sections, read, section_stack, tiff_planes, write_ome_zarr, write_sections
from limner.space import Space
from limner.volume import Volume

RNG = np.random.default_rng(0)
SPACING = (0.05, 0.02, 0.01)
PIXELS = RNG.integers(0, 2**16, (4, 90, 71)).astype(np.uint16)
RGB = np.repeat(PIXELS[..., None], 3, axis=-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Pyramids and several chunks with small arrays."""
    for name, n in (("CHUNK", 32), ("SMALLEST_LEVEL", 40), ("CHUNK_PIXELS", 2048)):
        monkeypatch.setattr(f"limner.io.ome_zarr.{name}", n)
    monkeypatch.setattr("limner.io.tiff.OME_SMALLEST_LEVEL", 40)
    monkeypatch.setattr("limner.io.tiff.OME_TILE", (16, 16))


def by_windows(stack, window=32):
    """Every section put together from windows that overlap and reach beyond the section."""
    for section in stack:
        whole = np.zeros(section.shape, section.dtype)
        for y in range(0, section.shape[0], window):
            for x in range(0, section.shape[1], window):
                part = section[max(0, y - 5) : y + window + 3, x : x + window + 3]
                whole[max(0, y - 5) : y + window + 3, x : x + window + 3] = part
        yield whole


def assert_like_read(path, spacing=SPACING, **kwargs):
    stack, volume = open_sections(path, **kwargs), read(path, spacing=spacing, **kwargs)
    assert all(np.array_equal(a, b) for a, b in zip(by_windows(stack), volume.pixels, strict=True))
    assert {s.dtype for s in stack} == {volume.pixels.dtype}
    assert [s.shape for s in stack] == [volume.pixels.shape[1:]] * len(stack)
    assert stack.names == volume.section_names
    assert stack.source.kind == volume.source.kind
    assert stack.source.extension == volume.source.extension
    return stack


def pages(path, pixels, **kwargs):
    with tifffile.TiffWriter(path) as tif:
        for page in pixels:
            tif.write(page, **kwargs)


def gapped(path):
    """One series whose pages do not follow one another in the file."""
    with tifffile.TiffWriter(path) as tif:
        for page in PIXELS:
            tif.write(page, metadata=None, rowsperstrip=7, extratags=[(65000, "s", 0, "x" * 999, False)])


TIFFS = {
    "one strip": lambda path: tifffile.imwrite(path, PIXELS, photometric="minisblack"),
    "big-endian": lambda path: tifffile.imwrite(path, PIXELS, photometric="minisblack", byteorder=">"),
    "strips": lambda path: tifffile.imwrite(path, PIXELS, photometric="minisblack", rowsperstrip=7, compression="zlib"),
    "tiles": lambda path: tifffile.imwrite(path, PIXELS, photometric="minisblack", tile=(16, 32), compression="zlib"),
    "predictor": lambda path: tifffile.imwrite(
        path, PIXELS, photometric="minisblack", tile=(16, 32), compression="zlib", predictor=True
    ),
    "ImageJ": lambda path: tifffile.imwrite(path, PIXELS, imagej=True, metadata={"axes": "ZYX"}),
    "ImageJ RGB planes": lambda path: tifffile.imwrite(
        path, np.moveaxis(RGB, -1, 1), imagej=True, metadata={"axes": "ZCYX"}
    ),
    "channels before sections": lambda path: tifffile.imwrite(
        path, np.moveaxis(RGB, -1, 0), photometric="minisblack", metadata={"axes": "CZYX"}
    ),
    "RGB": lambda path: tifffile.imwrite(path, RGB, photometric="rgb", tile=(16, 32), compression="zlib"),
    "RGB separate": lambda path: tifffile.imwrite(
        path, np.moveaxis(RGB, -1, 1), photometric="rgb", planarconfig="separate", rowsperstrip=7
    ),
    "volumetric": lambda path: tifffile.imwrite(
        path, PIXELS, photometric="minisblack", volumetric=True, tile=(2, 16, 32), compression="zlib"
    ),
    "pages one by one": lambda path: pages(path, PIXELS),
    "pages one by one, tiled": lambda path: pages(path, PIXELS, tile=(16, 32), compression="lzw"),
    "gaps": gapped,
    "one page": lambda path: tifffile.imwrite(path, PIXELS[0]),
    "bool": lambda path: tifffile.imwrite(path, PIXELS % 2 == 0, photometric="minisblack"),
    "half": lambda path: tifffile.imwrite(path, (PIXELS % 99).astype(np.float16), photometric="minisblack"),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiff_by_windows_is_as_read(tmp_path, kind):
    TIFFS[kind](tmp_path / "a.tif")
    if "RGB" in kind or "channels" in kind:
        stack = open_sections(tmp_path / "a.tif")
        assert np.array_equal(list(by_windows(stack)), PIXELS)
    else:
        assert_like_read(tmp_path / "a.tif")


def test_stack_of_one_stated_page(tmp_path):
    """ImageJ states one page for all of a large stack."""
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        offset = tif.pages.first.dataoffsets[0]
    assert offset  # the pixels of all sections follow one another
    tifffile.imwrite(tmp_path / "b.tif", PIXELS, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(tmp_path / "b.tif") as tif:
        assert len(tif.pages) == 1
    assert_like_read(tmp_path / "b.tif")


def test_tiles_that_are_left_out_are_zeros(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tiles = [PIXELS[0, :16, :16], None, None, PIXELS[1, :16, :16], None, None, None, None] * 2
        tif.write(iter(tiles), shape=(2, 32, 64), dtype=np.uint16, tile=(16, 16), compression="zlib")
    assert_like_read(tmp_path / "a.tif")


def test_palette_of_greys(tmp_path):
    palette = np.repeat((np.arange(256, dtype=np.uint16)[::-1] << 8)[None], 3, axis=0)
    indices = (PIXELS % 200).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", indices[0], photometric="palette", colormap=palette)
    assert np.array_equal(open_sections(tmp_path / "a.tif")[0][:, :], 255 - indices[0])


@pytest.mark.parametrize("axis", ["z", "y", "x"])
@pytest.mark.parametrize("ending", [".tif", ".nii.gz", ".nrrd", ".mha", ".zarr"])
def test_axes_and_geometry_are_as_read(tmp_path, ending, axis):
    path = tmp_path / f"a{ending}"
    make_volume(path)
    stack, volume = assert_like_read(path, None, section_axis=axis), read(path, section_axis=axis)
    assert stack.spacing == pytest.approx(volume.space.spacing)
    assert (stack.origin, stack.direction) == (volume.space.origin, volume.space.direction)
    assert open_sections(path, spacing=(3, 2, 1), section_axis=axis).spacing == (3, 2, 1)


def make_volume(path, pixels=PIXELS):
    """A stack of SPACING, its origin and direction stated where the format can."""
    if path.name.endswith((".tif", ".zarr")):
        space = Space(pixels.shape, SPACING, (1.0, 2.0, 3.0))
        if path.suffix == ".zarr":
            write_ome_zarr(path, Volume(pixels, space), "0.4")
            return
        unit = {"axes": "ZYX", "unit": "um", "spacing": 50.0}
        tifffile.imwrite(path, pixels, imagej=True, resolution=(1 / 10, 1 / 20), metadata=unit)
        return
    image = sitk.GetImageFromArray(pixels)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((1.0, 2.0, 3.0))
    image.SetDirection((0, 1, 0, 0, 0, 1, 1, 0, 0))
    sitk.WriteImage(image, str(path))


@pytest.mark.parametrize("axes", ["yx", "zyx", "czyx", "tczyx"])
def test_ome_zarr_axes(tmp_path, axes):
    colour = PIXELS if "c" not in axes else RGB if axes == "czyx" else PIXELS[..., None]
    stored = colour if "z" in axes else PIXELS[0]
    stored = np.moveaxis(stored, -1, 0) if "c" in axes else stored
    stored = stored[None] if "t" in axes else stored
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("s0", data=stored)
    listed = [{"name": a, "type": {"t": "time", "c": "channel"}.get(a, "space")} for a in axes]
    scale = [{"type": "scale", "scale": [1.0] * len(axes)}]
    datasets = [{"path": "s0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": listed, "datasets": datasets}]
    for section_axis in "zy":
        stack = open_sections(tmp_path / "a.zarr", section_axis=section_axis)
        expected = np.moveaxis(PIXELS if "z" in axes else PIXELS[:1], "zy".index(section_axis), 0)
        assert np.array_equal(list(by_windows(stack)), expected)
        assert stack.spacing is None


def test_zarr_reads_the_chunks_touched_alone(tmp_path):
    write_ome_zarr(tmp_path / "a.zarr", Volume(PIXELS, Space(PIXELS.shape, SPACING)), "0.4")
    for file in (tmp_path / "a.zarr" / "0").glob("*/*/*"):
        if file.relative_to(tmp_path / "a.zarr" / "0").parts[1:] != ("1", "1"):
            file.write_bytes(b"damaged")
    stack = open_sections(tmp_path / "a.zarr")
    assert np.array_equal(stack[1][32:64, 40:64], PIXELS[1, 32:64, 40:64])
    with pytest.raises(ValueError, match=r"^read\(\): .*a.zarr cannot be read"):
        stack[1][31:64, 40:64]


def count_calls(monkeypatch, where, name):
    calls, original = [], getattr(where, name)

    def counted(*arguments, **kwargs):
        calls.append(arguments)
        return original(*arguments, **kwargs)

    monkeypatch.setattr(where, name, counted)
    return calls


SIZES = [(40, 31), (25, 60), (33, 33)]


@pytest.fixture(params=[".png", ".tif", ".jpg"])
def folder(request, make_folder):
    images = [np.full(size, 50 * i, np.uint8) for i, size in enumerate(SIZES)]
    return make_folder(images, ending=request.param)


def test_folder_keeps_sizes_and_names(folder):
    stack = open_sections(folder)
    assert stack.names == tuple(f"s{i}{stack.source.extension}" for i in (1, 2, 3))
    assert [s.shape for s in stack] == list(stack.source.sizes) == SIZES
    assert stack.spacing is None and stack.source.kind == "folder"
    for i, whole in enumerate(by_windows(stack)):
        assert whole.dtype == stack[i].dtype == np.uint8
        assert (whole == 50 * i).all()


@pytest.mark.parametrize("channels", [0, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_every_depth_is_as_read(tmp_path, channels, dtype):
    image = (PIXELS[0] % 251).astype(dtype)
    stored = np.stack([image] * min(channels, 3) + [image] * (channels == 4), axis=-1) if channels else image
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(stored)))
    section = open_sections(tmp_path)[0]
    assert section.dtype == dtype
    assert np.array_equal(section[3:50, 4:], image[3:50, 4:])


def test_a_folders_file_is_decoded_once_and_not_before(folder, monkeypatch):
    calls = count_calls(monkeypatch, section_stack, "load_section")
    stack = open_sections(folder)
    assert not calls
    list(by_windows(stack, 8))
    assert [file.name for (file,) in calls] == list(stack.names)


@pytest.mark.parametrize("kind", ["strips", "tiles", "one strip"])
def test_tiff_reads_the_pieces_touched_alone(tmp_path, monkeypatch, kind):
    TIFFS[kind](tmp_path / "a.tif")
    monkeypatch.setattr("limner.io.tiff_planes.STRIP_BYTES", 1)
    stack = open_sections(tmp_path / "a.tif")
    calls = count_calls(monkeypatch, tiff_planes, "_tile")
    stack[2][20:21, 40:41]
    assert len(calls) == 1


def test_a_page_of_one_compressed_piece_is_decoded_once(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="minisblack", rowsperstrip=90, compression="zlib")
    stack = open_sections(tmp_path / "a.tif")
    calls = count_calls(monkeypatch, tiff_planes, "_tile")
    assert np.array_equal(list(by_windows(stack, 16)), PIXELS)
    assert len(calls) == len(PIXELS)


def test_memory_is_that_of_a_window(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write((np.zeros((1000, 1000), np.uint8) for _ in range(8)), shape=(8, 1000, 1000), dtype=np.uint8)
    stack = open_sections(tmp_path / "a.tif")
    ones = np.ones((1000, 1000), np.float32)
    tracemalloc.start()
    write_sections(tmp_path, "b", (ones[: s[:64, :].shape[1]] for s in stack), stack, np.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * ones.nbytes  # of 8 sections
    assert (tifffile.imread(tmp_path / "b.tif") == 1).all()


def test_numpys_slices(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="minisblack", rowsperstrip=7, compression="zlib")
    section = open_sections(tmp_path / "a.tif")[-1]
    for region in (
        np.s_[:, :],
        np.s_[-5:, :-60],
        np.s_[5:5, 2:9],
        np.s_[9:2, 3:],
        np.s_[1:2, ::3],
        np.s_[7:80:4, 1::2],
    ):
        assert np.array_equal(section[region], PIXELS[-1][region])
        assert section[region].shape == PIXELS[-1][region].shape
    for region in (3, np.s_[3, :], np.s_[:, :, :], np.s_[::-1, :], np.s_[:]):
        with pytest.raises(ValueError, match=r"Section\[\]: the index is .*; give two slices"):
            section[region]
    with pytest.raises(IndexError):
        open_sections(tmp_path / "a.tif")[4]


class Mean(nn.Module):
    """A network of one class beside its opposite: the mean of 5 x 5 pixels."""

    halo, alignment = 2, 1

    def forward(self, image, region):
        mean = nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)[..., region[0], region[1]]
        return torch.cat([mean, -mean], dim=1)


@pytest.mark.parametrize("ending", [".tif", ".zarr", ".nii.gz", ".folder"])
def test_threads_of_inference_read_it(tmp_path, ending, make_folder):
    path = tmp_path / f"a{ending}"
    if ending == ".folder":
        path = make_folder(list(PIXELS))
    else:
        make_volume(path)
    found = np.zeros((2, 2, 90, 71), np.float32)
    for image, result in zip((open_sections(path)[2], PIXELS[2]), found, strict=True):

        def write(tile, probabilities, result=result):
            result[(slice(None), *tile.kept.slices)] = probabilities

        predict(Mean(), image, write, Options(window=16, jobs=4, device="cpu"))
    np.testing.assert_array_equal(*found)


def test_threads_that_read_different_sections(folder, monkeypatch):
    """One decodes at a time, and each gets its own section."""
    decoding, most, original = [], [], section_stack.load_section

    def load(file):
        decoding.append(file)
        most.append(len(decoding))
        loaded = original(file)
        decoding.remove(file)
        return loaded

    monkeypatch.setattr(section_stack, "load_section", load)
    stack = open_sections(folder)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: int(stack[i % 3][3:9, 5:9].max()), range(200)))
    assert found == [50 * (i % 3) for i in range(200)]
    assert max(most) == 1


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_opened(tmp_path, make_folder):
    mixed = make_folder([PIXELS[0], PIXELS[1].astype(np.uint8)])
    (tmp_path / "a.txt").write_text("no image")
    make_volume(tmp_path / "a.tif")
    for path, kwargs, message in [
        (tmp_path / "none", {}, r"none does not exist"),
        (tmp_path / "a.txt", {}, "no known format"),
        (mixed, {}, r"open_sections\(\): .*s2.png is uint8, but s1.png is uint16"),
        (mixed, {"section_axis": "x"}, "leave section_axis out"),
        (tmp_path / "a.tif", {"section_axis": "t"}, "give one of z, y, x"),
        (tmp_path / "a.tif", {"spacing": (1, 2)}, "give three numbers"),
        (tmp_path / "a.tif", {"spacing": (1, 0, 1)}, r"spacing \(1, 0, 1\).* above 0"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            open_sections(path, **kwargs)
        assert "\n" not in str(raised.value)


def test_pages_and_spacings_in_a_folder(tmp_path):
    for i, um in enumerate((10, 20)):
        unit = {"unit": "um", "spacing": 50.0}
        tifffile.imwrite(tmp_path / f"{i}.tif", PIXELS[0], imagej=True, resolution=(1 / um, 1 / um), metadata=unit)
    with pytest.raises(ValueError, match=r"1.tif has spacing .* but 0.tif"):
        open_sections(tmp_path)
    tifffile.imwrite(tmp_path / "1.tif", PIXELS, photometric="minisblack")
    with pytest.raises(ValueError, match=r"1\.tif holds 4 pages in a folder of sections"):
        open_sections(tmp_path)
    (tmp_path / "1.tif").unlink()
    assert open_sections(tmp_path).spacing == pytest.approx((0.05, 0.01, 0.01))


@pytest.mark.parametrize("ending", [".tif", ".png", ".mha", ".zarr"])
def test_colours_are_refused_when_they_are_read(tmp_path, ending, make_folder):
    colour = (RGB % 251).astype(np.uint8)
    colour[1, 50, 60, 2] ^= 1
    path = tmp_path / f"a{ending}"
    if ending == ".png":
        path = make_folder(list(colour))
    elif ending == ".tif":
        tifffile.imwrite(path, colour, photometric="rgb")
    elif ending == ".mha":
        sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(path))
    else:
        write_ome_zarr(path, Volume(colour, Space(PIXELS.shape, SPACING)))
    stack = open_sections(path)
    assert np.array_equal(stack[0][:, :], colour[0, ..., 0])
    assert np.array_equal(stack[1][:50, :], colour[1, :50, :, 0])
    with pytest.raises(ValueError, match=rf"open_sections\(\): section {stack.names[1]} of .* is in colour"):
        stack[1][40:, :]
    assert np.array_equal(stack[1].in_colour((slice(40, 52), slice(30, None, 2))), colour[1, 40:52, 30::2])


@pytest.mark.parametrize("ending", [".tif", ".nii", ".zarr", ".folder"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_names_the_section(tmp_path, make_folder, ending, value):
    pixels = (PIXELS / 7).astype(np.float32)
    pixels[2, 30, 40] = value
    path = tmp_path / f"a{ending}"
    if ending == ".folder":
        path = make_folder(list(pixels), ending=".tif")
    elif ending == ".zarr":
        write_ome_zarr(path, Volume(pixels, Space(pixels.shape, SPACING)))
    else:
        make_volume(path, pixels)
    stack = open_sections(path)
    assert np.array_equal(stack[2][:30, :], pixels[2, :30])
    with pytest.raises(ValueError, match=rf"section {stack.names[2]} of .* holds NaN or infinity"):
        stack[2][20:, 40:41]


@pytest.mark.parametrize("kind", [k for k in TIFFS if k not in ("one page", "bool")])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.6])
def test_truncated_tiff(tmp_path, make_truncated, capfd, kind, fraction):
    TIFFS[kind](tmp_path / "a.tif")
    make_truncated(tmp_path / "a.tif", fraction)
    with pytest.raises(ValueError, match=r"^read\(\): .*a.tif cannot be read") as raised:
        list(by_windows(open_sections(tmp_path / "a.tif")))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_truncated_section(folder, make_truncated, capfd, fraction):
    (file,) = folder.glob("s2.*")
    iio.imwrite(file, (PIXELS[0] % 251).astype(np.uint8))
    make_truncated(file, fraction)
    with pytest.raises(ValueError, match=rf"^read\(\): .*{file.name} cannot be read") as raised:
        open_sections(folder)[1][:, :]
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_sections_of_ninety_million_pixels_are_no_attack(tmp_path):
    """Pillow would warn of them, and refuse those of twice the size."""
    pixels = np.zeros((9_500, 9_500), np.uint8)
    pixels[9_000, 40] = 7
    iio.imwrite(tmp_path / "s0.png", pixels, plugin="pillow", compress_level=1)
    section = open_sections(tmp_path)[0]
    assert section.shape == pixels.shape
    assert section[9_000:9_001, 30:50].argmax() == 10
