import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from limner import section_fusion
from limner.fusion_scale import as_indices, fitted_rho, sample
from limner.fusion_stages import change, changes
from limner.label_fusion import blend, interpolation_weights
from limner.registration.section_warps import SectionWarps
from limner.section_fusion import PAPER_RHO, FusionOptions, SectionFusion
from limner.structure_distances import StructureDistances

LABELLED = (1, 3, 4, 7)
POSITIONS = np.array([0.0, 0.1, 0.3, 0.35, 0.6, 0.7, 0.9, 1.3, 1.4])
SPACING = (0.05, 0.05)


def disc(radius, at=(12, 15), shape=(24, 30)):
    y, x = np.indices(shape)
    return np.hypot(y - at[0], x - at[1]) < radius


def make(**options):
    """Discs of structure 5 that grow along z; the first and third labelled sections hold structure 2 as well."""
    options = {"label_flow": False} | options
    labels = np.stack([np.where(disc(4 + z), 5, 0) for z in range(9)])
    labels[1][disc(2, (3, 3))] = 2
    labels[4][disc(2, (4, 4))] = 2
    labels[[0, 2, 5, 6, 8]] = 77  # not labelled: never read
    images = np.where(labels == 5, 150.0, 20.0)[:, None].astype(np.float32)
    return SectionFusion(images, labels, LABELLED, POSITIONS, SPACING, FusionOptions(**options))


def distances_brute_force(labels, structures, clip_mm):
    """Signed distances on square pixels, structures that are absent clipped."""
    found = []
    for structure in structures:
        mask = labels == structure
        inside, outside = (ndimage.distance_transform_edt(m, sampling=SPACING) for m in (mask, ~mask))
        signed = (
            np.where(mask, inside - SPACING[0] / 2, SPACING[0] / 2 - outside) if mask.any() else np.full(mask.shape, -9)
        )
        found.append(np.clip(signed, -clip_mm, clip_mm))
    return np.stack(found)


@pytest.mark.parametrize(
    ("z", "left_out", "expected"),
    [
        (2, None, [1, 3]),
        (2, 3, [1, 4]),
        (3, 3, [1, 4]),
        (3, None, [1, 4]),  # a section does not speak for itself
        (0, None, [1]),
        (8, 7, [4]),
        (1, 1, [3]),
        (7, 7, [4]),
    ],
)
def test_neighbours(z, left_out, expected):
    assert make().neighbours(z, left_out) == expected


def test_blended_atlases_are_those_of_the_interpolation():
    fusion = make()
    for z, left_out, known in [(2, None, [1, 3, 4, 7]), (3, 3, [1, 4, 7]), (5, None, [1, 3, 4, 7]), (8, 7, [1, 3, 4])]:
        weights = interpolation_weights(POSITIONS[known].tolist(), POSITIONS[z])
        assert fusion.atlases(z, left_out) == [(known[i], w) for i, w in weights]
    assert [a for a, _ in fusion.atlases(5)] == [3, 4, 7]
    assert make(interpolation="linear").atlases(2) == [(1, pytest.approx(0.2)), (3, pytest.approx(0.8))]
    assert make(fusion="normalised").atlases(2) == [(1, 1.0), (3, 1.0)]


def test_spread_is_that_of_a_brownian_bridge():
    """0.25 mm between neighbours 0.2 and 0.05 mm away: variance 0.2 * 0.05 / 0.25; outside, the distance itself."""
    fusion = make()
    assert fusion.spread(2) == pytest.approx(math.sqrt(0.04))
    assert fusion.spread(2, left_out=3) == pytest.approx(math.sqrt(0.2 * 0.3 / 0.5))
    assert fusion.spread(8) == pytest.approx(math.sqrt(0.1))
    spreads = [math.sqrt(v) for v in (0.1, 0.04, 0.1 * 0.6 / 0.7, 0.3 * 0.4 / 0.7, 0.1)]
    assert fusion.typical_spread() == pytest.approx(np.median(spreads))


