import base64
import itertools
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from limner.report import anatomical_prior, sections
from limner.report.anatomical_prior import (
    PriorReport,
    ScanView,
    StructureRow,
    deviations,
    slice_of,
    slices_a_plane,
    upright,
)
from limner.space import Space
from limner.volume import Label

AXIAL, CORONAL, SAGITTAL = 0, 1, 2


def page_data(path: Path) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="report">(.*?)</script>', path.read_text(), re.S)[1]
    )


def pictures(path: Path) -> list[dict]:
    found = re.findall(r'<script type="application/json" id="picture-\d+">(.*?)</script>', path.read_text(), re.S)
    return [json.loads(text) for text in found]


def middle(picture: dict, axis: int) -> dict[str, np.ndarray]:
    plane = picture["planes"][axis]
    packed = plane["slices"][len(plane["slices"]) // 2]
    raw = {name: zlib.decompress(base64.b64decode(packed[name])) for name in ("labels", "uncertainty")}
    return {
        "image": iio.imread(base64.b64decode(packed["image"])),
        "labels": np.frombuffer(raw["labels"], "<u2").reshape(plane["size"]),
        "uncertainty": np.frombuffer(raw["uncertainty"], np.uint8).reshape(plane["size"]),
    }


def a_scan(shape=(12, 14, 10), spacing=(2.0, 1.0, 3.0), **more) -> ScanView:
    """A scan of 0 with a block of label 7 in its middle."""
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(n // 4, n - n // 4) for n in shape)] = 7
    scan = ScanView(
        "a",
        np.zeros(shape, np.float32),
        labels,
        np.zeros(shape, np.float32),
        Space(shape, spacing, origin=(4.0, -5.0, 6.0)),
        0.9,
        (StructureRow(7, "seven", 10.0, 9.0, 11.0, None),),
        (),
    )
    return replace(scan, **more)


def stored_as(scan: ScanView, axes: tuple[int, ...], flips: tuple[bool, ...]) -> ScanView:
    """The same scan in the same place of the room, its voxels stored in another order."""

    def stored(voxels):
        return np.flip(voxels.transpose(axes), [i for i in range(3) if flips[i]])

    old, direction = scan.space, np.zeros((3, 3))
    corner = [0, 0, 0]
    for i, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        direction[axis, i] = -1 if flip else 1
        corner[axis] = old.shape[axis] - 1 if flip else 0
    space = Space(
        tuple(old.shape[axis] for axis in axes),
        tuple(old.spacing[axis] for axis in axes),
        tuple(old.to_physical(corner)),
        tuple(map(tuple, direction)),
    )
    voxels = {name: stored(getattr(scan, name)) for name in ("image", "labels", "uncertainty")}
    return replace(scan, space=space, **voxels)


EVERY_ORDER = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))


@pytest.mark.parametrize(("axes", "flips"), EVERY_ORDER)
def test_scans_stand_upright_whatever_way_their_voxels_run(axes, flips):
    draw = np.random.default_rng(0)
    scan = a_scan(image=draw.random((12, 14, 10)), uncertainty=draw.random((12, 14, 10), np.float32))
    found = upright(stored_as(scan, axes, flips))
    for name in ("image", "labels", "uncertainty"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scan, name))
    assert found.space == scan.space


def test_an_oblique_scan_takes_the_nearest_axes():
    cos, sin = np.cos(0.4), np.sin(0.4)
    tilted = ((-cos, sin, 0.0), (sin, cos, 0.0), (0.0, 0.0, 1.0))  # z runs down, tilted by 23 degrees
    scan = a_scan(image=np.arange(12 * 14 * 10.0).reshape(12, 14, 10))
    old = replace(scan.space, direction=tilted)
    found = upright(replace(scan, space=old))
    np.testing.assert_array_equal(found.image, scan.image[::-1])
    np.testing.assert_allclose(found.space.to_physical((1, 2, 3)), old.to_physical((10, 2, 3)))


