import itertools

import numpy as np
import pytest
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from limner.graph_cut import CutOptions, cut, cut_coarse_to_fine, cut_labels, energy, face_weights

CUBE = (1.0, 1.0, 1.0)


def volume(shape, seed=0, channels=0):
    """A ball in noise."""
    draw = np.random.default_rng(seed)
    centred = [(np.arange(n) - (n - 1) / 2) / n for n in shape]
    ball = sum(c**2 for c in np.meshgrid(*centred, indexing="ij", sparse=True)) < 0.12
    heat = np.clip(0.3 + 0.4 * ball + draw.normal(0, 0.25, shape), 0, 1).astype(np.float32)
    size = (*shape, channels) if channels else shape
    inside = ball[..., None] if channels else ball
    return heat, np.clip(90 + 30 * inside + draw.normal(0, 8, size), 0, 255).astype(np.uint8)


def by_the_formula(labels, heat, image, spacing, options):
    """The energy voxel by voxel."""
    z, y, x = spacing
    faces = {(1, 0, 0): y * x / z, (0, 1, 0): z * x / y, (0, 0, 1): z * y / x}
    in_plane = np.sqrt(faces[0, 1, 0] * faces[0, 0, 1])
    total = sum(abs(float(labels[v]) - float(heat[v])) for v in np.ndindex(labels.shape))
    for v in np.ndindex(labels.shape):
        for step, face in faces.items():
            w = tuple(a + b for a, b in zip(v, step, strict=True))
            if all(a < n for a, n in zip(w, labels.shape, strict=True)) and labels[v] != labels[w]:
                squared = np.sum((image[v].astype(float) - image[w]) ** 2)
                total += options.gamma * face / in_plane * (np.exp(-squared / options.contrast**2) + options.delta)
    return total


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("spacing", [CUBE, (0.05, 0.04, 0.02)])
def test_energy_is_that_of_the_formula(spacing, channels):
    heat, image = volume((3, 4, 5), channels=channels)
    options = CutOptions(gamma=0.7, contrast=9.0, delta=0.2)
    labels = np.random.default_rng(1).random(heat.shape) > 0.5
    expected = by_the_formula(labels, heat, image, spacing, options)
    assert energy(labels, heat, image, spacing, options) == pytest.approx(expected, rel=1e-6)
    both = np.stack([1 - heat, heat])
    assert energy(labels, both, image, spacing, options) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("gamma", "spacing"), [(0.2, CUBE), (0.6, (2.0, 1.0, 0.7)), (3.0, CUBE)])
def test_no_labelling_has_less_energy(gamma, spacing):
    """All 4,096 labellings of 2 x 2 x 3 voxels."""
    heat, image = volume((2, 2, 3), seed=int(10 * gamma))
    options = CutOptions(gamma=gamma)
    every = np.array(list(itertools.product([0, 1], repeat=12))).reshape(-1, 2, 2, 3)
    least = min(energy(labels, heat, image, spacing, options) for labels in every)
    found = energy(cut(heat, image, spacing, options), heat, image, spacing, options)
    assert found == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_energy_is_the_value_of_the_maximum_flow(seed):
    """Heat in tenths and two grey levels far apart, so that capacities are whole: 1 and 11 tenths of gamma = 1/2."""
    draw = np.random.default_rng(seed)
    shape = (7, 8, 9)
    tenths, image = draw.integers(0, 11, shape), draw.choice(np.array([0, 255], np.uint8), shape)
    n, numbers = tenths.size, np.arange(tenths.size).reshape(shape)
    ends, capacities = [], []
    for axis in range(3):
        v, w = (np.moveaxis(numbers, axis, 0)[s].ravel() for s in (slice(0, -1), slice(1, None)))
        weights = np.where(image.flat[v] == image.flat[w], 11, 1)
        ends += [(v, w), (w, v)]
        capacities += [weights, weights]
    ends += [(np.full(n, n), numbers.ravel()), (numbers.ravel(), np.full(n, n + 1))]
    capacities += [2 * tenths.ravel(), 2 * (10 - tenths.ravel())]
    origin, end = (np.concatenate(column) for column in zip(*ends, strict=True))
    graph = csr_matrix((np.concatenate(capacities).astype(np.int32), (origin, end)), (n + 2, n + 2))
    flow = maximum_flow(graph, n, n + 1).flow_value
    heat, options = tenths / 10, CutOptions(gamma=0.5, contrast=10.0, delta=0.1)
    labels = cut(heat, image, CUBE, options)
    assert 0 < labels.mean() < 1
    assert energy(labels, heat, image, CUBE, options) == pytest.approx(flow / 20, rel=1e-7)