def test_structures_and_labelled_near():
    fusion = make()
    assert fusion.structures(2) == [0, 2, 5]
    assert fusion.structures(8) == [0, 5]  # section 7 alone speaks
    assert fusion.structures(8, left_out=7) == [0, 2, 5]
    assert fusion.labelled_near(4) == [1, 3, 7]
    assert fusion.labelled_near(8) == [3, 4, 7]


def test_log_frequency_counts_the_neighbours_pixels_and_one():
    fusion = make()
    pixels = fusion.labels[[1, 3]]
    counts = np.array([(pixels == s).sum() + 1 for s in (0, 2, 5)])
    np.testing.assert_allclose(fusion.log_frequency(2).flatten(), np.log(counts / counts.sum()), rtol=1e-5)


@pytest.mark.parametrize("z", [2, 3, 5, 8])
@pytest.mark.parametrize("interpolation", ["linear", "catmull-rom"])
def test_evidence_without_warps_is_the_softmax_of_interpolated_distances(z, interpolation):
    fusion = make(rho=17.0, interpolation=interpolation, clip_mm=0.4)
    left_out = z if z == 3 else None
    structures = fusion.structures(z, left_out)
    logits = sum(
        17.0 * weight * distances_brute_force(fusion.labels[a], structures, 0.4)
        for a, weight in fusion.atlases(z, left_out)
    )
    expected = logits - np.log(np.exp(logits).sum(axis=0))
    np.testing.assert_allclose(fusion.evidence(z, left_out), expected, atol=1e-4)


def test_rho_falls_with_the_spread():
    fusion = make()
    fusion.rho_scale = 6.0
    torch.testing.assert_close(fusion.evidence(2), make(rho=6.0 / 0.2).evidence(2))


@pytest.mark.parametrize("printed", [False, True])
def test_evidence_of_mixtures_is_equation_4(printed):
    fusion = make(fusion="printed" if printed else "normalised", sigma=30.0, alpha=2.0)
    fusion.images = fusion.images + np.random.default_rng(0).normal(0, 20, fusion.images.shape).astype(np.float32)
    structures, shares = [0, 2, 5], []
    for atlas in (1, 3):
        odds = np.exp(PAPER_RHO * distances_brute_force(fusion.labels[atlas], structures, 1.0))
        weight = np.exp(-2.0 * abs(POSITIONS[2] - POSITIONS[atlas]))
        weight = weight * stats.norm.pdf(fusion.images[2, 0], fusion.images[atlas, 0], 30.0)
        shares.append(weight * (odds if printed else odds / odds.sum(axis=0)))
    expected = sum(shares) / sum(shares).sum(axis=0)
    np.testing.assert_allclose(fusion.evidence(2).exp(), expected, atol=1e-4)


def test_evidence_is_uniform_where_no_atlas_reaches():
    fusion = make(rho=20.0)
    away = torch.zeros(1, 2, 24, 30)
    away[:, 1, :, 20:] = 99.0  # mm along x
    fields = {pair: away for z in range(8) for pair in ((z, z + 1), (z + 1, z))}
    fusion.warps = SectionWarps(fields, (24, 30), SPACING)
    found = fusion.evidence(2).exp()
    torch.testing.assert_close(found[:, :, 20:], torch.full((3, 24, 10), 1 / 3))
    torch.testing.assert_close(found[:, :, :20], make(rho=20.0).evidence(2).exp()[:, :, :20])


def test_truth_is_unknown_where_no_atlas_has_the_structure():
    fusion = make()
    assert torch.equal(
        as_indices(fusion, 1, [0, 2, 5]),
        torch.from_numpy(np.select([fusion.labels[1] == s for s in (0, 2, 5)], [0, 1, 2])),
    )
    lacking = as_indices(fusion, 1, [0, 5])
    assert torch.equal(lacking == -1, torch.from_numpy(fusion.labels[1] == 2))
    reordered = as_indices(fusion, 1, [5, 0])
    assert torch.equal(reordered[lacking >= 0], 1 - lacking[lacking >= 0])


