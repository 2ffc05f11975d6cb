import numpy as np
import pytest
from scipy import ndimage

from limner.annotations import Scribbles, SectionLabels, simulate_partial, simulate_scribbles
from limner.space import Space
from limner.volume import Label, LabelMap


@pytest.fixture
def label_map():
    """Five sections, labels on the second and fourth."""
    labels = np.zeros((5, 2, 2), np.uint8)
    labels[1, 0, 0], labels[3, 1, 1] = 4, 9
    return LabelMap(labels, Space((5, 2, 2), (1, 1, 1)))


def test_sections_that_hold_a_label_are_labelled(label_map):
    labels = SectionLabels.from_label_map(label_map)
    assert labels.labelled == (1, 3)
    assert labels.unlabelled == (0, 2, 4)
    assert labels.weights.tolist() == [0, 1, 0, 1, 0]


def test_named_sections_are_labelled_whatever_they_hold(label_map):
    assert SectionLabels.from_label_map(label_map, [4, 0, 4]).labelled == (0, 4)


@pytest.mark.parametrize(("labelled", "message"), [([], "no section is labelled"), ([1, 5], "section 5"), ([-1], "-1")])
def test_wrong_sections(label_map, labelled, message):
    with pytest.raises(ValueError, match=rf"^SectionLabels\(\): .*{message}"):
        SectionLabels.from_label_map(label_map, labelled)


@pytest.fixture
def forty_objects():
    """Ids 1 to 80, odd ones missing, of 3 pixels each."""
    return np.repeat(np.arange(2, 82, 2, dtype=np.uint16), 3).reshape(12, 10)


@pytest.mark.parametrize(("fraction", "kept"), [(0.1, 4), (0.25, 10), (0.51, 20), (1, 40), (0.001, 1)])
def test_a_share_of_the_objects_is_kept_whole(forty_objects, fraction, kept):
    partial = simulate_partial(forty_objects, fraction, seed=0)
    assert partial.dtype == np.uint16
    ids, sizes = np.unique(partial[partial > 0], return_counts=True)
    assert (len(ids), set(sizes)) == (kept, {3})
    np.testing.assert_array_equal(partial[partial > 0], forty_objects[partial > 0])


def test_draws_are_nested_and_differ_by_seed(forty_objects):
    few, more = (simulate_partial(forty_objects, f, seed=3) > 0 for f in (0.1, 0.25))
    assert not (few & ~more).any()
    assert (simulate_partial(forty_objects, 0.25, seed=4) > 0).tolist() != more.tolist()


def test_nothing_is_kept_of_nothing():
    assert not simulate_partial(np.zeros((3, 3), int), 0.5, seed=0).any()


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(forty_objects, fraction):
    with pytest.raises(ValueError, match=r"simulate_partial\(\): fraction is"):
        simulate_partial(forty_objects, fraction, seed=0)


UNEVEN = Space((2, 3, 4), (0.5, 0.1, 0.1))


@pytest.fixture
def marks():
    """On the second section one pixel of background, two of the third organ and one of the first."""
    marks = np.zeros((2, 3, 4), np.uint8)
    marks[1, 0, 0], marks[1, 1, :2], marks[1, 2, 3] = 1, 4, 2
    return LabelMap(marks, UNEVEN, {1: Label("other", (0, 0, 255)), 4: Label("heart", (255, 0, 0))})


def test_marks_become_labels_and_weights(marks):
    scribbles = Scribbles.from_marks(marks)
    assert scribbles.classes == (0, 1, 3)
    assert scribbles.sections == (1,)
    np.testing.assert_array_equal(scribbles.weights > 0, marks.labels > 0)
    assert set(np.unique(scribbles.weights)) == {0, 1}
    assert scribbles.label_map.labels[1].tolist() == [[0, 0, 0, 0], [3, 3, 0, 0], [0, 0, 0, 1]]
    assert scribbles.label_map.space == UNEVEN
    assert (scribbles.label_map.name_of(0), scribbles.label_map.name_of(3)) == ("other", "heart")


def test_targets_count_the_classes_that_were_drawn(marks):
    targets = Scribbles.from_marks(marks).targets([1, 0, 1])
    assert targets.shape == (3, 3, 4)
    assert targets[0].tolist() == targets[2].tolist() == [[0, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 1]]
    assert not targets[1].any()


