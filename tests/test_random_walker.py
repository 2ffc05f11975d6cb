import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import spsolve

from limner.graph_cut import face_weights
from limner.random_walker import WalkerOptions, random_walker

EXACT = 1e-7


def _solved_densely(levels, marks, spacing, options, prior=None):
    """The same minimum from a sparse matrix of all pairs of neighbours."""
    number = np.arange(marks.size).reshape(marks.shape)
    matrix = sparse.lil_matrix((marks.size, marks.size))
    for axis, face in enumerate(face_weights(spacing)):
        first = np.take(number, range(marks.shape[axis] - 1), axis).ravel()
        second = np.take(number, range(1, marks.shape[axis]), axis).ravel()
        flat = levels.reshape(marks.size, -1).astype(float)
        squared = ((flat[first] - flat[second]) ** 2).sum(axis=1)
        for v, w, join in zip(
            first, second, face * (np.exp(-squared / options.contrast**2) + options.delta), strict=True
        ):
            matrix[v, w] -= join
            matrix[w, v] -= join
            matrix[v, v] += join
            matrix[w, w] += join
    lam = options.prior_weight if prior is not None else 0
    matrix = (matrix + lam * sparse.identity(marks.size)).tocsr()
    known = marks.ravel() > 0
    chances = []
    for label in range(marks.max()):
        p = (marks.ravel() == label + 1).astype(float)
        right = -matrix[~known][:, known] @ p[known]
        if prior is not None:
            right = right + lam * prior[label].ravel()[~known]
        p[~known] = spsolve(matrix[~known][:, ~known].tocsc(), right)
        chances.append(p.reshape(marks.shape))
    return np.array(chances)


def _case(n_classes=2, channels=None, shape=(4, 9, 7)):
    draw = np.random.default_rng(0)
    levels = draw.integers(90, 110, shape if channels is None else (*shape, channels))
    marks = np.zeros(shape, np.uint8)
    for label in range(n_classes):
        marks[label, 2 * label + 1, 2 + label] = label + 1
    return levels, marks


@pytest.mark.parametrize(("n_classes", "channels"), [(2, None), (2, 3), (3, None)])
@pytest.mark.parametrize("with_prior", [False, True])
def test_solves_the_linear_system(n_classes, channels, with_prior):
    levels, marks = _case(n_classes, channels)
    options = WalkerOptions(contrast=8, delta=0.02, prior_weight=0.05, tolerance=EXACT)
    prior = np.random.default_rng(1).dirichlet(np.ones(n_classes), marks.shape) if with_prior else None
    prior = None if prior is None else np.moveaxis(prior, -1, 0)
    found = random_walker(levels, marks, (0.2, 0.1, 0.05), options, prior)
    expected = _solved_densely(levels, marks, (0.2, 0.1, 0.05), options, prior)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_begins_on_a_coarser_grid_and_ends_at_the_same_solution():
    levels, marks = _case(shape=(3, 40, 36))
    marks[2, 30:34, 30:34] = 2
    options = WalkerOptions(tolerance=EXACT)
    np.testing.assert_allclose(
        random_walker(levels, marks, (1.0, 1.0, 1.0), options),
        _solved_densely(levels, marks, (1.0, 1.0, 1.0), options),
        atol=2e-4,
    )


def test_halfway_between_two_strokes_where_the_image_is_even():
    marks = np.zeros((1, 1, 9), np.uint8)
    marks[..., 0], marks[..., -1] = 1, 2
    found = random_walker(np.zeros(marks.shape), marks, (1.0, 1.0, 1.0), WalkerOptions(tolerance=EXACT))
    np.testing.assert_allclose(found[1, 0, 0], np.linspace(0, 1, 9), atol=1e-5)


def test_the_chance_falls_at_an_edge():
    levels = np.zeros((1, 20, 20))
    levels[:, :, 14:] = 100
    marks = np.zeros(levels.shape, np.uint8)
    marks[0, 10, 2], marks[0, 10, 18] = 2, 1
    organ = random_walker(levels, marks, (1.0, 1.0, 1.0), WalkerOptions())[1]
    assert (organ[0, :, :14] > 0.5).all()
    assert (organ[0, :, 14:] < 0.5).all()


def test_wide_gaps_between_sections_join_them_less():
    marks = np.zeros((3, 9, 9), np.uint8)
    marks[0, 4, 4], marks[1, 0] = 2, 1
    levels = np.zeros(marks.shape)
    near = random_walker(levels, marks, (1.0, 1.0, 1.0), WalkerOptions())[1]
    far = random_walker(levels, marks, (9.0, 1.0, 1.0), WalkerOptions())[1]
    assert far[1, 4, 4] < 0.5 * near[1, 4, 4]


def test_another_start_leads_to_the_same_end():
    levels, marks = _case()
    options = WalkerOptions(tolerance=EXACT)
    start = np.random.default_rng(3).dirichlet((1, 1), marks.shape).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(
        random_walker(levels, marks, (1.0, 1.0, 1.0), options, start=start),
        random_walker(levels, marks, (1.0, 1.0, 1.0), options),
        atol=2e-5,
    )


def test_refuses_what_cannot_be():
    levels, marks = _case()
    with pytest.raises(ValueError, match=r"strokes are of classes \[1\]; give 1, 2 and up"):
        random_walker(levels, np.minimum(marks, 1), (1.0, 1.0, 1.0), WalkerOptions())
    with pytest.raises(ValueError, match="give one grid"):
        random_walker(levels[:, 1:], marks, (1.0, 1.0, 1.0), WalkerOptions())
    with pytest.raises(ValueError, match=r"prior has shape \(4, 9, 7\); give \(2, 4, 9, 7\)"):
        random_walker(levels, marks, (1.0, 1.0, 1.0), WalkerOptions(), prior=levels)
    with pytest.raises(ValueError, match="delta is 0; give more than 0"):
        WalkerOptions(delta=0)


def test_finds_what_lies_behind_strong_edges_where_nothing_is_drawn():
    levels = np.full((16, 48, 48), 50.0)
    levels[4:12, 8:20, 8:20] = levels[4:12, 28:40, 28:40] = 200
    marks = np.zeros(levels.shape, np.uint8)
    marks[8, 12:16, 14], marks[8, 3, 3:45], marks[8, 44, 3:45] = 2, 1, 1
    organ = random_walker(levels, marks, (1.0, 1.0, 1.0), WalkerOptions(contrast=6.0, delta=1e-3))[1]
    exact = random_walker(levels, marks, (1.0, 1.0, 1.0), WalkerOptions(contrast=6.0, delta=1e-3, tolerance=1e-8))[1]
    assert exact[8, 34, 34] < 0.1 < 0.5 < exact[8, 18, 18]
    np.testing.assert_allclose(organ, exact, atol=0.05)