def test_truth_of_the_largest_labels():
    """Ontologies number structures up to hundreds of millions."""
    fusion = make()
    fusion.labels = np.where(fusion.labels == 5, 2**31 - 1, fusion.labels).astype(np.int32)
    assert torch.equal(as_indices(fusion, 3, [0, 2**31 - 1]), torch.from_numpy(disc(7).astype(np.int64)))


def test_samples_lie_near_structures_that_are_known():
    fusion = make(clip_mm=0.2)
    pixels, truth = sample(fusion, 1, [0, 5], most=10**6)
    labels = fusion.labels[1].flatten()
    assert not (labels[pixels] == 2).any()
    np.testing.assert_array_equal(truth, np.where(labels[pixels] == 5, 1, 0))
    from_structures = ndimage.distance_transform_edt(fusion.labels[1] == 0, sampling=SPACING) - 0.025
    expected = (fusion.labels[1] == 5) | ((fusion.labels[1] == 0) & (from_structures < 0.2))
    np.testing.assert_array_equal(np.sort(pixels), np.flatnonzero(expected))
    few, _ = sample(fusion, 1, [0, 5], most=50)
    assert 50 <= len(few) <= 100


def test_inputs_name_what_the_evidence_rests_on():
    """Nothing of labelled sections that do not take part."""
    fusion = make(interpolation="linear")
    arrays = [p for p in fusion.inputs(2) if isinstance(p, np.ndarray)]
    for z, matters in [(1, True), (3, True), (4, False), (7, False)]:
        assert any(np.array_equal(fusion.labels[z], a) for a in arrays) == matters


@pytest.mark.parametrize("planted", [1.5, 6.0])
def test_fit_rho_finds_the_scale_by_which_labels_were_drawn(planted):
    """A straight border between two structures; labels drawn at each pixel with LogOdds 2 rho x."""
    rng = np.random.default_rng(0)
    height, width, n = 60, 80, 7
    border = np.broadcast_to(np.arange(width) >= 40, (height, width)).astype(int)
    positions = 0.1 * np.arange(n)
    fusion = SectionFusion(
        np.zeros((n, 1, height, width), np.float32),
        np.stack([border] * n),
        tuple(range(n)),
        positions,
        (0.01, 0.01),
        FusionOptions(interpolation="linear", label_flow=False),
    )
    fusion.distances = {z: make_distances(border) for z in range(n)}.__getitem__
    at = 0.01 * (np.arange(width) - 39.5)  # mm from the border
    drawn = []
    for z in range(n):
        odds = 2 * planted / fusion.spread(z) * at
        drawn.append((rng.random((height, width)) < 1 / (1 + np.exp(-odds))).astype(int))
    fusion.labels = np.stack(drawn)
    found, losses = fitted_rho(fusion)
    assert found == pytest.approx(planted, rel=0.1)
    assert len(losses) == n


def make_distances(border):
    """As `SectionFusion.distances` gives them, from clean labels."""
    return StructureDistances.of(border, (0.01, 0.01), FusionOptions().clip_mm)


def test_fit_rho_with_one_labelled_section_is_the_papers():
    fusion = make()
    fusion.labelled = (4,)
    assert fitted_rho(fusion) == (pytest.approx(PAPER_RHO * fusion.typical_spread()), [])


def moving(label_flow, warps=None):
    """A disc that goes right by 2 pixels a section, more than its radius from one labelled section to the next."""
    labels = np.stack([np.where(disc(5, (12, 8 + 2 * z)), 5, 0) for z in range(7)])
    options = FusionOptions(label_flow=label_flow)
    positions = 0.1 * np.arange(7)
    images = np.zeros((7, 1, *labels.shape[1:]), np.float32)
    return SectionFusion(images, labels, (0, 3, 6), positions, SPACING, options, warps=warps, rho_scale=6.0)


def right(fusion, z, **left_out):
    structures = np.asarray(fusion.structures(z, **left_out))
    found = structures[fusion.evidence(z, **left_out).argmax(dim=0).numpy()] == 5
    truth = fusion.labels[z] == 5
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def test_label_flow_follows_what_registration_does_not():
    with_flow, without = moving(True), moving(False)
    scores = np.array([[right(fusion, z) for fusion in (with_flow, without)] for z in (1, 2, 4, 5)])
    assert scores[:, 0].min() > 0.9
    assert scores[:, 0].mean() > scores[:, 1].mean() + 0.01