def test_what_stands_on_unmarked_pixels_is_ignored(marks):
    scribbles = Scribbles.from_marks(marks)
    labels = np.where(marks.labels > 0, scribbles.label_map.labels, 9)
    same = Scribbles(LabelMap(labels, UNEVEN), 0.5 * scribbles.weights)
    assert same.classes == scribbles.classes
    np.testing.assert_array_equal(same.targets([0, 1]), scribbles.targets([0, 1]))
    np.testing.assert_array_equal(same.to_marks().labels, marks.labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_marks_come_back_as_they_were(marks, dtype):
    given = LabelMap(marks.labels.astype(dtype), UNEVEN, marks.table)
    back = Scribbles.from_marks(given).to_marks()
    np.testing.assert_array_equal(back.labels, marks.labels)
    assert back.labels.dtype == np.uint8
    assert back.table == marks.table


@pytest.mark.parametrize(
    ("change", "message"),
    [({4: 1, 2: 1}, "all strokes mark background"), ({1: 0}, "no background stroke"), ({1: 0, 2: 0, 4: 0}, "no pixel")],
)
def test_strokes_that_are_missing(marks, change, message):
    for old, new in change.items():
        marks.labels[marks.labels == old] = new
    with pytest.raises(ValueError, match=rf"^Scribbles\(\): .*{message}.*; (mark|draw) "):
        Scribbles.from_marks(marks)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4), r"strokes reach to \(1, 2, 3\) .* outside the images of shape \(1, 3, 4\)"),
        ((2, 9, 3), "strokes reach to"),
        ((2, 3, 5), r"marks have shape \(2, 3, 4\), the images \(2, 3, 5\)"),
    ],
)
def test_marks_of_other_images(marks, shape, message):
    with pytest.raises(ValueError, match=rf"^Scribbles.from_marks\(\): .*{message}"):
        Scribbles.from_marks(marks, shape)


def test_negative_marks(marks):
    negative = LabelMap(marks.labels.astype(np.int16) - 1, UNEVEN)
    with pytest.raises(ValueError, match="a pixel is marked -1"):
        Scribbles.from_marks(negative)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.full((2, 3, 4), 1.5), r"from 1.5 to 1.5"),
        (np.full((2, 3, 4), np.nan), "keep them in"),
        (np.ones((2, 3)), r"weights have shape \(2, 3\)"),
    ],
)
def test_wrong_weights(marks, weights, message):
    with pytest.raises(ValueError, match=message):
        Scribbles(marks, weights)


@pytest.fixture(scope="module")
def organs():
    """On sections 1 to 4 of 6: a crescent (7) and, apart, two discs (3), in an ellipse of another structure (1)."""
    y, x = np.mgrid[:120, :150] - np.array([60, 75])[:, None, None]
    labels = np.where((y / 55) ** 2 + (x / 70) ** 2 < 1, 1, 0)
    labels[(np.hypot(y, x) < 35) & (np.hypot(y - 12, x) > 28)] = 7
    labels[(np.hypot(y - 10, abs(x) - 45) < 12)] = 3
    return np.stack([np.where(labels > 0, 1, 0), *[labels] * 4, np.zeros_like(labels)]).astype(np.uint8)


def drawn(organs, seed=0, sections=(2, 3), **options):
    return simulate_scribbles(organs, [7, 3], sections, seed, **options)


def test_every_mark_lies_in_its_class_and_on_its_sections(organs):
    for seed in range(3):
        marks = drawn(organs, seed)
        assert np.flatnonzero(marks.any(axis=(1, 2))).tolist() == [2, 3]
        assert set(organs[marks == 2]) == {7}
        assert set(organs[marks == 3]) == {3}
        assert set(organs[marks == 1]) == {0, 1}
        Scribbles.from_marks(LabelMap(marks, Space(marks.shape, (1, 1, 1))))


def test_sets_are_seeded_and_sections_drawn_alone(organs):
    np.testing.assert_array_equal(drawn(organs, 1), drawn(organs, 1))
    np.testing.assert_array_equal(drawn(organs, 1)[3], drawn(organs, 1, sections=(3, 0, 5))[3])
    first, second, third = (drawn(organs, seed) > 0 for seed in range(3))
    for one, other in ((first, second), (second, third), (first, third)):
        assert (one & other).sum() < 0.4 * one.sum()
    assert (drawn(organs)[2] != drawn(organs)[3]).any()  # the two sections are alike