@pytest.mark.parametrize("channels", [0, 3])
def test_no_perturbed_labelling_has_less_energy(channels):
    heat, image = volume((9, 14, 13), seed=3, channels=channels)
    options, spacing = CutOptions(gamma=0.8), (0.1, 0.05, 0.04)
    labels = cut(heat, image, spacing, options)
    least = energy(labels, heat, image, spacing, options)
    draw = np.random.default_rng(0)
    for size in itertools.islice(itertools.cycle([1, 2, 4]), 50):
        other = labels.copy()
        z, y, x = (draw.integers(0, n - size + 1) for n in labels.shape)
        other[z : z + size, y : y + size, x : x + size] ^= True
        assert energy(other, heat, image, spacing, options) >= least


def test_a_voxel_goes_with_its_neighbours_from_the_weight_on_that_theirs_outweighs():
    """A heat of .3 amid 1: against it 1 - .3 - .3 = .4 is gained, for it 6 gamma is paid."""
    heat, image = np.ones((3, 3, 3)), np.full((3, 3, 3), 80, np.uint8)
    heat[1, 1, 1] = 0.3
    for gamma, organ in ((0.4 / 6 - 0.002, False), (0.4 / 6 + 0.002, True)):
        assert cut(heat, image, CUBE, CutOptions(gamma, delta=0.0))[1, 1, 1] == organ


def test_without_neighbours_each_voxel_goes_by_its_heat():
    heat, image = volume((4, 5, 6))
    np.testing.assert_array_equal(cut(heat, image, CUBE, CutOptions(gamma=0.0)), heat > 0.5)


def test_border_runs_where_the_image_has_its_edge():
    """A heat that rises slowly says little about where; grey levels do."""
    heat = np.broadcast_to(np.linspace(0.2, 0.8, 12), (3, 4, 12))
    image = np.full(heat.shape, 50, np.uint8)
    image[..., 8:] = 150
    assert (cut(heat, image, CUBE, CutOptions(gamma=2.0)) == (np.arange(12) >= 8)).all()


def test_thick_sections_hold_together_less():
    """A section of low heat between two of high: of cubes it follows them, at five times the distance it does not."""
    heat, image = np.full((3, 6, 6), 0.9), np.full((3, 6, 6), 80, np.uint8)
    heat[1] = 0.3
    options = CutOptions(gamma=0.3, delta=0.0)
    assert cut(heat, image, CUBE, options)[1].all()
    assert not cut(heat, image, (5.0, 1.0, 1.0), options)[1].any()
    np.testing.assert_allclose(face_weights((5.0, 1.0, 1.0)), [0.04, 1, 1])
    np.testing.assert_allclose(face_weights((1.0, 2.0, 1.0)), [2, 0.5, 2])


def test_turning_the_volume_turns_the_cut():
    heat, image = volume((6, 7, 8), seed=5)
    options, spacing = CutOptions(gamma=0.5), (0.7, 1.3, 1.0)
    face = face_weights(spacing) / face_weights((1.0, 1.3, 0.7))[::-1]  # scaled by another in-plane pair
    turned = CutOptions(gamma=0.5 * face[0])
    expected = cut(heat, image, spacing, options)
    found = cut(heat.transpose(2, 1, 0), image.transpose(2, 1, 0), (1.0, 1.3, 0.7), turned)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(found.transpose(2, 1, 0), expected)


def test_seeds_hold_and_their_neighbours_follow():
    heat, image = np.full((3, 7, 7), 0.45), np.full((3, 7, 7), 80, np.uint8)
    image[:, 2:5, 2:5] = 200
    seeds = np.zeros((2, 3, 7, 7), bool)
    options = CutOptions(gamma=1.0, delta=0.01)
    assert not cut(heat, image, CUBE, options, seeds).any()
    seeds[1, 1, 3, 3] = True
    found = cut(heat, image, CUBE, options, seeds)
    np.testing.assert_array_equal(found, image == 200)
    seeds[0, 0, 2, 2] = True
    held = cut(heat, image, CUBE, options, seeds)
    assert held[1, 3, 3]
    assert not held[0, 2, 2]
    assert energy(found, heat, image, CUBE, options, seeds) == np.inf
    assert energy(held, heat, image, CUBE, options, seeds) < np.inf