def test_label_flow_is_what_registration_leaves():
    """With warps that say where the disc goes nothing is left for the flow."""
    fields = {}
    for z in range(6):
        step = torch.zeros(1, 2, 24, 30)
        step[:, 1] = 2 * SPACING[1]
        fields[z, z + 1], fields[z + 1, z] = step, -step
    fusion = moving(True, SectionWarps(fields, (24, 30), SPACING))
    left = [f.abs().max() for f in (fusion.flow(0, 3), moving(True).flow(0, 3))]
    assert left[0] < 0.25 * left[1]


def test_flows_that_will_be_asked_for():
    fusion = moving(True)
    assert fusion.flow_pairs() == [(0, 3), (0, 6), (3, 6)]
    for z in range(7):
        fusion.evidence(z)
        fusion.evidence(z, left_out=z if z in fusion.labelled else None)
    assert set(fusion.flows) == set(fusion.flow_pairs())
    assert make(label_flow=True).flow_pairs() == [(1, 3), (1, 4), (3, 7), (4, 7)]  # nothing lies between 3 and 4
    assert moving(False).flow_pairs() == make(fusion="printed", label_flow=True).flow_pairs() == []


def test_beyond_the_last_labelled_section_there_is_no_flow():
    with_flow, without = make(rho=20.0, label_flow=True), make(rho=20.0)
    torch.testing.assert_close(with_flow.evidence(0), without.evidence(0))
    assert not with_flow.flows


def test_weights_along_and_off_the_flow_sum_to_one():
    for interpolation, rows in (("linear", 2), ("catmull-rom", 6)):
        distances, weights, covered = make(label_flow=True, interpolation=interpolation).blended_distances(2)
        assert len(distances) == len(weights) == len(covered) <= rows
        assert float(weights.sum()) == pytest.approx(1)


def test_inputs_hold_the_flow():
    fusion, without = moving(True), moving(False)
    assert len(fusion.inputs(1)) == len(without.inputs(1)) + 2
    assert any(np.array_equal(fusion.flow(0, 3).numpy(), a) for a in fusion.inputs(1) if isinstance(a, np.ndarray))


def test_change_is_what_differs_of_what_either_holds():
    """Discs of other sizes around one point, and another structure that each holds elsewhere."""
    fusion = make()
    first, second = fusion.labels[1], fusion.labels[4]
    expected = (first != second).sum() / ((first > 0) | (second > 0)).sum()
    assert 0 < expected < 1
    assert change(fusion, 1, 4) == pytest.approx(expected)
    assert change(fusion, 4, 1) == pytest.approx(expected)
    assert change(fusion, 3, 3) == 0
    assert set(changes(fusion)) == {(1, 3), (4, 7)}  # 3 and 4 have nothing between them
    fusion.labels[[1, 4]] = 0
    assert change(fusion, 1, 4) == 0


def test_change_is_seen_after_registration():
    """Section 4 is section 1 moved 3 pixels to the right: nothing changes once that is followed."""
    fusion = make()
    fusion.labels[4] = np.roll(fusion.labels[1], 3, axis=1)
    assert change(fusion, 1, 4) > 0.2
    right = torch.zeros(1, 2, 24, 30)
    right[:, 1] = 3 * SPACING[1]
    fusion.warps = SectionWarps({(1, 4): right, (4, 1): -right}, (24, 30), SPACING)
    assert change(fusion, 1, 4) == 0
    assert change(fusion, 4, 1) == 0


def test_labels_of_any_size_stay_themselves():
    fusion = make()
    fusion.labels[[1, 4]] = 2**31 - 1
    assert change(fusion, 1, 4) == 0
    fusion.labels[4] -= 1
    assert change(fusion, 1, 4) == 1


