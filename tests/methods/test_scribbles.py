import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from limner.annotations import Scribbles
from limner.graph_cut import CutOptions
from limner.methods.scribbles import USUAL_GAMMA, Session, choose_cut, segment, suggest_sections, walker_options
from limner.model_file import read_model
from limner.run_record import Store
from limner.scribble_settings import Settings
from limner.space import Space
from limner.stroke_network import LabelledVolume, fit, from_model, to_model
from limner.volume import Label, Volume
from limner.working_grid import Grid

QUICK = Settings(fields=2, steps=30, batch=2, learning_steps=60, rate=1e-2)
DRAWN = (4, 10, 16)


def _iou(found, truth):
    return (found & truth).sum() / (found | truth).sum()


@pytest.mark.parametrize("rgb", [False, True])
def test_two_organs_come_out_better_than_by_the_nearest_stroke(rgb, phantom, strokes_on):
    images, labels = phantom(rgb)
    strokes = strokes_on(images, labels, [1, 2])
    result = segment(images, strokes, Settings())
    marks = np.where(strokes.weights > 0, strokes.label_map.labels + 1, 0)
    nearest = ndimage.distance_transform_edt(
        marks == 0, images.space.spacing, return_distances=False, return_indices=True
    )
    by_distance = marks[tuple(nearest)] - 1
    for organ in (1, 2):
        assert _iou(result.labels.labels == organ, labels == organ) > 0.75
        assert _iou(result.labels.labels == organ, labels == organ) > 0.1 + _iou(by_distance == organ, labels == organ)


def test_a_result_agrees_with_itself(phantom, strokes_on):
    images, labels = phantom()
    strokes = strokes_on(images, labels, [1, 2])
    result = segment(images, strokes, Settings(gamma=1.0))
    marked = strokes.weights > 0
    np.testing.assert_array_equal(result.labels.labels[marked], strokes.label_map.labels[marked])
    np.testing.assert_allclose(np.sum(result.heat_maps, axis=0), 1, atol=1e-5)
    uncertainty = np.asarray(result.uncertainty)
    assert (uncertainty[marked] == 0).all()
    assert 0 <= uncertainty.min() <= uncertainty.max() <= 1
    wrong = (result.labels.labels != labels) & ~marked
    right = (result.labels.labels == labels) & ~marked
    assert uncertainty[wrong].mean() > 1.5 * uncertainty[right].mean()
    for organ in result.organs:
        voxels = (result.labels.labels == organ.label).sum()
        assert organ.volume_mm3 == pytest.approx(voxels * 0.1 * 0.05 * 0.05)
        assert organ.interval_mm3[0] <= organ.volume_mm3 <= organ.interval_mm3[1]
    assert (result.cut, result.chosen) == (CutOptions(1.0, 10.0, 0.1), {})
    grid = Grid.of(images, None)
    assert result.walker == walker_options(grid, grid.marks(strokes), Settings(), 0.0)


def test_a_larger_gamma_gives_a_smoother_surface(phantom, strokes_on):
    images, labels = phantom()
    strokes = strokes_on(images, labels, [1])

    def surface(gamma):
        organ = segment(images, strokes, Settings(gamma=gamma)).labels.labels == 1
        return sum(int((np.diff(organ, axis=axis)).sum()) for axis in range(3))

    assert surface(3.0) < surface(0.0)


def test_gamma_is_the_one_at_which_left_out_strokes_come_out_right(phantom, strokes_on):
    images, labels = phantom()
    strokes = strokes_on(images, labels, [1])
    session = Session.open(images, Settings())
    marks = session.grid.marks(strokes)
    options, right = choose_cut(session, marks, None, CutOptions())
    assert set(right) == {"0", "0.3", "1", "3"}
    assert right[f"{options.gamma:g}"] == pytest.approx(max(right.values()), abs=1e-3)
    assert all(0.5 < share <= 1 for share in right.values())
    result = session.segment(strokes)
    assert (result.cut, result.chosen) == (options, right)


def test_strokes_may_be_drawn_on_one_section_only(phantom, strokes_on):
    images, labels = phantom()
    result = segment(images, strokes_on(images, labels, [1], drawn=(10,)), Settings())
    assert result.cut.gamma == USUAL_GAMMA  # no section can be left out
    assert _iou(result.labels.labels[10] == 1, labels[10] == 1) > 0.7


