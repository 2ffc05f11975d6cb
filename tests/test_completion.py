import numpy as np
import pytest

from limner.completion import (
    Completion,
    SectionResult,
    Size,
    area_errors,
    areas,
    common_deviation,
    pixels_between,
    volumes,
    widest_errors,
)
from limner.space import Space
from limner.volume import LabelMap


def test_common_deviation_is_that_of_pixels_that_err_as_one():
    """One draw decides all pixels of a chance: the deviation of their sum is that of one times their number."""
    draws = np.random.default_rng(0).random(200_000)
    for chance, pixels in [(0.3, 7), (0.9, 20)]:
        found = common_deviation(np.stack([np.full((1, pixels), chance), np.full((1, pixels), 1 - chance)]))
        assert found == pytest.approx(np.std((draws < chance) * pixels), rel=0.01)


def test_pixels_that_are_all_but_sure_do_not_add_up():
    chances = np.full((2, 100, 100), 0.00005)
    chances[1] = 0.99995
    assert common_deviation(chances).tolist() == [0, 0]
    chances[:, 0, :4] = 0.5
    np.testing.assert_allclose(common_deviation(chances), 4 * 0.5)


def test_pixels_between_are_as_wide_as_asked_and_never_less_than_none():
    chances = np.array([[0.96, 0.94, 0.5, 0.04, 0.01], [0.03, 0.04, 0.3, 0.9, 0.02], [0.01, 0.02, 0.2, 0.06, 0.97]])
    deviation = np.sqrt(chances * (1 - chances)).sum(axis=1)  # 1.22, 1.29, 1.05
    for width in (0.0, 1.0, 2.0, 9.0):
        fewest, best, most = pixels_between(np.array([3, 1, 1]), common_deviation(chances[:, None]), width, 5)
        np.testing.assert_array_equal(fewest, np.maximum(0, best - np.floor(width * deviation)))
        np.testing.assert_array_equal(most, np.minimum(5, best + np.floor(width * deviation)))


def test_area_errors_name_every_structure_that_is_there_or_may_be():
    """0 is background; 2 may be there and is not; 4 is off by one; 6 was never possible; 8 is in no doubt and right."""
    chances = np.array([[0.5, 0.6, 0.0, 0], [0.1, 0.2, 0, 0], [0.4, 0.2, 0, 0], [0, 0, 1.0, 1]])[:, None]
    likeliest, structures = np.bincount(chances.argmax(axis=0).ravel(), minlength=4), np.array([0, 2, 4, 8])
    found = area_errors(likeliest, common_deviation(chances), structures, np.array([[4, 6, 8, 8]]))
    assert found.tolist() == [0.0, pytest.approx(1 / (0.24**0.5 + 0.16**0.5)), np.inf, 0.0]


def test_intervals_by_errors_hold_nine_of_ten_others():
    """Errors in proportion to the spread, normal: half the width is 1.645 of their standard deviation."""
    generator = np.random.default_rng(0)
    spreads = generator.uniform(0.1, 1.0, 400)
    errors = [np.abs(generator.normal(0, 0.4 * s, 10)) for s in spreads]
    found = widest_errors(errors, spreads.tolist())
    assert found == pytest.approx(0.4 * 1.645, rel=0.05)
    others = [np.abs(generator.normal(0, 0.4 * s, 10)) <= found * s for s in spreads]
    assert np.mean(others) == pytest.approx(0.9, abs=0.01)


def test_errors_that_no_width_holds_count_but_do_not_make_it_endless():
    known = [np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])]
    assert widest_errors(known, [1.0]) == 9  # nine of ten, upwards
    assert widest_errors([np.append(known[0][:6], [np.inf] * 3)], [1.0]) == 6
    assert np.isnan(widest_errors([], []))
    assert np.isnan(widest_errors([np.array([np.inf])], [1.0]))