@pytest.mark.parametrize(("axes", "flips"), [((0, 1, 2), (False,) * 3), ((2, 0, 1), (True, False, True))])
def test_planes_show_anterior_and_superior_up_and_the_right_on_the_left(tmp_path, axes, flips):
    image = np.zeros((12, 14, 10), np.float32)
    image[8:, :4, :4] = 100  # superior, anterior, right
    image[8:, :4, 7:] = 50  # superior, anterior, left
    scan = stored_as(a_scan((12, 14, 10), (1.0, 1.0, 1.0), image=image), axes, flips)
    whole = replace(scan, labels=np.ones_like(scan.labels))  # nothing is cropped
    PriorReport([whole], {}, {}, {}, ()).write(tmp_path / "r.html")
    planes = pictures(tmp_path / "r.html")[0]["planes"]

    def mean_of_corners(axis, place):  # rows from the top, columns from the left
        shown = iio.imread(base64.b64decode(planes[axis]["slices"][place]["image"])).astype(float)
        return [
            shown[rows, columns].mean()
            for rows in (slice(0, 3), slice(-3, None))
            for columns in (slice(0, 3), slice(-3, None))
        ]

    for axis, place, bright in ((AXIAL, -1, (0, 1)), (CORONAL, 0, (0, 1)), (SAGITTAL, 0, (0,))):
        corners = mean_of_corners(axis, place)
        assert [n for n, grey in enumerate(corners) if grey > 50] == list(bright)
        assert corners[0] > 1.5 * corners[1]  # the right is the brighter one, on the left of the picture


def test_slices_are_cut_where_they_say():
    voxels = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(slice_of(voxels, AXIAL, 1), voxels[1])
    np.testing.assert_array_equal(slice_of(voxels, CORONAL, 2), voxels[::-1, 2])
    np.testing.assert_array_equal(slice_of(voxels, SAGITTAL, 3), voxels[::-1, :, 3])


def test_pictures_hold_labels_and_uncertainty_of_the_labelled_part(prior_report, prior_page):
    scan, picture = prior_report.scans[2], pictures(prior_page)[2]
    planes = picture["planes"]
    assert [plane["mm"] for plane in planes] == [[28, 42], [40, 42], [40, 28]]  # 1, 2, 1 voxels around 36, 24, 36 mm
    assert planes[AXIAL]["size"] == [28, 14]  # rows of 1 mm, columns of 3 mm
    shown = middle(picture, AXIAL)
    part = scan.labels[15, 6:34, 5:19]
    names = {0: 0, 3: 1, 10: 2}
    np.testing.assert_array_equal(shown["labels"], np.vectorize(names.get)(part))
    np.testing.assert_array_equal(shown["uncertainty"], np.where(part == 10, 90, 0))