def test_more_strokes_redo_neither_network_nor_features(tmp_path, phantom, strokes_on):
    images, labels = phantom()
    settings = replace(QUICK, prior_weight=0.1)
    first = segment(images, strokes_on(images, labels, [1]), settings, store=Store(tmp_path))
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len([name for name in kept if name.startswith("features-")]) == 20
    more = strokes_on(images, labels, [1], drawn=(2, *DRAWN), seed=5)
    second = segment(images, more, settings, store=Store(tmp_path))
    now = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert now == kept
    assert second.notes[0].startswith("gamma was chosen when 3 sections were drawn on, now there are 4")
    again = segment(images, more, settings, store=Store(tmp_path))  # all from what is kept
    np.testing.assert_array_equal(again.labels.labels, second.labels.labels)
    assert (np.asarray(first.heat_maps) != np.asarray(second.heat_maps)).any()


def test_a_session_gives_the_heat_map_of_one_section_as_of_all(phantom, strokes_on):
    images, labels = phantom()
    strokes = strokes_on(images, labels, [1])
    session = Session.open(images, replace(QUICK, prior_weight=0.1))
    np.testing.assert_allclose(session.heat_maps(strokes)[:, 7], session.heat_map(strokes, 7), atol=1e-6)


def test_a_model_of_other_volumes_finds_the_organ_far_from_strokes(tmp_path, phantom, strokes_on):
    volumes = []
    for seed in (1, 2):
        images, labels = phantom(seed=seed)
        volumes.append(LabelledVolume(images, (labels == 2).astype(np.uint8)))
    model, losses = fit(volumes, replace(QUICK, steps=60))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    path = tmp_path / "model.safetensors"
    to_model(model, {}).write(path)
    again = from_model(read_model(path, "scribbles"))
    images, labels = phantom()
    strokes = strokes_on(images, labels, [2], drawn=(4,))
    with_model = segment(images, strokes, Settings(gamma=0.3), again)
    alone = segment(images, strokes, Settings(gamma=0.3))
    assert _iou(with_model.labels.labels == 1, labels == 2) > 0.1 + _iou(alone.labels.labels == 1, labels == 2)
    np.testing.assert_array_equal(with_model.heat_maps, segment(images, strokes, Settings(gamma=0.3), model).heat_maps)


def test_a_coarser_grid_gives_labels_of_full_size_and_thick_organs_the_same(phantom, strokes_on):
    images, labels = phantom(shape=(20, 80, 96))
    strokes = strokes_on(images, labels, [1])
    coarse = segment(images, strokes, Settings(working_um=100.0, gamma=0.3))
    found, marked = coarse.labels.labels, strokes.weights > 0
    assert (found.shape, found.dtype) == (labels.shape, np.uint8)
    assert _iou(found == 1, labels == 1) > 0.75
    np.testing.assert_array_equal(found[marked], strokes.label_map.labels[marked])
    heat, uncertainty = np.asarray(coarse.heat_maps), np.asarray(coarse.uncertainty)
    assert (uncertainty[marked] == 0).all()
    np.testing.assert_allclose(uncertainty[~marked], 1 - np.where(found == 1, *heat[::-1])[~marked], atol=1e-6)
    voxels = [(found == 1).sum(), ((found == 1) & (heat[1] >= 0.75)).sum(), ((found == 1) | (heat[1] >= 0.25)).sum()]
    (organ,) = coarse.organs
    assert [organ.volume_mm3, *organ.interval_mm3] == pytest.approx([n * 0.1 * 0.05 * 0.05 for n in voxels])


def test_walkers_hardly_cross_edges_where_drawn_sections_are_far_apart(phantom, strokes_on):
    images, labels = phantom()
    grid = Grid.of(images, None)
    near = walker_options(grid, grid.marks(strokes_on(images, labels, [1], drawn=(9, 10))), Settings(), 0.0)
    far = walker_options(grid, grid.marks(strokes_on(images, labels, [1], drawn=(4, 14))), Settings(), 0.0)
    assert near.delta == pytest.approx(0.05)  # a gap of one section, two pixels: 0.1, at most 0.05
    assert far.delta == pytest.approx(0.4 / 20**2)
    assert near.contrast == far.contrast > 1


def test_suggests_uncertain_sections_apart_from_each_other_and_from_drawn_ones():
    uncertainty = np.zeros(40)
    uncertainty[[10, 11, 20, 30, 31, 5]] = 0.9, 0.95, 0.5, 0.3, 0.2, 0.8
    assert suggest_sections(uncertainty.tolist(), (6,)) == (11, 20, 30)


