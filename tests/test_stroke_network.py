from dataclasses import replace

import numpy as np
import pytest
import torch

from limner.scribble_settings import Settings
from limner.stroke_network import (
    LabelledVolume,
    Model,
    build,
    fit,
    from_model,
    in_order,
    learn,
    own_scores,
    to_model,
    train_on_strokes,
)
from limner.working_grid import Grid

QUICK = Settings(fields=2, steps=30, batch=2, learning_steps=60, rate=1e-2)
DRAWN = (4, 10, 16)


@pytest.mark.parametrize("metric_learning", [False, True])
def test_learns_to_tell_pixels_apart(metric_learning):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=draw)
    angle = 2 * labels + 0.3 * torch.randn(600, generator=draw)
    features = torch.stack([5 * angle.cos(), 5 * angle.sin(), 1e3 + torch.randn(600, generator=draw)], dim=1)
    learned = learn([(features, labels)], 3, replace(QUICK, metric_learning=metric_learning, learning_steps=200))
    heat = learned(features.T[None, :, :, None])[0, :, :, 0]
    assert (heat.argmax(dim=0) == labels).float().mean() > 0.95
    torch.testing.assert_close(heat.sum(dim=0), torch.ones(600))


@pytest.mark.parametrize("metric_learning", [False, True])
def test_strokes_correct_the_network_where_it_errs_and_keep_the_rest(metric_learning):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (4000,), generator=draw)
    odd = torch.arange(4000) % 8 == 0  # the network takes these for the other class
    said = torch.where(odd, 1 - labels, labels)
    scores = torch.stack([4.0 * (said == 1), 4.0 * (said == 0)], dim=1)  # of class 1 first
    features = torch.cat([odd[:, None].float(), scores + 0.1 * torch.randn(4000, 2, generator=draw)], dim=1)
    settings = replace(QUICK, metric_learning=metric_learning, learning_steps=200)
    drawn, known = slice(0, 400), slice(400, 2000)
    groups = [(features[drawn], labels[drawn]), (features[known], labels[known])]
    heat = learn(groups, 2, settings, own=(2, 1))(features[2000:].T[None, :, :, None])[0, :, :, 0]
    right = heat.argmax(dim=0) == labels[2000:]
    assert right[odd[2000:]].float().mean() > 0.95
    assert right[~odd[2000:]].float().mean() > 0.95


def test_heat_maps_are_those_of_each_pixel_alone():
    draw = torch.Generator().manual_seed(1)
    learned = learn([(torch.randn(60, 6, generator=draw), torch.arange(60) % 4)], 4, QUICK)
    features = torch.randn(2, 6, 7, 9, generator=draw)
    maps = learned(features)
    assert maps.shape == (2, 4, 7, 9)
    assert not maps.requires_grad
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 7, 9))
    torch.testing.assert_close(maps[1, :, 3, 8], learned(features[1, :, 3, 8].view(1, 6, 1, 1)).flatten())


def test_before_any_learning_the_heat_map_is_the_networks_own():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 2
    learned = learn([(features, labels)], 2, replace(QUICK, learning_steps=0), own=(3, 2))
    expected = torch.softmax(features[:, [3, 2]], dim=1).T
    torch.testing.assert_close(learned(features.T[None, :, :, None])[0, :, :, 0], expected)


def test_a_network_learns_strokes_where_the_walker_is_sure_of_nothing(phantom, strokes_on):
    images, labels = phantom()
    grid = Grid.of(images, None)
    strokes = strokes_on(images, labels, [1])
    marks = grid.marks(strokes)
    unsure = np.full((2, *marks.shape), 0.5, np.float32)
    network = train_on_strokes(grid, marks, unsure, QUICK, "cpu", lambda *_: None)
    with torch.no_grad():
        logits = network(grid.inputs(list(DRAWN), located=True))
    found = logits.argmax(dim=1).numpy() + 1
    drawn = marks[list(DRAWN)]
    assert (found[drawn > 0] == drawn[drawn > 0]).mean() > 0.8


def test_refuses_volumes_without_an_organ(phantom):
    images, labels = phantom()
    with pytest.raises(ValueError, match="no organ is labelled"):
        fit([LabelledVolume(images, np.zeros_like(labels))], QUICK)


def test_organs_are_numbered_in_the_order_of_names_where_all_names_match():
    labels = torch.tensor([0, 1, 1, 2, 3])
    model = Model(build(QUICK, 4, 1), QUICK, 4, 50.0, torch.zeros(5, 3), labels, ("Heart", "Liver", "Gut"))
    ordered = in_order(model, ("gut", "heart", "liver"))
    assert (ordered.labels.tolist(), ordered.names) == ([0, 2, 2, 3, 1], ("gut", "heart", "liver"))
    assert own_scores(model, ("gut", "heart", "liver")) == (-4, -1, -3, -2)
    assert own_scores(model, ("organ 1", "organ 2", "organ 3")) == (-4, -3, -2, -1)
    assert in_order(model, ("heart", "liver", "gut")).labels.tolist() == labels.tolist()
    for others in (("organ 1", "organ 2", "organ 3"), ("gut", "heart"), ("gut", "heart", "heart")):
        assert in_order(model, others) is model
    assert in_order(replace(model, names=("gut", "gut", "heart")), ("gut", "heart", "gut")).labels is labels


def test_refuses_a_model_of_another_architecture(phantom):
    images, labels = phantom()
    file = to_model(fit([LabelledVolume(images, labels)], replace(QUICK, steps=1))[0], {})
    for settings in (
        {**file.settings, "architecture": 1},
        {k: v for k, v in file.settings.items() if k != "architecture"},
    ):
        with pytest.raises(ValueError, match="earlier version of Limner; train it anew"):
            from_model(replace(file, settings=settings))
