"""Folders of sections against imageio (Pillow) and imagecodecs."""

import imagecodecs
import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from PIL import Image

from limner.io import read, write_result

SPACING = (0.05, 0.02, 0.01)


def grey(value=0, size=(6, 8), dtype=np.uint8):
    return np.full(size, value, dtype)


def test_natural_order_and_other_files_ignored(make_folder):
    folder = make_folder([grey(i) for i in range(1, 13)])
    for other in (".hidden.png", "Thumbs.db", "notes.txt", "table.csv", "a.json"):
        (folder / other).write_text("no image")
    (folder / "sub.png").mkdir()
    stack = read(folder, spacing=SPACING)
    assert stack.pixels[:, 0, 0].tolist() == list(range(1, 13))
    assert stack.section_names[:2] == ("s1.png", "s2.png")
    assert stack.space.spacing == SPACING


@pytest.mark.parametrize("ending", [".png", ".PNG", ".tif", ".TIFF", ".jpg", ".JPEG"])
@pytest.mark.parametrize("rgb", [False, True])
def test_formats(make_folder, ending, rgb):
    images = [grey(i, (16, 16, 3) if rgb else (16, 16)) for i in (10, 200)]
    stack = read(make_folder(images, ending=ending), spacing=SPACING)
    assert np.array_equal(stack.pixels, images)
    assert stack.source.extension == ending.lower()


def test_sixteen_bit_grey(make_folder):
    images = [grey(60000, dtype=np.uint16)] * 2
    assert np.array_equal(read(make_folder(images), spacing=SPACING).pixels, images)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_colours_keep_their_depth_and_lose_alpha(tmp_path, channels, dtype):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 6, channels)).astype(dtype)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(image))
    pixels = read(tmp_path, spacing=SPACING).pixels
    assert pixels.dtype == dtype
    assert np.array_equal(pixels[0], image[..., 0] if channels == 2 else image[..., :3])


def test_palette_images_become_rgb(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 210, 220])
    image.save(tmp_path / "a.png")
    assert read(tmp_path, spacing=SPACING).pixels.tolist() == [[[[10, 20, 30], [200, 210, 220]]]]


def test_palette_tiff_becomes_rgb(tmp_path):
    palette = np.zeros((3, 256), np.uint16)
    palette[:, 1] = (0x0A00, 0x1400, 0xFF00)
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 1]], np.uint8), photometric="palette", colormap=palette)
    assert read(tmp_path, spacing=SPACING).pixels.tolist() == [[[[0, 0, 0], [10, 20, 255]]]]


def test_sections_of_different_sizes_are_centred_on_their_own_border_and_cropped_back(tmp_path, make_folder):
    small, large = grey(255, (4, 3)), grey(7, (7, 8))
    small[1:3, 1] = 9
    stack = read(make_folder([small, large]), spacing=SPACING)
    expected = grey(255, (7, 8))  # white paper stays white
    expected[1:5, 2:5] = small  # offsets (7 - 4) // 2, (8 - 3) // 2
    assert np.array_equal(stack.pixels[0], expected)
    assert stack.source.sizes == ((4, 3), (7, 8))

    written = write_result(tmp_path / "out", "labels", stack.pixels.astype(int), stack)
    assert np.array_equal(iio.imread(written / "s1.png"), small)
    assert np.array_equal(iio.imread(written / "s2.png"), large)


def test_rgb_padding_takes_the_median_of_each_channel(make_folder):
    small = np.zeros((3, 3, 3), np.uint8) + np.array([250, 240, 230], np.uint8)
    pixels = read(make_folder([small, np.zeros((5, 5, 3), np.uint8)]), spacing=SPACING).pixels
    assert pixels[0, 0, 0].tolist() == [250, 240, 230]


def test_spacing_of_tiff_sections(tmp_path):
    for i in range(2):
        metadata = {"unit": "um", "spacing": 50.0}
        tifffile.imwrite(tmp_path / f"{i}.tif", grey(), imagej=True, resolution=(1 / 10, 1 / 20), metadata=metadata)
    assert read(tmp_path).space.spacing == pytest.approx((0.05, 0.02, 0.01), rel=1e-6)
    tifffile.imwrite(tmp_path / "3.tif", grey(), imagej=True, resolution=(1 / 11, 1 / 20), metadata=metadata)
    with pytest.raises(ValueError, match=r"3.tif has spacing .* but 0.tif"):
        read(tmp_path)


def test_folder_without_spacing(make_folder):
    with pytest.raises(ValueError, match=r"stack has no spacing .* give spacing=\(z, y, x\) in mm .*--spacing z,y,x"):
        read(make_folder([grey()]))


@pytest.mark.parametrize(
    "other", [grey(size=(6, 8, 3)), grey(dtype=np.uint16)], ids=["RGB among grey", "16 bit among 8"]
)
def test_mixed_sections_are_named(make_folder, other):
    with pytest.raises(ValueError, match=r"s3.png is .* but s1.png is grey uint8"):
        read(make_folder([grey(), grey(), other]), spacing=SPACING)


def test_no_images_and_twice_the_same_stem(tmp_path, make_folder):
    with pytest.raises(ValueError, match=r"holds no section images"):
        read(tmp_path, spacing=SPACING)
    folder = make_folder([grey()])
    iio.imwrite(folder / "s1.jpg", grey())
    with pytest.raises(ValueError, match=r"both s1.jpg and s1.png"):
        read(folder, spacing=SPACING)


def test_stack_among_sections(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5, 6), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match=r"a.tif holds 4 pages"):
        read(tmp_path, spacing=SPACING)


def test_not_finite_pixels_name_the_section(tmp_path):
    for i, value in enumerate([0.0, np.nan]):
        tifffile.imwrite(tmp_path / f"s{i}.tif", np.full((4, 5), value, np.float32))
    with pytest.raises(ValueError, match=r"section s1.tif of .* NaN or infinity"):
        read(tmp_path, spacing=SPACING)


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("rgb", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95])
def test_truncated_section(make_folder, make_truncated, capfd, noise, ending, rgb, fraction):
    image = np.stack([noise[0]] * 3, axis=-1) if rgb else noise[0]
    folder = make_folder([image.astype(np.uint8)] * 3, ending=ending)
    make_truncated(folder / f"s2{ending}", fraction)
    with pytest.raises(ValueError, match=rf"^read\(\): .*s2{ending} cannot be read") as raised:
        read(folder, spacing=SPACING)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_truncated_sixteen_bit_colour_png(tmp_path, make_truncated, noise):
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.stack([noise[0]] * 3, axis=-1)))
    make_truncated(tmp_path / "a.png", 0.5)
    with pytest.raises(ValueError, match=r"a.png cannot be read"):
        read(tmp_path, spacing=SPACING)


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg"])
def test_text_under_the_name_of_a_section(make_folder, ending):
    folder = make_folder([grey()])
    (folder / f"text{ending}").write_text("no image")
    with pytest.raises(ValueError, match=rf"text{ending} cannot be read"):
        read(folder, spacing=SPACING)


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(grey(size=(4, 5, 4))).convert("RGB").convert("CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg .*CMYK"):
        read(tmp_path, spacing=SPACING)
