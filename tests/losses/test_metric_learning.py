import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.losses.metric_learning import (
    generalised_logistic,
    metric_learning_loss,
    pair_loss,
    sample_pairs,
    weight_loss,
)
from limner.networks.embedding import HeatMapHead


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("beta", [0.5, 1.0, 10.0])
def test_generalised_logistic(beta):
    z = [-3.0, 0.0, 0.7, 4.0]
    expected = [math.log(1 + math.exp(beta * v)) / beta for v in z]
    torch.testing.assert_close(generalised_logistic(torch.tensor(z), beta), torch.tensor(expected))
    assert generalised_logistic(torch.tensor([1e4, -1e4]), beta).tolist() == [1e4, 0]


def test_pair_loss_in_loops():
    first, second = torch.randn(2, 20, 3, generator=seeded())
    same = torch.rand(20, generator=seeded(1)) < 0.5
    total = 0.0
    for a, b, alike in zip(first.tolist(), second.tolist(), same.tolist(), strict=True):
        d2 = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        z = 1 - (1 if alike else -1) * (3.0 - d2)
        total += math.log(1 + math.exp(2.0 * z)) / 2.0
    assert float(pair_loss(first, second, same, tau=3.0, beta=2.0)) == pytest.approx(total / 20 / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("distance", "alike", "pull"), [(0.5, True, 0), (1.5, True, 1), (1.5, False, -1), (3, False, 0)]
)
def test_only_pairs_on_the_wrong_side_of_their_margin_move(distance, alike, pull):
    """With a sharp g and tau 3: up to squared distance 2 for one class, from 4 on for two; the gradient is d or 0."""
    first = torch.zeros(1, 1, dtype=torch.float64)
    second = torch.full((1, 1), float(distance), dtype=torch.float64, requires_grad=True)
    pair_loss(first, second, torch.tensor([alike]), tau=3.0, beta=200.0).backward()
    assert float(second.grad) == pytest.approx(pull * distance, abs=1e-6)


def test_gradient_of_the_loss():
    layer = nn.Linear(3, 2).double()
    pixels = torch.randn(2, 8, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    same = torch.arange(8) % 2 == 0

    def loss(pixels, *_):
        return metric_learning_loss(layer(pixels[0]), layer(pixels[1]), same, [layer], tau=1.5, beta=3.0, lam=0.2)

    assert torch.autograd.gradcheck(loss, (pixels, layer.weight, layer.bias))


def test_loss_of_the_weights_by_hand():
    layers = [nn.Linear(2, 1), nn.Linear(1, 1)]
    with torch.no_grad():
        for layer, values in zip(layers, [(1.0, 2.0, 3.0), (4.0, 5.0)], strict=True):
            layer.weight.copy_(torch.tensor([values[:-1]]))
            layer.bias.fill_(values[-1])
    assert weight_loss(layers).item() == (1 + 4 + 9 + 16 + 25) / 2
    first, second = torch.randn(2, 5, 1, generator=seeded())
    same = torch.tensor([True, False, True, False, False])
    found = metric_learning_loss(first, second, same, layers, lam=0.1)
    torch.testing.assert_close(found, pair_loss(first, second, same) + 2.75)


@pytest.fixture
def unequal_classes():
    """600, 30 and 3 pixels, in no order."""
    labels = torch.tensor([2] * 600 + [5] * 30 + [9] * 3)
    return labels[torch.randperm(len(labels), generator=seeded())]


def test_pairs_are_balanced_whatever_the_classes_sizes(unequal_classes):
    first, second, same = sample_pairs(unequal_classes, 6000, seeded())
    a, b = unequal_classes[first], unequal_classes[second]
    assert torch.equal(a == b, same)
    assert int(same.sum()) == 3000
    for label in (2, 5, 9):
        assert int((a[same] == label).sum()) == pytest.approx(1000, abs=120)
    for one in (2, 5, 9):
        for other in {2, 5, 9} - {one}:
            assert int(((a == one) & (b == other)).sum()) == pytest.approx(500, abs=90)
    assert 1400 < int(same[:3000].sum()) < 1600  # in any part of them, too


def test_every_pixel_of_a_class_is_as_likely_and_none_is_paired_with_itself(unequal_classes):
    first, second, same = sample_pairs(unequal_classes, 60000, seeded())
    assert (first != second).all()
    few = torch.nonzero(unequal_classes == 5)[:, 0]
    for chosen in (first[same], second[same], first[~same], second[~same]):
        counts = torch.bincount(chosen, minlength=633)[few]
        assert counts.min() > 0.75 * counts.float().mean()
        assert counts.max() < 1.25 * counts.float().mean()
    assert len(torch.unique(first)) > 600  # of the large class most


def test_a_class_of_one_pixel_is_paired_with_itself():
    first, second, same = sample_pairs(torch.tensor([1, 0, 0]), 40, seeded())
    alone = same & (first == 0)
    assert alone.any()
    assert (second[alone] == 0).all()


def test_pairs_are_seeded_and_never_listed():
    """All pairs of 300,000 pixels would not fit into memory."""
    labels = (torch.arange(300_000) % 3 == 0).long()
    one, again, other = (sample_pairs(labels, 64, seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


def test_one_class_has_no_pairs():
    with pytest.raises(ValueError, match=r"sample_pairs\(\): there are pixels of 1 class"):
        sample_pairs(torch.ones(5, dtype=torch.long), 4, seeded())


def rings(n, seed):
    """A disc and the ring around it: no line tells them apart."""
    angle, radius = 2 * math.pi * torch.rand(n, generator=seeded(seed)), torch.rand(n, generator=seeded(seed + 1))
    labels = torch.arange(n) % 2
    radius = 0.6 * radius + labels * 0.8
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1), labels


def trained_linear(layer, pixels, labels):
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(layer(pixels), labels).backward()
        optimiser.step()
    return layer


def test_an_embedding_separates_what_a_linear_layer_does_not():
    torch.manual_seed(0)
    pixels, labels = rings(400, seed=0)
    unseen, truth = rings(400, seed=10)
    head = HeatMapHead(n_features=2, n_classes=2, widths=(16, 4))
    layers = list(head.embedding.layers)
    optimiser = torch.optim.Adam(head.embedding.parameters(), lr=0.01)
    pairs = sample_pairs(labels, 200 * 64, seeded())
    losses = []
    for first, second, same in zip(*(p.split(64) for p in pairs), strict=True):
        optimiser.zero_grad()
        loss = metric_learning_loss(head.embedding(pixels[first]), head.embedding(pixels[second]), same, layers)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    trained_linear(head.discriminating, head.embedding(pixels).detach(), labels)
    linear = trained_linear(nn.Linear(2, 2), pixels, labels)
    with torch.no_grad():
        assert (linear(unseen).argmax(1) == truth).float().mean() < 0.7
        assert (head(unseen).argmax(1) == truth).float().mean() > 0.97
