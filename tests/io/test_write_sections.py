"""Results written section by section, against `write_result` and through other libraries."""

from dataclasses import replace

import imageio.v3 as iio
import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
import tensorstore
import tifffile
import zarr

from limner.io import label_type, open_sections, read, write_images, write_ome_zarr, write_result, write_sections
from limner.space import Space
from limner.volume import MadeSections, Volume

SPACING = (0.05, 0.02, 0.01)
SHAPE = (5, 90, 71)
TYPES = [np.float32, np.uint8, np.uint16, np.uint32]
FORMS = [".tif", ".ome.tif", ".zarr", ".ome.zarr", ".nii.gz", ".nrrd", ".mhd", ".folder"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Pyramids and several chunks with small arrays."""
    for name, n in (("CHUNK", 32), ("SMALLEST_LEVEL", 40), ("CHUNK_PIXELS", 2048)):
        monkeypatch.setattr(f"limner.io.ome_zarr.{name}", n)
    monkeypatch.setattr("limner.io.tiff.OME_SMALLEST_LEVEL", 40)
    monkeypatch.setattr("limner.io.tiff.OME_TILE", (16, 16))


def make_stack(folder, form, shape=SHAPE, version="0.5"):
    """Zeros in one of the forms, with spacing, origin and direction as far as it can state them."""
    path, pixels = folder / f"stack{form}", np.zeros(shape, np.uint8)
    if form == ".folder":
        path.mkdir()
        for i, section in enumerate(pixels):
            iio.imwrite(path / f"s{i}.png", section)
    elif form.endswith(".zarr"):
        write_ome_zarr(path, Volume(pixels, Space(shape, SPACING, (1.0, 2.0, 3.0))), version)
    elif form == ".ome.tif":
        sizes = {"PhysicalSizeZ": 50, "PhysicalSizeY": 20, "PhysicalSizeX": 10}
        tifffile.imwrite(path, pixels, metadata={"axes": "ZYX"} | sizes)
    elif form == ".tif":
        unit = {"axes": "ZYX", "unit": "um", "spacing": 50.0}
        tifffile.imwrite(path, pixels, imagej=True, resolution=(1 / 10, 1 / 20), metadata=unit)
    else:
        image = sitk.GetImageFromArray(pixels)
        image.SetSpacing(SPACING[::-1])
        image.SetOrigin((1.0, 2.0, 3.0))
        image.SetDirection((0, 1, 0, 0, 0, 1, 1, 0, 0))
        sitk.WriteImage(image, str(path))
    return path


def result_of(shape, dtype):
    rng = np.random.default_rng(0)
    return rng.random(shape, dtype) if dtype is np.float32 else rng.integers(0, np.iinfo(dtype).max, shape, dtype)


def same_contents(a, b):
    """Files of the same names and bytes; the name of the result aside, which OME-Zarr states."""
    files = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    return files[0] == files[1] and all((a / f).read_bytes() == (b / f).read_bytes() for f in files[0])


@pytest.mark.parametrize(("form", "axis"), [(f, a) for f in FORMS for a in "zyx" if a == "z" or f != ".folder"])
def test_as_the_whole_at_once_is_written(tmp_path, form, axis):
    path, stated = make_stack(tmp_path, form), {"section_axis": axis}
    if form == ".folder":
        stated["spacing"] = SPACING
    stack, volume = open_sections(path, section_axis=axis), read(path, **stated)
    for dtype in (np.float32, np.uint16):  # the second in place of the first, but in a folder
        stem = f"p{np.dtype(dtype).name}" if form == ".folder" else "p"
        result = result_of(volume.space.shape, dtype)
        written = write_sections(tmp_path / "sections", stem, iter(result), stack, dtype)
        at_once = write_result(tmp_path / "once", stem, result, volume)
        assert written.name == at_once.name
        again, expected = read(written, **stated), read(at_once, **stated)
        assert again.pixels.dtype == expected.pixels.dtype == dtype
        assert np.array_equal(again.pixels, result)
        assert again.space == expected.space
        if form.endswith(".zarr"):
            assert same_contents(written, at_once)
    left = {p.name for p in (tmp_path / "sections").iterdir()}
    assert left == ({"pfloat32", "puint16"} if form == ".folder" else {written.name})


def test_a_file_of_the_other_type_is_neither_removed_nor_left_beside(tmp_path, make_folder):
    """One section would have two files, and which of them counts nobody knows."""
    stack = open_sections(make_folder([np.zeros((4, 5), np.uint8)] * 2))
    folder = write_sections(tmp_path, "p", lambda z: np.full((4, 5), z, np.float32), stack, np.float32)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=r"^write_result\(\): .*s1.tif would be another s1.png; move it away"):
        write_sections(tmp_path, "p", lambda z: np.full((4, 5), z), stack, np.uint8)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 90, 71)])
@pytest.mark.parametrize("axis", ["z", "y"])
def test_ome_zarr_comes_back_through_tensorstore(tmp_path, version, shape, axis):
    path = make_stack(tmp_path, ".zarr", shape, version)
    stack = open_sections(path, section_axis=axis)
    result = result_of((len(stack), *stack[0].shape), np.float32)
    written = write_sections(tmp_path / "out", "p", result.__getitem__, stack, np.float32)
    driver = "zarr3" if version == "0.5" else "zarr"
    level = np.moveaxis(result, 0, "zy".index(axis)).reshape(shape if shape[0] > 1 else shape[1:])
    for name in "012":
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(written / name)}}
        stored = np.asarray(tensorstore.open(spec, read=True, open=True).result())
        np.testing.assert_allclose(stored, level, rtol=1e-6)
        even = np.pad(level, [(0, 0)] * (level.ndim - 2) + [(0, n % 2) for n in level.shape[-2:]], mode="edge")
        level = np.mean([even[..., y::2, x::2] for y in (0, 1) for x in (0, 1)], axis=0)
    assert (zarr.open_group(written, mode="r").metadata.zarr_format == 3) == (version == "0.5")


def test_geometry_through_nibabel_and_pynrrd(tmp_path):
    for form in (".nii.gz", ".nrrd"):
        path = make_stack(tmp_path, form)
        stack = open_sections(path)
        written = write_sections(tmp_path / "out", "p", result_of(SHAPE, np.float32), stack, np.float32)
        if form == ".nrrd":
            before, after = nrrd.read_header(str(path)), nrrd.read_header(str(written))
            assert np.array_equal(before["space directions"], after["space directions"])
            assert np.array_equal(before["space origin"], after["space origin"])
        else:
            np.testing.assert_array_equal(nibabel.load(path).affine, nibabel.load(written).affine)


@pytest.mark.parametrize("dtype", TYPES)
def test_sections_of_a_folder_keep_their_sizes(tmp_path, make_folder, dtype):
    sizes = [(4, 3), (7, 8), (5, 5)]
    stack = open_sections(make_folder([np.zeros(size, np.uint8) for size in sizes]))
    results = [result_of(size, dtype) for size in sizes]
    folder = write_sections(tmp_path / "out", "p", (r for r in results), stack, dtype)
    ending = ".png" if dtype in (np.uint8, np.uint16) else ".tif"
    assert [p.name for p in sorted(folder.iterdir())] == [f"s{i}{ending}" for i in (1, 2, 3)]
    for i, result in enumerate(results, start=1):
        back = iio.imread(folder / f"s{i}{ending}")
        assert back.dtype == dtype
        assert np.array_equal(back, result)


@pytest.mark.parametrize("form", [".tif", ".ome.tif", ".zarr", ".nrrd", ".folder"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint32])
def test_without_spacing(tmp_path, form, dtype):
    path = tmp_path / f"stack{form}"
    if form == ".nrrd":
        nrrd.write(str(path), np.zeros(SHAPE[::-1], np.uint8))
    elif form == ".zarr":
        path = make_stack(tmp_path, form)
        group = zarr.open_group(path, mode="r+")
        ome = group.attrs["ome"]
        for axis in ome["multiscales"][0]["axes"]:
            del axis["unit"]
        group.attrs["ome"] = ome
    elif form == ".folder":
        path = make_stack(tmp_path, form)
    else:
        tifffile.imwrite(path, np.zeros(SHAPE, np.uint8), photometric="minisblack", metadata={"axes": "ZYX"})
    stack = open_sections(path)
    result = result_of(SHAPE, dtype)
    written = write_sections(tmp_path / "out", "p", result, stack, dtype)
    back = open_sections(written)
    assert stack.spacing is None and back.spacing is None
    assert np.array_equal([section[:, :] for section in back], result)
    with pytest.raises(ValueError, match="no spacing"):
        read(written)


@pytest.mark.parametrize("labels", [False, True])
def test_pyramid_of_an_ome_tiff(tmp_path, labels):
    stack = open_sections(make_stack(tmp_path, ".ome.tif"))
    result = result_of(SHAPE, np.uint16 if labels else np.float32)
    written = write_sections(tmp_path / "out", "p", iter(result), stack, result.dtype)
    with tifffile.TiffFile(written) as tif:
        (series,) = tif.series
        assert [level.shape for level in series.levels] == [(5, 90, 71), (5, 45, 36), (5, 23, 18)]
        assert np.array_equal(series.asarray(), result)
        coarse = series.levels[1].asarray()
    if labels:
        assert np.array_equal(coarse, result[:, ::2, ::2])
    else:
        np.testing.assert_allclose(
            coarse[:, :, :35], result[:, :, :70].reshape(5, 45, 2, 35, 2).mean(axis=(2, 4)), 1e-5
        )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"p.ome.tif"}


def test_large_tiffs_are_bigtiff(tmp_path, monkeypatch):
    """Compressed or not, a file of more than 4 GB needs offsets of 64 bits."""
    monkeypatch.setattr("limner.io.tiff.IMAGEJ_LARGEST_BYTES", 1000)
    for form in (".tif", ".ome.tif"):
        written = write_sections(
            tmp_path / "out", "p", np.zeros(SHAPE), open_sections(make_stack(tmp_path, form)), np.float32
        )
        with tifffile.TiffFile(written) as tif:
            assert tif.is_bigtiff
        assert read(written).space.spacing == pytest.approx(SPACING)


@pytest.mark.parametrize("form", [".tif", ".ome.tif", ".zarr", ".folder"])
def test_one_section_is_in_memory_at_a_time(tmp_path, form, monkeypatch):
    """The next section is asked for when the one before is done with, a chunk's depth aside."""
    monkeypatch.setattr("limner.io.ome_zarr.CHUNK_PIXELS", 1)
    stack = open_sections(make_stack(tmp_path, form, (6, 90, 71)))
    alive, most = [], []

    class Section(np.ndarray):
        def __del__(self):
            if self.base is None and self.shape == SHAPE[1:]:
                alive.pop()

    def make(z):
        alive.append(z)
        most.append(len(alive))
        section = np.ndarray.__new__(Section, SHAPE[1:], np.float32)
        section[...] = z
        return section

    written = write_sections(tmp_path / "out", "p", make, stack, np.float32)
    assert len(most) == 6
    assert max(most) <= 3
    assert [int(s[:, :].max()) for s in open_sections(written)] == list(range(6))


@pytest.mark.parametrize("form", FORMS)
def test_after_an_error_an_earlier_result_stays_and_nothing_else(tmp_path, form):
    stack = open_sections(make_stack(tmp_path, form))
    written = write_sections(tmp_path / "out", "p", np.full(SHAPE, 7), stack, np.uint16)

    def failing():
        yield np.zeros(SHAPE[1:], int)
        raise OSError("disk full")

    for sections, dtype, kind, message in [
        (failing(), np.uint16, OSError, "disk full"),
        (np.zeros((4, *SHAPE[1:])), np.uint16, ValueError, "holds float64"),
        (np.zeros((4, *SHAPE[1:]), int), np.uint16, ValueError, "4 sections are given, the stack has 5"),
        (np.zeros((6, *SHAPE[1:])), np.float32, ValueError, "more sections are given than the stack's 5"),
        (np.zeros((5, 90, 70)), np.float32, ValueError, r"section s?0.* has shape \(90, 70\), in the stack \(90, 71\)"),
        (np.full(SHAPE, 65536), np.uint16, ValueError, "from 65536 to 65536; give integers from 0 to 65535"),
        (np.full(SHAPE, -1), np.uint16, ValueError, "from -1 to -1"),
        (np.zeros(SHAPE), np.float64, ValueError, "dtype is float64; give float32, uint8"),
    ]:
        with pytest.raises(kind, match=message):
            write_sections(tmp_path / "out", "p", sections, stack, dtype)
        assert [p.name for p in (tmp_path / "out").iterdir()] == [written.name]
        assert all((section[:, :] == 7).all() for section in open_sections(written))
    write_sections(tmp_path / "out", "p", np.full(SHAPE, 8), stack, np.uint16)
    assert all((section[:, :] == 8).all() for section in open_sections(written))
    (earlier,) = (p for p in (tmp_path / "out").iterdir())
    assert earlier.name == written.name


def test_the_stack_itself_is_never_replaced(tmp_path):
    for form in (".tif", ".zarr", ".nii.gz"):
        stack = open_sections(make_stack(tmp_path, form))
        with pytest.raises(ValueError, match="is the stack itself"):
            write_sections(tmp_path, "stack", np.zeros(SHAPE), stack, np.float32)


@pytest.mark.parametrize("form", [".tif", ".zarr"])
def test_write_result_makes_sections_when_they_are_written(tmp_path, form):
    stack = read(make_stack(tmp_path, form))
    whole = result_of(SHAPE, np.float32)
    asked = []

    def make(z):
        asked.append(z)
        return whole[z]

    written = write_result(tmp_path / "out", "p", MadeSections(SHAPE, make), stack)
    assert asked == list(range(5))
    assert np.array_equal(read(written).pixels, whole)


def test_label_type():
    largest = [0, 255, 256, 65535, 65536, 2**32 - 1]
    assert [label_type(n).itemsize for n in largest] == [1, 1, 2, 2, 4, 4]
    with pytest.raises(ValueError, match="largest label is 4294967296; files hold up to 4294967295"):
        label_type(2**32)


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("form", FORMS)
def test_images_come_back_in_their_form_and_type(tmp_path, form, dtype, colour):
    path = make_stack(tmp_path, form)
    stack = open_sections(path, spacing=SPACING)
    stack = replace(stack, sections=tuple(replace(section, dtype=np.dtype(dtype)) for section in stack))
    pixels = (np.random.default_rng(0).random((*SHAPE, *(3,) * colour)) * 250).astype(dtype)
    written = write_images(tmp_path / "out", "images", iter(pixels), stack, colour)
    back = read(written, spacing=SPACING)
    assert back.pixels.dtype == dtype
    np.testing.assert_array_equal(back.pixels, pixels)
    assert open_sections(written).spacing == (None if form == ".folder" and dtype is np.uint8 else stack.spacing)


def test_images_along_another_axis(tmp_path):
    path = make_stack(tmp_path, ".zarr")
    stack = open_sections(path, section_axis="y")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 5, 71, 3), np.uint8)
    written = write_images(tmp_path / "out", "images", iter(pixels), stack, True)
    np.testing.assert_array_equal(read(written, section_axis="y").pixels, pixels)


def test_tiff_sections_stay_tiff(tmp_path):
    (tmp_path / "stack").mkdir()
    for i in range(3):
        tifffile.imwrite(tmp_path / "stack" / f"s{i}.tif", np.zeros((4, 5), np.uint8))
    stack = open_sections(tmp_path / "stack", spacing=SPACING)
    written = write_images(tmp_path / "out", "images", iter(np.ones((3, 4, 5), np.uint8)), stack, False)
    assert sorted(p.name for p in written.iterdir()) == ["s0.tif", "s1.tif", "s2.tif"]
    np.testing.assert_allclose(open_sections(written).spacing, SPACING)


def test_images_of_another_type_are_refused(tmp_path):
    stack = open_sections(make_stack(tmp_path, ".tif"))
    with pytest.raises(ValueError, match="is float64 of shape"):
        write_images(tmp_path / "out", "images", iter(np.zeros(SHAPE)), stack, False)
    assert not list((tmp_path / "out").iterdir())