def completed():
    """Four sections of 2 x 2 pixels of .5 x .2 mm at 0, 1, 3 and 4 mm; the first and last are labelled."""
    labels = np.array([[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 2], [0, 0]], [[2, 2], [2, 0]]])
    space = Space((4, 2, 2), (1.0, 0.5, 0.2), positions=(0.0, 1.0, 3.0, 4.0))
    nothing = np.zeros((2, 2), np.float32)

    def result(z, structures, areas):
        structures, areas = np.array(structures), np.array(areas)
        return SectionResult(labels[z].astype(np.int32), nothing, structures, areas, None, [], 0.0, 0.0, 0.0)

    sections = {
        1: result(1, [0, 1, 2], [[2, 0, 0], [3, 1, 0], [4, 2, 0]]),
        2: result(2, [0, 1, 2], [[1, 1, 0], [2, 1, 1], [3, 1, 2]]),
    }
    uncertainty = np.zeros(labels.shape, np.float32)
    return Completion(LabelMap(labels, space), uncertainty, sections, np.zeros(4), (), {}, {}, ())


def test_areas_of_each_section():
    found = areas(completed())
    assert found[0] == [Size(1, pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2))]
    assert found[1] == [Size(1, pytest.approx(0.1), 0.0, pytest.approx(0.2))]  # 2 cannot be there
    assert found[2] == [
        Size(1, pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1)),
        Size(2, pytest.approx(0.1), 0.0, pytest.approx(0.2)),
    ]
    assert [size.structure for size in found[3]] == [2]


def test_volumes_take_half_the_way_to_either_neighbour():
    """Sections stand for 1, 1.5, 1.5 and 1 mm."""
    one, two = volumes(completed())
    assert (one.structure, two.structure) == (1, 2)
    assert one.likeliest == pytest.approx(0.2 * 1 + 0.1 * 1.5 + 0.1 * 1.5)
    assert (one.fewest, one.most) == (pytest.approx(0.2 + 0 + 0.15), pytest.approx(0.2 + 0.3 + 0.15))
    assert two.likeliest == pytest.approx(0.1 * 1.5 + 0.3 * 1)
    assert (two.fewest, two.most) == (pytest.approx(0.3), pytest.approx(0.3 + 0.3))


def test_areas_at_full_size_move_the_intervals_and_those_of_volumes():
    """One structure is larger by 0.03 at full size, one was never seen at working size, and one is gone."""
    full = {0: {0: 0.2, 1: 0.21, 5: 0.01}, 1: {0: 0.27, 1: 0.13}, 2: {0: 0.3, 1: 0.1}, 3: {0: 0.1, 2: 0.3}}
    found = areas(completed(), full)
    assert found[0] == [Size(1, 0.21, 0.21, 0.21), Size(5, 0.01, 0.01, 0.01)]
    assert found[1] == [Size(1, 0.13, pytest.approx(0.03), pytest.approx(0.23))]
    assert found[2][1] == Size(2, 0.0, 0.0, pytest.approx(0.1))
    one, two, five = volumes(completed(), full)
    assert one.likeliest == pytest.approx(0.21 + 0.13 * 1.5 + 0.1 * 1.5)
    assert one.most == pytest.approx(one.likeliest + 0.1 * 1.5)
    assert (two.likeliest, five.likeliest) == (pytest.approx(0.3), pytest.approx(0.01))


def test_gaps_err_on_their_own():
    """Sections 1, 2 and 4, of 1 mm each, are completed: the errors of 1 and 2 add up, that of 4 adds in squares."""
    labels = np.zeros((6, 2, 2), int)
    labels[:, 0] = 3
    space, nothing = Space(labels.shape, (1.0, 0.5, 0.2)), np.zeros((2, 2), np.float32)
    areas_of = {1: [1, 2, 4], 2: [0, 2, 3], 4: [0, 2, 2]}  # fewest, likeliest, most pixels
    sections = {
        z: SectionResult(labels[z].astype(np.int32), nothing, np.array([3]), np.array(a)[:, None], None, [], 0, 0, 0)
        for z, a in areas_of.items()
    }
    done = Completion(
        LabelMap(labels, space), np.zeros(labels.shape, np.float32), sections, np.zeros(6), (), {}, {}, ()
    )
    (found,) = volumes(done)
    assert found.likeliest == pytest.approx(6 * 2 * 0.1)
    assert found.fewest == pytest.approx(1.2 - 0.1 * np.hypot(1 + 2, 2))
    assert found.most == pytest.approx(1.2 + 0.1 * np.hypot(2 + 1, 0))
