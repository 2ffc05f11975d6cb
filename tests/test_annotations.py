import numpy as np
import pytest

from limner.annotations import SectionLabels, simulate_partial
from limner.space import Space
from limner.volume import LabelMap


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