def test_refuses_what_cannot_be(phantom, strokes_on):
    images, labels = phantom()
    strokes = strokes_on(images, labels, [1])
    other, _ = phantom(shape=(20, 40, 50))
    with pytest.raises(ValueError, match=r"strokes have shape \(20, 40, 48\), images \(20, 40, 50\)"):
        segment(other, strokes, Settings())
    with pytest.raises(ValueError, match="--gamma: -1 is not possible; give 0 or more"):
        segment(images, strokes, Settings(gamma=-1))
    with pytest.raises(ValueError, match="--working-um: 10 um is finer than the images"):
        segment(images, strokes, Settings(working_um=10))
    model, _ = fit([LabelledVolume(images, (labels == 1).astype(np.uint8))], replace(QUICK, steps=2))
    rgb, _ = phantom(rgb=True)
    with pytest.raises(ValueError, match="the model is for grey sections, the images are RGB"):
        segment(rgb, strokes, Settings(), model)


def test_an_organ_may_be_taken_away_in_a_session(phantom, strokes_on):
    images, labels = phantom()
    session = Session.open(images, replace(QUICK, prior_weight=0.1, gamma=0.3))
    session.segment(strokes_on(images, labels, [1, 2]))
    assert session.segment(strokes_on(images, labels, [1])).labels.labels.max() == 1


def test_a_network_of_strokes_is_trained_anew_for_other_organs(tmp_path, phantom, strokes_on):
    images, labels = phantom()
    settings, store = replace(QUICK, prior_weight=0.1, gamma=0.3), Store(tmp_path)
    session = Session.open(images, settings, store=store)
    session.heat_maps(strokes_on(images, labels, [1]))
    for organs in ([1, 2], [2]):
        drawn = strokes_on(images, labels, organs)
        fresh = Session.open(images, settings).heat_maps(drawn).argmax(axis=0)
        for found in (session, Session.open(images, settings, store=store)):
            same = found.heat_maps(drawn).argmax(axis=0) == fresh
            assert same[(fresh > 0) | (labels > 0)].mean() > 0.9  # the walker, whose sure voxels count, goes on


def test_says_when_a_model_knows_other_organs(phantom, strokes_on):
    images, labels = phantom()
    model, _ = fit([LabelledVolume(images, labels)], replace(QUICK, steps=5))
    notes = segment(images, strokes_on(images, labels, [1]), Settings(gamma=0.3), model).notes
    assert notes == (
        "The model knows 2 organs, the strokes 1: only its features are used, not what it has learnt of its organs.",
    )


def test_a_model_s_organs_are_found_by_their_names(phantom, strokes_on):
    images, labels = phantom()
    model, _ = fit([LabelledVolume(images, labels)], replace(QUICK, steps=120, rate=3e-3))
    strokes = strokes_on(images, labels, [1, 2])
    table = {1: Label("Heart", (255, 0, 0)), 2: Label("Liver", (0, 0, 255))}
    named = Scribbles(replace(strokes.label_map, table=table), strokes.weights)
    order = torch.tensor([0, 2, 1])
    network = copy.deepcopy(model.network)
    network.head.weight.data, network.head.bias.data = network.head.weight[order], network.head.bias[order]
    features = torch.cat([model.features[:, :-3], model.features[:, -3:][:, order]], dim=1)
    swapped = replace(model, network=network, features=features, labels=order[model.labels])

    def found(model, *names):  # hardly anything is learnt of the strokes: what the network says
        session = Session.open(images, Settings(learning_steps=1), replace(model, names=names))
        return session.heat_maps(named).argmax(axis=0)

    as_drawn = found(model, "Heart", "Liver")
    organs = as_drawn > 0
    assert organs[labels > 0].mean() > 0.5
    assert (found(swapped, "liver", "heart") == as_drawn).mean() > 0.99
    assert (found(swapped) == as_drawn)[organs].mean() < 0.1


def test_a_volume_a_little_coarser_than_the_model_is_taken_as_it_is(phantom):
    images, labels = phantom()
    model, _ = fit([LabelledVolume(images, (labels == 1).astype(np.uint8))], replace(QUICK, steps=2))
    coarser = Space(images.space.shape, (0.1, 0.07, 0.07))
    assert Session.open(Volume(images.pixels, coarser), Settings(), model).grid.factor == 1
    with pytest.raises(ValueError, match="the model works at 50 um a pixel, the images at 100"):
        Session.open(Volume(images.pixels, Space(images.space.shape, (0.1, 0.1, 0.1))), Settings(), model)