def test_slabs_in_threads_do_not_change_the_cut(monkeypatch):
    heat, image = volume((11, 12, 13), seed=8)
    options = CutOptions(gamma=0.8)
    expected = cut(heat, image, CUBE, options)
    monkeypatch.setattr("limner.graph_cut.THINNEST_SLAB", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(cut(heat, image, CUBE, options), expected)


def heats_of(shape, labels, seed):
    """Smooth heat maps that sum to 1."""
    draw = np.random.default_rng(seed)
    raw = np.stack([ndimage.gaussian_filter(draw.normal(size=shape), 1.5) for _ in range(labels)])
    odds = np.exp(8 * raw)
    return (odds / odds.sum(axis=0)).astype(np.float32)


def test_two_labels_by_expansion_are_the_exact_cut():
    heat, image = volume((6, 9, 8), seed=7)
    seeds = np.random.default_rng(0).random((2, *heat.shape)) > 0.98
    seeds[1] &= ~seeds[0]
    options, spacing = CutOptions(gamma=0.4), (0.06, 0.04, 0.04)
    found = cut_labels(np.stack([1 - heat, heat]), image, spacing, options, seeds)
    np.testing.assert_array_equal(found, cut(heat, image, spacing, options, seeds))


def test_several_organs_against_all_labellings():
    """3 labels, 8 voxels: within twice the least energy by theorem, and here at it."""
    heats = heats_of((2, 2, 2), 3, seed=1)
    image = np.random.default_rng(0).integers(80, 100, (2, 2, 2), dtype=np.uint8)
    options = CutOptions(gamma=0.15)
    every = np.array(list(itertools.product([0, 1, 2], repeat=8))).reshape(-1, 2, 2, 2)
    least = min(energy(labels, heats, image, CUBE, options) for labels in every)
    labels = cut_labels(heats, image, CUBE, options)
    assert energy(labels, heats, image, CUBE, options) == pytest.approx(least, abs=1e-9)


def test_no_single_expansion_lowers_the_energy_of_several_organs(monkeypatch):
    heats, image = heats_of((8, 10, 12), 4, seed=2), volume((8, 10, 12))[1]
    options, seen = CutOptions(gamma=0.6), []

    def watched(labels, *rest):
        seen.append(labels.copy())
        return energy(labels, *rest)

    monkeypatch.setattr("limner.graph_cut.energy", watched)
    labels = cut_labels(heats, image, CUBE, options)
    least = energy(labels, heats, image, CUBE, options)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert len(seen) > 5
    assert least == min(energy(each, heats, image, CUBE, options) for each in seen)
    assert least < energy(heats.argmax(axis=0), heats, image, CUBE, options)
    draw = np.random.default_rng(0)
    for alpha in range(4):
        for _ in range(10):
            some = ndimage.binary_dilation(draw.random(labels.shape) > 0.99, iterations=int(draw.integers(0, 3)))
            assert energy(np.where(some, alpha, labels), heats, image, CUBE, options) >= least - 1e-6


def test_seeds_of_several_organs_hold():
    heats, image = heats_of((4, 6, 6), 4, seed=4), volume((4, 6, 6))[1]
    seeds = np.zeros(heats.shape, bool)
    for label in range(4):
        seeds[label, label, 2, 3] = True
    labels = cut_labels(heats, image, CUBE, CutOptions(gamma=0.5), seeds)
    assert [labels[z, 2, 3] for z in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("spacing", [CUBE, (0.05, 0.02, 0.02)])
def test_coarse_to_fine_comes_near_the_exact_cut(spacing):
    heat, image = volume((13, 30, 27), seed=11)
    options = CutOptions(gamma=0.5)
    least = energy(cut(heat, image, spacing, options), heat, image, spacing, options)
    found = cut_coarse_to_fine(heat, image, spacing, options, max_voxels=heat.size // 3)
    assert found.energy == energy(found.labels, heat, image, spacing, options)
    assert least - 1e-6 <= found.energy <= 1.01 * least
    assert found.voxels[0] <= heat.size // 3
    assert found.voxels[-1] < heat.size


def test_a_band_that_is_everything_gives_the_exact_cut():
    heat, image = volume((10, 17, 16), seed=12)
    seeds = np.zeros((2, *heat.shape), bool)
    seeds[1, 0, :2, :2] = seeds[0, 5, 8, 8] = True
    options = CutOptions(gamma=0.5)
    found = cut_coarse_to_fine(heat, image, CUBE, options, seeds, max_voxels=heat.size // 2, band=20)
    assert found.voxels[1] == heat.size
    np.testing.assert_array_equal(found.labels, cut(heat, image, CUBE, options, seeds))


@pytest.mark.parametrize("organ", [True, False])
def test_what_is_outside_the_band_holds_on_to_it(organ):
    """Columns whose heat says the other thing, up to an edge of the image; only the last two are in the band."""
    heat, image = np.full((4, 8, 32), 0.1), np.full((4, 8, 32), 80, np.uint8)
    heat[..., :12], heat[..., 12:16] = 0.9, 0.45
    image[..., 16:] = 200
    heat = heat if organ else 1 - heat
    options = CutOptions(gamma=1.0, delta=0.01)
    found = cut_coarse_to_fine(heat, image, CUBE, options, max_voxels=heat.size // 4)
    assert (found.labels == ((np.arange(32) < 16) == organ)).all()
    assert found.voxels == (heat.size // 8, 4 * 8 * 4)
    np.testing.assert_array_equal(found.labels, cut(heat, image, CUBE, options))


def test_coarse_voxels_weigh_as_much_against_their_neighbours_as_what_they_stand_for():
    """A cube of side 8: .6 * 512 is gained by it, 384 gamma paid; so too for its 64 coarse voxels."""
    heat, image = np.full((16, 16, 16), 0.2), np.full((16, 16, 16), 80, np.uint8)
    heat[4:12, 4:12, 4:12] = 0.8
    for gamma, kept in ((0.78, True), (0.82, False)):
        found = cut_coarse_to_fine(heat, image, CUBE, CutOptions(gamma, delta=0.0), max_voxels=heat.size // 8)
        np.testing.assert_array_equal(found.labels, (heat > 0.5) & kept)


def test_seeds_far_from_the_coarse_surface_hold():
    heat, image = np.zeros((8, 24, 24)), np.full((8, 24, 24), 80, np.uint8)
    heat[:, :6] = 1
    seeds = np.zeros((2, *heat.shape), bool)
    seeds[1, 4, 20, 20] = seeds[0, 4, 20, 21] = True  # both in one coarse voxel
    options = CutOptions(gamma=0.1)
    found = cut_coarse_to_fine(heat, image, CUBE, options, seeds, max_voxels=heat.size // 4)
    np.testing.assert_array_equal(found.labels, cut(heat, image, CUBE, options, seeds))


HEAT, IMAGE = np.full((2, 3, 4), 0.5), np.zeros((2, 3, 4), np.uint8)


def changed(value):
    heat = HEAT.copy()
    heat[1, 2, 3] = value
    return heat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HEAT, IMAGE[:1], CUBE), r"^cut\(\): image has shape \(1, 3, 4\), heat \(2, 3, 4\); give both on one grid$"),
        ((HEAT[0], IMAGE[0], CUBE), r"^cut\(\): heat has shape \(3, 4\); give \(Z, Y, X\)$"),
        ((HEAT, IMAGE.astype(np.uint16), CUBE), r"^cut\(\): image is of uint16; give 8-bit grey levels \(uint8\)$"),
        ((changed(1.01), IMAGE, CUBE), r"^cut\(\): heat of section 1 is not within \[0, 1\] everywhere; "),
        ((changed(-0.01), IMAGE, CUBE), r"^cut\(\): heat of section 1 is not within"),
        ((changed(np.nan), IMAGE, CUBE), r"^cut\(\): heat of section 1 is not within"),
        ((HEAT, IMAGE, (1.0, 0.0, 1.0)), r"^cut\(\): spacing is \(1.0, 0.0, 1.0\); give three lengths"),
        ((HEAT, IMAGE, (1.0, np.nan, 1.0)), r"^cut\(\): spacing is"),
        ((HEAT, IMAGE, CUBE, CutOptions(gamma=1e4)), r"^cut\(\): neighbours weigh up to 11000 times .*; lower gamma"),
        ((HEAT, IMAGE, CUBE, None, np.zeros((3, 2, 3, 4), bool)), r"^cut\(\): seeds are bool of shape \(3, 2, 3, 4\)"),
        ((HEAT, IMAGE, CUBE, None, np.zeros((2, 2, 3, 4))), r"^cut\(\): seeds are float64 of shape"),
        ((HEAT, IMAGE, CUBE, None, np.ones((2, 2, 3, 4), bool)), r"^cut\(\): on section 0 a voxel is a seed of two"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cut(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, r"^CutOptions\(\): gamma is -1.0; give 0 or more$"),
        ({"gamma": np.nan}, r"^CutOptions\(\): gamma is nan; give 0 or more$"),
        ({"delta": -0.1}, r"^CutOptions\(\): delta is -0.1; give 0 or more$"),
        ({"contrast": 0.0}, r"^CutOptions\(\): contrast is 0.0; give more than 0$"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CutOptions(**options)


def test_bad_input_of_the_others_is_refused():
    with pytest.raises(ValueError, match=r"^cut_labels\(\): heats have shape \(2, 3, 4\); give \(L, Z, Y, X\), L from"):
        cut_labels(HEAT, IMAGE, CUBE)
    with pytest.raises(ValueError, match=r"^cut_coarse_to_fine\(\): max_voxels is 100, band 0; give 1 or more$"):
        cut_coarse_to_fine(HEAT, IMAGE, CUBE, max_voxels=100, band=0)
    with pytest.raises(ValueError, match=r"^energy\(\): labels have shape \(1, 3, 4\), the heat \(2, 3, 4\); give one"):
        energy(HEAT[:1], HEAT, IMAGE, CUBE, CutOptions())