def many_structures(monkeypatch, tiles, **options):
    """Squares of 64 structures on 60 x 68 pixels, most of them on some atlases only, carried along a rough field."""
    monkeypatch.setattr(section_fusion, "MANY", 8 if tiles else 10**6)
    monkeypatch.setattr(section_fusion, "TILE", 16)
    generator = np.random.default_rng(0)
    y, x = np.indices((60, 68))
    squares = 1 + (y // 8) * 9 + x // 8
    labels = np.stack([np.where(np.isin(squares, generator.permutation(72)[:40]), squares, 0) for _ in range(9)])
    options = {"rho": 17.0, "clip_mm": 0.3, "label_flow": False} | options
    images = np.zeros((9, 1, 60, 68), np.float32)
    fusion = SectionFusion(images, labels, LABELLED, POSITIONS, SPACING, FusionOptions(**options))
    rough = torch.from_numpy(generator.normal(0, 0.25, (16, 1, 2, 5, 6))).float()
    rough[3, :, 1, :, -1] = 9.0  # points out of the section
    coarse = (SPACING[0] * 60 / 5, SPACING[1] * 68 / 6)
    fields = dict(zip([p for z in range(8) for p in ((z, z + 1), (z + 1, z))], rough, strict=True))
    fusion.warps = SectionWarps(fields, (60, 68), coarse)
    return fusion


@pytest.mark.parametrize("label_flow", [False, True])
@pytest.mark.parametrize(("z", "left_out"), [(2, None), (5, None), (8, None), (4, 4)])
def test_tiles_of_near_structures_say_what_all_structures_say(monkeypatch, z, left_out, label_flow):
    whole = many_structures(monkeypatch, tiles=False, label_flow=label_flow).evidence(z, left_out)
    fusion = many_structures(monkeypatch, tiles=True, label_flow=label_flow)
    found = fusion.tiled_evidence(z, left_out)
    assert len(found.tiles) == 20
    told_apart = [len(tile.near) for tile in found.tiles]
    assert max(told_apart) < 0.8 * len(fusion.structures(z, left_out)), told_apart
    torch.testing.assert_close(found.dense(), whole, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(found.dense().exp(), whole.exp(), rtol=1e-4, atol=1e-5)
    distances, weights, covered = fusion.blended_distances(z, left_out)  # not in tiles at all
    torch.testing.assert_close(whole, blend(distances, weights, covered, 17.0), rtol=1e-4, atol=1e-4)
    assert z == 8 or not covered.any(dim=0).all()  # there are pixels that no atlas reaches


def test_rho_is_fitted_on_tiles_as_on_the_whole(monkeypatch):
    whole, tiled = (fitted_rho(many_structures(monkeypatch, tiles, rho=0.0))[0] for tiles in (False, True))
    assert tiled == pytest.approx(whole, rel=2e-3)


def test_sections_lying_alike_are_not_sampled_anew(monkeypatch):
    """Without warps distances are read where they are, so that pixels as near to two structures stay so."""
    fusion = many_structures(monkeypatch, tiles=True, interpolation="linear")
    fusion.warps = None
    weights = fusion.blended_distances(5)[1]
    expected = [distances_brute_force(fusion.labels[a], fusion.structures(5), 0.3) for a, _ in fusion.atlases(5)]
    expected = 17.0 * sum(w * d for w, d in zip(weights.numpy(), expected, strict=True))
    log_p = fusion.evidence(5).numpy()
    np.testing.assert_allclose(log_p - log_p[0], expected - expected[0], atol=1e-4)


def test_structures_elsewhere_in_the_stack_cost_nothing(monkeypatch):
    """Hundreds of structures on a section that does not speak for this one: nothing about it is looked up."""
    fusion = many_structures(monkeypatch, tiles=True, interpolation="linear")
    fusion.labels[7] = np.arange(60 * 68).reshape(60, 68)
    seen = []
    monkeypatch.setattr(fusion, "distances", lambda z: seen.append(z) or fusion._distances(z))
    found = fusion.tiled_evidence(2)
    assert set(seen) == {1, 3}
    assert found.structures == len(np.union1d(fusion.labels[1], fusion.labels[3]))