def test_offsets_are_millimetres_from_the_middle(prior_page):
    planes = pictures(prior_page)[0]["planes"]
    assert all(plane["offsets"][len(plane["slices"]) // 2] == 0 for plane in planes)
    assert planes[AXIAL]["offsets"] == sorted(planes[AXIAL]["offsets"])
    steps = [np.diff(plane["offsets"]).min() for plane in planes]
    assert [step % spacing for step, spacing in zip(steps, (2, 1, 3), strict=True)] == [0, 0, 0]
    assert planes[AXIAL]["offsets"][0] < -12  # near the lower end of the labelled 36 mm


def test_a_structure_is_found_on_the_slices_with_most_of_it(tmp_path):
    scan = a_scan((30, 30, 30), (1.0, 1.0, 1.0))
    labels = scan.labels.copy()
    labels[19:22, 9:12, 13:16] = 9
    PriorReport([replace(scan, labels=labels)], {}, {}, {}, ()).write(tmp_path / "r.html")
    picture = pictures(tmp_path / "r.html")[0]
    for plane, best in zip(picture["planes"], picture["best"][2], strict=True):
        numbers = zlib.decompress(base64.b64decode(plane["slices"][best]["labels"]))
        assert np.count_nonzero(np.frombuffer(numbers, "<u2") == 2) == 9


def test_cropping_keeps_voxels_at_their_place():
    scan = stored_as(a_scan((24, 28, 20)), (2, 0, 1), (True, False, True))
    part = scan.cropped()
    assert (part.labels > 0).sum() == (scan.labels > 0).sum()
    for end in (0, -1):  # the first and the last labelled voxel
        here, there = np.argwhere(part.labels)[end], np.argwhere(scan.labels)[end]
        np.testing.assert_allclose(part.space.to_physical(here), scan.space.to_physical(there))
    assert part.space.shape == (12, 14, 18)  # 10, 12, 14 voxels of 3, 2, 1 mm and 4 % of 30 mm on each side
    assert part.image.base is None  # the whole scan can be forgotten
    assert part.mean_uncertainty == scan.mean_uncertainty


def test_a_scan_without_labels_is_shown_whole(tmp_path):
    empty = a_scan(labels=np.zeros((12, 14, 10), int), uncertainty=np.full((12, 14, 10), 0.25, np.float32), rows=())
    assert empty.cropped().space.shape == (12, 14, 10)
    assert empty.mean_uncertainty == 0.25
    PriorReport([empty], {}, {}, {}, ()).write(tmp_path / "r.html")
    assert pictures(tmp_path / "r.html")[0]["planes"][AXIAL]["size"] == [14, 10]


def test_eight_bit_scans_are_stretched_to_their_own_range(tmp_path):
    image = np.zeros((12, 14, 10), np.uint8)
    image[4:, 4:] = 20
    PriorReport([a_scan(image=image)], {}, {}, {}, ()).write(tmp_path / "r.html")
    assert middle(pictures(tmp_path / "r.html")[0], AXIAL)["image"].max() > 190


def test_deviations_are_those_from_the_other_scans():
    values = np.random.default_rng(0).normal(100, 5, 10)
    others = np.delete(values, 3)
    spread = 1.4826 * np.median(np.abs(others - np.median(others)))
    assert deviations(values)[3] == pytest.approx((values[3] - np.median(others)) / spread, rel=1e-4)


def test_deviations_need_others_and_a_value():
    assert np.isnan(deviations(np.arange(9.0))).all()  # of eight others no spread is told
    away = deviations(np.array([*([5.0] * 9), 5.0 + 1e-9, np.nan]))
    assert np.isnan(away[10])
    assert np.abs(away[:10]).max() < 0.01  # equal but for rounding


def test_only_the_scan_that_stands_out_is_marked(prior_report):
    cortex, thalamus = anatomical_prior._columns(prior_report, anatomical_prior._structures(prior_report))
    assert [cell["flag"] for cell in cortex["cells"]] == [""] * 10
    assert [bool(cell["flag"]) for cell in thalamus["cells"]] == [n == 4 for n in range(10)]
    assert thalamus["cells"][4]["flag"].endswith("above the other scans")
    assert thalamus["dice"] == pytest.approx(0.7)  # the last scan has none


def test_few_scans_are_not_marked(prior_report, tmp_path):
    replace(prior_report, scans=prior_report.scans[:9]).write(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "marked from 10 scans on" in html
    assert "▲" not in html


def test_a_structure_that_a_scan_lacks_leaves_a_gap(prior_report, tmp_path):
    lacking = replace(prior_report.scans[0], rows=prior_report.scans[0].rows[1:])
    report = replace(prior_report, scans=[lacking, *prior_report.scans[1:]])
    columns = anatomical_prior._columns(report, anatomical_prior._structures(report))
    assert [column["structure"].label for column in columns] == [10, 3]  # in the order of the rows
    assert columns[1]["cells"][0]["text"] == "–"
    report.write(tmp_path / "r.html")


def test_summary(prior_report):
    assert prior_report.summary.split("\n") == [
        "10 scans segmented, 1 failed.",
        "Mean Dice against the truth: 0.810.",  # nine times (.9 + .7) / 2, once .9
        "Most uncertain: 1002.nii.gz, 0.05 in the mean; look at it first.",
    ]
    scan = prior_report.scans[0]
    unscored = replace(scan, rows=tuple(replace(row, dice=float("nan")) for row in scan.rows))
    assert replace(prior_report, scans=[unscored], failed={}).summary == "1 scan segmented."
    assert replace(prior_report, scans=[]).summary == "0 scans segmented, 1 failed."


def test_uncertainty_is_that_inside_the_structures(prior_report):
    inside = 6 * 8 * 6 / (18 * 24 * 12)
    assert prior_report.scans[2].mean_uncertainty == pytest.approx(0.9 * inside, rel=1e-6)


def test_names_are_those_of_the_rows_and_colours_those_of_the_table(prior_page):
    structures = page_data(prior_page)["structures"]
    assert [s["name"] for s in structures] == ["background", "<script>alert(1)</script>", "Thalamus & co"]
    assert structures[1]["colour"] == "#c82828"
    assert structures[2]["colour"] not in ("#000000", "#c82828")


def test_structures_without_colours_get_different_ones(prior_report):
    rows = tuple(StructureRow(label, f"s{label}", 1.0, 1.0, 1.0, None) for label in range(1, 60))
    table = {row.label: Label(row.name, (0, 0, 0)) for row in rows[:30]}
    report = replace(prior_report, scans=[replace(prior_report.scans[0], rows=rows)], table=table)
    assert len({s.colour for s in anatomical_prior._structures(report)}) == 60


def test_what_users_wrote_cannot_become_markup(prior_page):
    html = prior_page.read_text()
    assert "<script>alert" not in html
    assert "</script><b>" not in html
    assert not re.search(r"<[iu]>|<no>", html)
    assert "&lt;u&gt;1006&#34;.nii" in html


def test_page_stands_alone(prior_page):
    html = prior_page.read_text()
    assert re.findall(r"(?:src|href)\s*=", html) == []
    assert re.findall(r"(?:https?:|@import|url\()[^\s\"']*", html) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in html


def test_failed_scans_are_named_with_their_reason(prior_page, prior_report, tmp_path):
    assert "it shows &lt;no&gt; brain" in prior_page.read_text()
    replace(prior_report, scans=[]).write(tmp_path / "none.html")
    html = (tmp_path / "none.html").read_text()
    assert "it shows &lt;no&gt; brain" in html
    assert '<div class="viewer">' not in html
    replace(prior_report, failed={}).write(tmp_path / "all.html")
    assert "Not segmented" not in (tmp_path / "all.html").read_text()


def test_a_page_without_truth_has_no_dice(prior_report, tmp_path):
    rows = tuple(replace(row, dice=None) for row in prior_report.scans[0].rows)
    replace(prior_report, scans=[replace(s, rows=rows) for s in prior_report.scans]).write(tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert 'id="dice"' not in html
    assert ">Mean Dice<" not in html


def test_fifteen_scans_at_1_mm_stay_below_15_mb(tmp_path):
    shape = (140, 180, 150)
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    draw = np.random.default_rng(0)
    labels = np.digitize((place**2).sum(0) + 0.1 * np.sin(20 * place).sum(0), [0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    labels = np.where(labels < 6, 6 - labels, 0)
    image = labels * 100 + draw.normal(0, 8, shape)
    uncertainty = np.abs(np.sin(30 * place).prod(0)).astype(np.float32) * (labels > 0)
    scan = a_scan(image=image, labels=labels, uncertainty=uncertainty, space=Space(shape, (1.0, 1.0, 1.0)))
    PriorReport([scan], {}, {}, {}, ()).write(tmp_path / "r.html")
    assert slices_a_plane(15) == slices_a_plane(1) == 13
    assert (tmp_path / "r.html").stat().st_size < 1e6


def test_slices_are_fewer_where_scans_are_many():
    for n_scans in range(1, 500):
        n = slices_a_plane(n_scans)
        assert n % 2 == 1
        assert n == 1 or 3 * n * n_scans <= anatomical_prior.MOST_PICTURES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros((12, 14, 9), int)}, r"labels of shape \(12, 14, 9\), the grid \(12, 14, 10\)"),
        ({"image": np.zeros((12, 14, 10, 3))}, r"image of shape \(12, 14, 10, 3\)"),
        ({"uncertainty": np.full((12, 14, 10), np.nan, np.float32)}, "not numbers"),
        ({"uncertainty": np.full((12, 14, 10), 1.5, np.float32)}, "outside 0 to 1"),
    ],
)
def test_views_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        a_scan(**change)


@pytest.mark.parametrize(
    "values", [(0, 1.0, 1.0, 1.0), (1, -1.0, 0.0, 1.0), (1, 1.0, 2.0, 1.0), (1, float("nan"), 0.0, 1.0)]
)
def test_rows_that_make_no_sense_are_refused(values):
    label, *volumes = values
    with pytest.raises(ValueError, match="StructureRow"):
        StructureRow(label, "x", *volumes, None)


def test_reports_of_nothing_or_of_two_scans_of_one_name_are_refused(prior_report):
    with pytest.raises(ValueError, match="there is no scan"):
        replace(prior_report, scans=[], failed={})
    with pytest.raises(ValueError, match=r"two scans are called 1000\.nii\.gz"):
        replace(prior_report, failed={"1000.nii.gz": "it failed"})


def test_a_write_that_fails_leaves_the_old_report(prior_report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old report")
    monkeypatch.setattr(
        anatomical_prior, "check_structures", lambda *_: sections.check_structures("f()", [None] * 70_000)
    )
    with pytest.raises(ValueError, match="69999 structures"):
        prior_report.write(path)
    assert path.read_text() == "the old report"
    assert list(tmp_path.iterdir()) == [path]
