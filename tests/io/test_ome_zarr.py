"""OME-Zarr: pixels against tensorstore, metadata against the specification's models (ome-zarr-models)."""

import json

import numpy as np
import ome_zarr_models
import pytest
import tensorstore
import zarr

from limner.io import LabelStream, open_slide, read, read_label_volume, read_labels, write_ome_zarr, write_result
from limner.io.ome_zarr import _mode_2x2, open_multiscales
from limner.space import Space
from limner.volume import Label, LabelMap, Volume

RNG = np.random.default_rng(0)
SPACING = (0.05, 0.0005, 0.001)
TABLE = {3: Label("CA1", (1, 2, 3)), 70000: Label("CA3", (4, 5, 6))}
VERSIONS = ["0.5", "0.4"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Pyramids and several chunks with small arrays."""
    for name, n in (("CHUNK", 32), ("SMALLEST_LEVEL", 40), ("CHUNK_PIXELS", 2048)):
        monkeypatch.setattr(f"limner.io.ome_zarr.{name}", n)


def volume(shape=(5, 90, 71), colour=False, spacing=SPACING):
    pixels = RNG.integers(0, 2**16, (*shape, 3) if colour else shape).astype(np.uint16)
    return Volume(pixels, Space(shape, spacing, (1.0, 2.0, 3.0)))


def label_map(shape=(5, 90, 71)):
    return LabelMap(RNG.choice([0, 3, 70000], shape).astype(np.int32), Space(shape, SPACING), TABLE)


def by_tensorstore(path, version):
    driver = "zarr3" if version == "0.5" else "zarr"
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, read=True, open=True).result())


def metadata(path, version):
    """Validated by the specification's models, then as plain JSON."""
    model = ome_zarr_models.open_ome_zarr(zarr.open_group(path, mode="r"))
    assert f"v{version.replace('.', '')}" in type(model).__module__
    if version == "0.4":
        return type(model).__name__, json.loads((path / ".zattrs").read_text())
    return type(model).__name__, json.loads((path / "zarr.json").read_text())["attributes"]["ome"]


def quarters_of(pixels):
    pad = [(0, 0)] * (pixels.ndim - 2) + [(0, n % 2) for n in pixels.shape[-2:]]
    even = np.pad(pixels, pad, mode="edge")
    return np.stack([even[..., y::2, x::2] for y in (0, 1) for x in (0, 1)])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("shape", [(5, 90, 71), (1, 90, 71)])
def test_images(tmp_path, version, colour, shape):
    written = volume(shape, colour)
    path = tmp_path / "a.zarr"
    write_ome_zarr(path, written, version)
    stored = np.moveaxis(written.pixels, -1, 0) if colour else written.pixels
    stored = stored.reshape(
        [n for n, a in zip(stored.shape, "czyx"[-stored.ndim :], strict=True) if (a, n) != ("z", 1)]
    )
    for level in range(3):
        np.testing.assert_array_equal(by_tensorstore(path / str(level), version), stored)
        stored = np.rint(quarters_of(stored).mean(axis=0)).astype(np.uint16)
    kind, found = metadata(path, version)
    assert kind == "Image"
    (multiscales,) = found["multiscales"]
    assert [a["name"] for a in multiscales["axes"]] == list(("c" * colour) + ("z" * (shape[0] > 1)) + "yx")
    scale, shift = (
        t[key]
        for t, key in zip(
            multiscales["datasets"][1]["coordinateTransformations"], ("scale", "translation"), strict=True
        )
    )
    assert scale[-2:] == [1.0, 2.0]  # um
    assert shift[-2:] == [2000.25, 3000.5]  # the middle of two pixels
    back = read(path)
    assert np.array_equal(back.pixels, written.pixels)
    assert back.space.spacing == pytest.approx(SPACING if shape[0] > 1 else (0.0005, 0.0005, 0.001))
    assert back.space.origin[1:] == (2.0, 3.0)


@pytest.mark.parametrize("version", VERSIONS)
def test_labels_within_an_image(tmp_path, version):
    image, labels = volume(), label_map()
    write_ome_zarr(tmp_path / "a.zarr", image, version)
    write_ome_zarr(tmp_path / "a.zarr" / "labels" / "regions", labels, version)
    path = tmp_path / "a.zarr" / "labels" / "regions"
    kind, found = metadata(path, version)
    assert kind == "ImageLabel"
    assert found["image-label"]["source"] == {"image": "../../"}
    assert found["image-label"]["colors"][0] == {"label-value": 3, "rgba": [1, 2, 3, 255]}
    kind, found = metadata(tmp_path / "a.zarr" / "labels", version)
    assert (kind, found["labels"]) == ("Labels", ["regions"])
    for level in range(3):
        assert set(np.unique(by_tensorstore(path / str(level), version))) == {0, 3, 70000}
    # the image's only labels are found through it as well
    stack = read(tmp_path / "a.zarr")
    for where in (path, tmp_path / "a.zarr"):
        found = read_labels(where, stack).label_map
        assert np.array_equal(found.labels, labels.labels)
        assert found.table[3] == TABLE[3] and found.table[70000] == TABLE[70000]
    assert read_label_volume(path).space.spacing == pytest.approx(SPACING)
    write_ome_zarr(tmp_path / "a.zarr" / "labels" / "more", labels, version)
    with pytest.raises(ValueError, match=r"several labels; give one of .*more, .*regions"):
        read_labels(tmp_path / "a.zarr", stack)
    with pytest.raises(ValueError, match="exists; give another name"):
        write_ome_zarr(path, labels, version)


def test_mode_by_brute_force():
    block = RNG.integers(0, 4, (3, 41, 30))
    quarters = quarters_of(block)
    counts = (quarters[:, None] == quarters[None]).sum(axis=1)
    chosen = np.take_along_axis(quarters, counts.argmax(axis=0)[None], axis=0)[0]
    np.testing.assert_array_equal(_mode_2x2(block), chosen)


@pytest.mark.parametrize("version", VERSIONS)
def test_label_stream(tmp_path, version):
    labels = RNG.integers(0, 3, (150, 101)) * 100000
    path = tmp_path / "a.zarr"
    with LabelStream(path, labels.shape, (0.5, 0.25), version, TABLE) as stream:
        for y in range(0, 150, 40):
            for x in range(0, 101, 60):
                stream[y : y + 40, x : x + 60] = labels[y : y + 40, x : x + 60]
        assert np.array_equal(stream[10:70, 5:99], labels[10:70, 5:99])
        assert not path.exists()
    level = labels
    for name in "012":
        stored = by_tensorstore(path / name, version)
        assert stored.dtype == np.int32
        np.testing.assert_array_equal(stored, level)
        level = _mode_2x2(level)
    kind, found = metadata(path, version)
    assert kind == "ImageLabel"
    assert found["multiscales"][0]["axes"][0]["unit"] == "micrometer"
    assert read_label_volume(path).space.spacing[1:] == (0.0005, 0.00025)
    with pytest.raises(ValueError, match="exists"):
        LabelStream(path, labels.shape)


def test_a_stopped_label_stream_goes_on(tmp_path):
    path = tmp_path / "a.zarr"
    with pytest.raises(KeyboardInterrupt), LabelStream(path, (100, 80)) as stream:
        stream[:50, :] = np.ones((50, 80), int)
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(ValueError, match="begun with another shape"):
        LabelStream(path, (100, 81))
    with LabelStream(path, (100, 80)) as stream:
        assert stream[:, :].sum() == 50 * 80
        stream[50:, :] = np.full((50, 80), 2)
        with pytest.raises(ValueError, match="from -1 to -1"):
            stream[:1, :1] = np.full((1, 1), -1)
    assert np.array_equal(by_tensorstore(path / "0", "0.5"), np.repeat([1, 2], 50)[:, None] * np.ones((1, 80)))
    assert read(path, spacing=(1, 1, 1)).space.spacing == (1, 1, 1)
    with pytest.raises(ValueError, match="no spacing"):
        read(path)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axis", ["z", "y"])
def test_results_come_back_in_the_same_form(tmp_path, version, axis):
    write_ome_zarr(tmp_path / "a.zarr", volume(), version)
    stack = read(tmp_path / "a.zarr", section_axis=axis)
    result = np.zeros(stack.space.shape, np.int64)
    result[1, 2, 3] = 3
    for _ in range(2):  # the second replaces the first
        written = write_result(tmp_path / "out", "labels", result, stack, TABLE)
        result[2, 2, 2] = 70000
    assert written.name == "labels.zarr"
    assert [p.name for p in written.parent.iterdir()] == ["labels.zarr"]
    kind, _ = metadata(written, version)
    assert kind == "ImageLabel"
    back = read_labels(written, stack)
    assert np.array_equal(back.label_map.labels, result)
    assert back.label_map.table[3] == TABLE[3]
    assert np.array_equal(np.moveaxis(by_tensorstore(written / "0", version), "zyx".index(axis), 0), result)
    numbers = write_result(tmp_path / "out", "p", result / 2, stack)
    assert metadata(numbers, version)[0] == "Image"
    assert np.array_equal(read(numbers, section_axis=axis).pixels, result / 2)
    with pytest.raises(ValueError, match="is the stack itself"):
        write_result(tmp_path, "a", result, stack)


def foreign(path, axes, shape, unit="millimeter", transformations=(), version="0.4"):
    """An image as another program may write it: small, one level, its scale split over dataset and whole."""
    pixels = RNG.integers(0, 255, shape).astype(np.uint8)
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("s0", data=pixels, chunk_key_encoding={"name": "v2", "separator": "/"})
    kinds = {"t": "time", "c": "channel"}
    listed = [{"name": a, "type": kinds.get(a, "space")} | ({} if a in kinds else {"unit": unit}) for a in axes]
    scale = [{"type": "scale", "scale": [0.5 if a in "zyx" else 1.0 for a in axes]}]
    dataset = {"path": "s0", "coordinateTransformations": scale}
    whole = {"coordinateTransformations": list(transformations)} if transformations else {}
    group.attrs["multiscales"] = [{"version": version, "axes": listed, "datasets": [dataset], **whole}]
    return pixels


def test_axes_and_units_of_others(tmp_path):
    pixels = foreign(tmp_path / "a.zarr", "tczyx", (1, 1, 3, 4, 5))
    back = read(tmp_path / "a.zarr")
    assert np.array_equal(back.pixels, pixels[0, 0])
    assert back.space.spacing == (0.5, 0.5, 0.5)
    whole = [{"type": "scale", "scale": [3.0, 2.0, 1.0]}, {"type": "translation", "translation": [5.0, 6.0, 7.0]}]
    foreign(tmp_path / "b.zarr", "zyx", (3, 4, 5), "micrometer", whole)
    back = read(tmp_path / "b.zarr")
    assert back.space.spacing == pytest.approx((0.0015, 0.001, 0.0005))
    assert back.space.origin == pytest.approx((0.005, 0.006, 0.007))
    foreign(tmp_path / "plane" / "0", "cyx", (3, 4, 5), "micrometer")
    zarr.open_group(tmp_path / "plane", mode="a", zarr_format=2)  # bioformats2raw: image 0 within
    slide = open_slide(tmp_path / "plane")
    assert (slide.shape, slide.um_per_px) == ((4, 5, 3), (0.5, 0.5))
    foreign(tmp_path / "c.zarr", "zyx", (3, 4, 5), "pixel")
    with pytest.raises(ValueError, match="no spacing"):
        read(tmp_path / "c.zarr")


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [("tyx", (2, 4, 5), "axes tyx of lengths"), ("cyx", (4, 4, 5), "grey .1. or RGB"), ("zx", (4, 5), "needs y and x")],
)
def test_what_is_no_stack_is_refused(tmp_path, axes, shape, message):
    foreign(tmp_path / "a.zarr", axes, shape)
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path / "a.zarr")
    assert "a.zarr" in str(raised.value)