def test_strokes_are_few_thin_and_long(organs):
    """Apart from each other they are as many parts as strokes, crossing fewer; a line of pixels has two ends."""
    marks = drawn(organs, thickness=1.0)
    for mark in (1, 2, 3):
        for section in marks[2:4]:
            parts, n = ndimage.label(section == mark, np.ones((3, 3)))
            assert 1 <= n <= 5
            assert max(np.ptp(np.argwhere(parts == i + 1), axis=0).max() for i in range(n)) >= 10
            thick = ndimage.binary_erosion(section == mark, np.ones((3, 3)))
            assert thick.sum() <= 0.02 * (section == mark).sum()
    assert (marks[2:4] > 0).mean() < 0.05


def test_more_strokes_and_thicker_ones_mark_more(organs):
    def n_marked(**options):
        return np.bincount(drawn(organs, **options).ravel(), minlength=4)[1:]

    assert (n_marked(per_class=(1, 1)) > 0).all()
    assert (n_marked() > 1.8 * n_marked(per_class=(1, 1)))[:2].all()
    assert (n_marked(thickness=4.0) > 1.5 * n_marked(thickness=1.0)).all()


def test_a_single_stroke_is_one_smooth_piece(organs):
    for seed in range(5):
        marks = drawn(organs, seed, per_class=(1, 1), thickness=3.0)
        for section in marks[2:4]:
            for mark in (1, 2, 3):
                assert ndimage.label(section == mark, np.ones((3, 3)))[1] == 1
                rounded = ndimage.binary_opening(section == mark, ndimage.generate_binary_structure(2, 1))
                assert rounded.sum() > 0.85 * (section == mark).sum()


def test_strokes_keep_off_borders_and_those_beside_run_along_them(organs):
    for seed in range(3):
        marks = drawn(organs, seed, beside=1.0, thickness=2.0)[2:4]
        for section, labels in zip(marks, organs[2:4], strict=True):
            depth = ndimage.distance_transform_edt(labels == 7)
            assert depth[section == 2].min() > 1
            distance = ndimage.distance_transform_edt(~np.isin(labels, (3, 7)))
            assert distance[section == 1].min() > 1
            assert distance[section == 1].max() < 8
    far = ndimage.distance_transform_edt(~np.isin(organs[2], (3, 7)))[drawn(organs, beside=0.0)[2] == 1]
    assert far.max() > 15


def test_most_background_strokes_away_from_organs_are_on_other_structures(organs):
    marked = [organs[z][drawn(organs, seed, beside=0.0)[z] == 1] for seed in range(3) for z in (2, 3)]
    assert np.concatenate(marked).mean() > 0.6
    assert (np.concatenate(marked) == 0).any()


def test_both_discs_are_found(organs):
    for seed in range(3):
        parts, _ = ndimage.label(organs[2] == 3)
        assert set(parts[drawn(organs, seed)[2] == 3]) == {1, 2}


def test_sections_without_organs_get_background_only(organs):
    marks = drawn(organs, sections=(0, 2, 5))
    assert set(np.unique(marks[0])) == set(np.unique(marks[5])) == {0, 1}


def test_a_person_who_corrects_draws_where_something_was_missed(organs):
    found = organs.copy()
    found[2:4, :, :75][organs[2:4, :, :75] == 3] = 1  # the left disc is missed
    found[2:4, 90:, 60:90] = 7  # something below is taken for the crescent
    marks = drawn(organs, found=found)
    assert all((marks[z, :, :75] == 3).any() for z in (2, 3))  # the disc that was missed is drawn on
    assert 0.2 < (found[marks == 1] == 7).mean() < 0.9  # the other half as usual
    assert not (found[drawn(organs) == 1] == 7).mean() > 0.1
    with pytest.raises(ValueError, match=r"^simulate_scribbles\(\): found has shape \(1, 120, 1\)"):
        drawn(organs, found=found[:1, :, :1])
    np.testing.assert_array_equal(drawn(organs, found=organs), drawn(organs))
    assert set(organs[marks == 3]) == {3}


def test_organs_of_few_pixels_are_not_filled():
    labels = np.zeros((1, 40, 40), int)
    labels[0, 20, 20], labels[0, 5:9, 5:15] = 1, 2
    marks = simulate_scribbles(labels, [1, 2], [0], seed=0, thickness=1.0)
    assert marks[0, 20, 20] == 2
    assert 4 <= (marks == 3).sum() < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([7], [2, 6]), "section 6"), (([7], [0, 5]), r"organs \[7\] are on none"), (([4], [2]), r"organs \[4\]")],
)
def test_nothing_to_draw_on(organs, arguments, message):
    with pytest.raises(ValueError, match=rf"^simulate_scribbles\(\): .*{message}"):
        simulate_scribbles(organs, *arguments, seed=0)
