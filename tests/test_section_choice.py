from itertools import combinations

import numpy as np
import pytest

from limner.section_choice import bridge_variance, suggest_sections, weighed_by_change, wrong_share

POSITIONS = np.array([0.0, 0.1, 0.3, 0.4, 0.7, 0.8, 1.0, 1.1, 1.5, 1.6])


def test_bridge_variance_is_that_of_walks_that_meet_both_ends():
    generator = np.random.default_rng(0)
    steps = generator.normal(0, np.sqrt(np.diff(POSITIONS)), (200_000, len(POSITIONS) - 1))
    walks = np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)], axis=1)
    share = (POSITIONS - POSITIONS[0]) / (POSITIONS[-1] - POSITIONS[0])
    bridges = walks - walks[:, -1:] * share
    np.testing.assert_allclose(bridge_variance(POSITIONS, [9, 0]), bridges.var(axis=0), atol=0.005)


def test_bridge_variance_beyond_the_labels_is_the_distance():
    np.testing.assert_allclose(bridge_variance(POSITIONS, [3]), np.abs(POSITIONS - 0.4))
    found = bridge_variance(POSITIONS, [2, 4])
    np.testing.assert_allclose(found, [0.3, 0.2, 0, 0.1 * 0.3 / 0.4, 0, 0.1, 0.3, 0.4, 0.8, 0.9])
    assert np.isinf(bridge_variance(POSITIONS, [])).all()


def test_wrong_share_counts_doubtful_background_but_not_the_rest_of_it():
    labels, uncertainty = np.zeros((20, 20), int), np.zeros((20, 20), np.float32)
    assert wrong_share(uncertainty, labels) == 0
    labels[:2, :5] = 4
    uncertainty[0, :5], uncertainty[10, :5] = 0.2, 0.4  # one pixel inside, two outside
    assert wrong_share(uncertainty, labels) == pytest.approx(3 / 12)
    assert wrong_share(uncertainty[:15, :10], labels[:15, :10]) == pytest.approx(3 / 12)
    assert wrong_share(uncertainty, labels * 0) == pytest.approx(1)  # nothing but doubt


def test_change_moves_what_is_wrong_between_gaps_and_keeps_the_sum():
    wrong = np.array([0, 0.1, 0.2, 0.1, 0, 0.3, 0.3, 0.3, 0, 0.4])
    found = weighed_by_change(wrong, range(10), {(0, 4): 0.6, (4, 8): 0.2})
    assert found.sum() == pytest.approx(wrong.sum())
    np.testing.assert_allclose(found[1:4], 3 * found[5:8])  # three times the change
    np.testing.assert_allclose(found[1:4] / found[2], [0.75, 1, 0.75])  # 1 * 3, 2 * 2 and 3 * 1
    assert (found[[0, 4, 8]] == 0).all()
    assert found[9] == 0.4  # beyond the labels
    np.testing.assert_array_equal(weighed_by_change(wrong, range(10), {(0, 4): 0.0, (4, 8): 0.0}), wrong)
    np.testing.assert_array_equal(weighed_by_change(wrong, range(10), {}), wrong)
    assert weighed_by_change([0, 0.9, 0, 0.9, 0], range(5), {(0, 2): 1.0, (2, 4): 0.1}).max() == 1


def left_wrong(wrong, positions, labelled, more):
    """What is expected to be wrong after labelling `more`, section by section."""
    total, known = 0.0, sorted({*labelled, *more})
    for z, share in enumerate(wrong):
        if z in known:
            continue
        variances = []
        for given in (sorted(labelled), known):
            before = [positions[z] - positions[a] for a in given if a < z]
            after = [positions[a] - positions[z] for a in given if a > z]
            ends = [min(d) for d in (before, after) if d]
            variances.append(ends[0] * ends[1] / sum(ends) if len(ends) == 2 else ends[0])
        total += share * variances[1] / variances[0]
    return total


@pytest.mark.parametrize("labelled", [[0, 4, 9], [3], [0, 9], [2, 6]])
def test_each_suggestion_is_the_best_there_is(labelled):
    wrong = np.random.default_rng(1).random(10)
    wrong[labelled] = 0
    found = suggest_sections(wrong, POSITIONS, labelled, most=4)
    assert len(found) == 4
    chosen = []
    for suggestion in found:
        before = left_wrong(wrong, POSITIONS, labelled, chosen)
        after = {
            z: left_wrong(wrong, POSITIONS, labelled, [*chosen, z]) for z in range(10) if z not in {*labelled, *chosen}
        }
        assert suggestion.section == min(after, key=after.get)
        assert suggestion.gain == pytest.approx(before - min(after.values()))
        assert suggestion.wrong == wrong[suggestion.section]
        assert suggestion.distance_mm == pytest.approx(min(abs(POSITIONS[suggestion.section] - POSITIONS[labelled])))
        chosen.append(suggestion.section)
    assert [s.gain for s in found] == sorted((s.gain for s in found), reverse=True)


def test_suggestions_do_not_crowd():
    """The worst gap twice as wrong as the others: once halved, it is no longer the worst."""
    wrong = np.tile([0, 0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.1], 4)
    wrong[8:16] *= 1.5
    found = [s.section for s in suggest_sections(wrong, np.arange(32) * 0.05, range(0, 32, 8), most=3)]
    assert found[0] == 12
    assert len({z // 8 for z in found}) == 3
    assert all(abs(a - b) > 4 for a, b in combinations(found, 2))


def test_fewer_where_nothing_more_is_to_be_gained():
    assert suggest_sections(np.zeros(10), POSITIONS, [0, 9]) == ()
    assert suggest_sections(np.full(10, 0.5), POSITIONS, range(10)) == ()
    wrong = np.zeros(10)
    wrong[5] = 0.3
    (only,) = suggest_sections(wrong, POSITIONS, [0, 9])
    assert (only.section, only.gain) == (5, pytest.approx(0.3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positions": range(9)}, "10,.* shares, .9,.* positions"),
        ({"labelled": []}, "no section"),
        ({"most": 0}, "0; give 1"),
    ],
)
def test_bad_arguments(changed, message):
    given = {"wrong": np.zeros(10), "positions": POSITIONS, "labelled": [0], "most": 3}
    with pytest.raises(ValueError, match=rf"suggest_sections\(\): .*{message}"):
        suggest_sections(**{**given, **changed})