@pytest.mark.parametrize("version", VERSIONS)
def test_damaged_or_older_zarr_is_named(tmp_path, version):
    write_ome_zarr(tmp_path / "a.zarr", volume(), version)
    chunk = tmp_path / "a.zarr" / "0" / ("c" if version == "0.5" else "") / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:50])
    (tmp_path / "b.zarr").mkdir()
    zarr.open_group(tmp_path / "c.zarr", mode="w")
    zarr.open_group(tmp_path / "d.zarr", mode="w").attrs["multiscales"] = [{"version": "0.3", "axes": ["y", "x"]}]
    cases = [
        ("a", "cannot be read"),
        ("b", "cannot be read"),
        ("c", "no OME-Zarr"),
        ("d", "0.3; convert"),
    ]
    for name, message in cases:
        with pytest.raises(ValueError, match=rf"{name}.zarr.*{message}") as raised:
            read(tmp_path / f"{name}.zarr")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_probabilities_are_a_plain_image_reduced_by_the_mean(tmp_path, version):
    with LabelStream(tmp_path / "p.zarr", (1500, 20), (0.5, 0.25), version, values="probabilities") as stream:
        stream[0:2, 0:2] = np.array([[0, 255], [255, 255]])
        with pytest.raises(ValueError, match="give 0 to 255"):
            stream[0:1, 0:1] = np.array([[256]])
    opened = open_multiscales(tmp_path / "p.zarr")
    assert {array.dtype for array in opened.arrays} == {np.dtype(np.uint8)}
    assert opened.arrays[1][0, 0] == 191
    assert not opened.image_label
    assert opened.spacings[0][1:] == (0.0005, 0.00025)
