import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import limner.pixel_classifier as pixel_classifier
from limner.augmentation import Augmentation
from limner.networks.fcn_vgg import IMAGENET_DEVIATION, IMAGENET_MEAN, FCN8s
from limner.pixel_classifier import (
    ClassifierOptions,
    PixelClassifier,
    enlarged_window,
    make_classifier,
    network_log_probabilities,
    train_globally,
)

LABELLED = (0, 2, 5)
POSITIONS = np.array([0.0, 0.1, 0.2, 0.5, 0.6, 1.0])


def make(tissues=None, channels=1, **options) -> PixelClassifier:
    """Six sections; the labelled ones hold 0, 4 and 9."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (6, channels, 40, 60)).astype(np.float32)
    labels = np.zeros((6, 40, 60), np.int32)
    labels[:, 10:30, 10:30] = 4
    labels[:, 20:, 30:] = 9
    labels[[1, 3, 4]] = 77  # not labelled: never a class
    return make_classifier(
        images, labels, LABELLED, POSITIONS, ClassifierOptions(**{"network_pixels": 30, **options}), tissues
    )


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def test_classes_are_what_the_labelled_sections_hold():
    assert make().classes == [0, 4, 9]


def test_sections_are_reduced_to_the_longer_side():
    classifier = make()
    assert classifier.images.shape == (6, 1, 20, 30)
    assert 0 <= classifier.images.min() < classifier.images.max() <= 1
    assert classifier.labels.shape == (6, 20, 30)
    np.testing.assert_array_equal(classifier.labels[0, 5:15, 5:15], 4)
    assert make(network_pixels=500).images.shape == (6, 1, 40, 60)  # never enlarged


def test_targets_are_indices_of_structures_and_unknown_elsewhere():
    classifier = make()
    found = classifier.targets(2, [9, 0])
    np.testing.assert_array_equal(found, np.select([classifier.labels[2] == 9, classifier.labels[2] == 0], [0, 1], -1))


@pytest.mark.parametrize("structures", [[0, 4, 9], [0, 9], [9, 4]])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_top_keeps_the_outputs_of_the_chosen_structures(generator, structures, layers):
    classifier = make(trained_layers=layers)
    classifier.network.eval()
    images = classifier.images[[2, 3]]
    with torch.no_grad():
        whole = classifier.network(classifier.input(images, [2, 3]))
        logits = classifier.top(structures, generator)(classifier.fixed(images, [2, 3]))
    torch.testing.assert_close(logits, whole[:, [[0, 4, 9].index(s) for s in structures]])


def test_top_begins_anew_where_a_structure_is_unknown(generator):
    top = make().top([0, 4, 50], generator)
    assert isinstance(top, nn.Conv2d)
    assert top.out_channels == 3
    assert not top.bias.any()
    again = make().top([0, 4, 50], torch.Generator().manual_seed(3))
    assert torch.equal(top.weight, again.weight)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_moving_a_top_leaves_the_network_alone(generator, layers):
    classifier = make(trained_layers=layers)
    before = {name: weight.copy() for name, weight in classifier.to_arrays().items()}
    top = classifier.top([0, 4, 9], generator)
    with torch.no_grad():
        for parameter in top.parameters():
            parameter += 1
    for name, weight in classifier.to_arrays().items():
        np.testing.assert_array_equal(weight, before[name])


def test_coordinates_are_those_of_the_section():
    """Position 0.2 of 0 to 1 mm is -0.6 of -1 to 1."""
    classifier = make(channels=3)
    found = classifier.input(classifier.images[[2, 5]], [2, 5])
    assert found.shape == (2, 6, 20, 30)
    torch.testing.assert_close(found[:, :3], classifier.images[[2, 5]])
    torch.testing.assert_close(found[:, 5, 7, 7], torch.tensor([-0.6, 1.0]))
    torch.testing.assert_close(found[0, 3, [0, -1], 4], torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(found[0, 4, 4, [0, -1]], torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("channels", [1, 3])
def test_vgg_sees_what_its_weights_were_trained_on(channels):
    classifier = make(channels=channels)
    classifier.network = FCN8s(3, fc_width=8)
    found = classifier.input(classifier.images[[1]], [1])
    expected = (classifier.images[1].numpy() - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(
        IMAGENET_DEVIATION, (3, 1, 1)
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_top_of_fcn_is_the_whole_network_with_new_scores(generator):
    classifier = make()
    classifier.network = FCN8s(3, fc_width=8)
    top = classifier.top([0, 9], generator)
    assert isinstance(top, FCN8s)
    assert top is not classifier.network
    assert top(classifier.fixed(classifier.images[[1]], [1])).shape == (1, 2, 20, 30)
    assert classifier.network.score_conv7.out_channels == 3


def test_log_probabilities_are_normalised(generator):
    classifier = make()
    top, inputs = classifier.top([0, 4, 9], generator), classifier.fixed(classifier.images[[0]], [0])
    with torch.no_grad():
        found, logits = network_log_probabilities(top, inputs), top(inputs)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones_like(found[:, 0]))
    torch.testing.assert_close(found, logits.log_softmax(dim=1))


@pytest.mark.parametrize("shape", [(7, 9), (15, 9), (40, 61)])
@pytest.mark.parametrize("window", [(slice(0, 7), slice(0, 9)), (slice(3, 4), slice(6, 9)), (slice(2, 6), slice(0, 2))])
def test_a_window_of_enlarged_values_is_that_of_the_whole(generator, shape, window):
    values = torch.randn(3, 7, 9, generator=generator)
    whole = F.interpolate(values[None], size=shape, mode="bilinear", align_corners=False)[0]
    last = tuple(slice(n - (s.stop - s.start), n) for n, s in zip(shape, window, strict=True))
    for rows, columns in (window, last):
        found = enlarged_window(values, shape, rows, columns)
        torch.testing.assert_close(found, whole[:, rows, columns], rtol=0, atol=1e-5)


def test_weights_round_trip():
    first, second = make(), make(seed=5)
    second.load(first.to_arrays())
    inputs = first.input(first.images, range(6))
    with torch.no_grad():
        torch.testing.assert_close(first.network.eval()(inputs), second.network(inputs))
    assert not second.network.training


def test_seed_decides_the_weights():
    same, other = make(), make(seed=1)
    assert all(
        np.array_equal(a, b) for a, b in zip(make().to_arrays().values(), same.to_arrays().values(), strict=True)
    )
    assert not np.array_equal(same.to_arrays()["head.weight"], other.to_arrays()["head.weight"])


def spied_targets(monkeypatch, classifier, tissues=None, part=(0.0, 1.0)):
    """What `train_globally` hands to `train`: its targets and schedule."""
    seen = {}

    def train(_network, images, targets, schedule, prepare, _generator, *, groups, augmentation, **_):
        seen.update(
            augmentation=augmentation,
            targets=targets,
            schedule=schedule,
            groups=groups,
            prepared=prepare(images[:1], torch.tensor([1])),
        )

    monkeypatch.setattr(pixel_classifier, "train", train)
    train_globally(classifier, LABELLED, part, tissues, lambda *_: None)
    return seen


def test_global_training_takes_the_labelled_sections(monkeypatch):
    classifier = make(training_steps=30, placement=0.5)
    seen = spied_targets(monkeypatch, classifier)
    labels = classifier.labels[list(LABELLED)]
    np.testing.assert_array_equal(seen["targets"], np.select([labels == 4, labels == 9], [1, 2]))
    assert seen["schedule"].steps == 30
    assert seen["augmentation"] == Augmentation(rotation=5, translation=0.025, scaling=0.05)
    assert seen["groups"] is None
    torch.testing.assert_close(seen["prepared"][0, 3, 0, 0], torch.tensor(-0.6))  # the second labelled section is 2


def test_global_training_with_tissues(monkeypatch):
    """Structures 4 and 9 are of tissue 6 and 2; an ontology may name tissues that the stack lacks."""
    tissues = {4: 6, 9: 2, 30: 3}
    classifier = make(tissues)
    assert classifier.classes == []
    seen = spied_targets(monkeypatch, classifier, tissues)
    labels = classifier.labels[list(LABELLED)]
    np.testing.assert_array_equal(seen["targets"], np.select([labels == 4, labels == 9], [3, 1]))
    assert classifier.network.head.out_channels == 4  # 0, 2, 3, 6


def test_late_layers_of_fcn_learn_faster(monkeypatch):
    classifier = make()
    classifier.network = FCN8s(3, fc_width=8)
    groups = spied_targets(monkeypatch, classifier)["groups"]
    assert [group["scale"] for group in groups] == [1.0, 20.0]
    assert sum(len(group["params"]) for group in groups) == len(list(classifier.network.parameters()))
