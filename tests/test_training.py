import math

import numpy as np
import pytest
import torch
from torch import nn

from limner.augmentation import Augmentation
from limner.training import Schedule, train, with_coordinates

STILL = Augmentation(rotation=0, translation=0, scaling=0, contrast=0, brightness=0)


def problem():
    """Two sections whose class is whether a pixel is bright."""
    images = torch.rand(2, 1, 12, 14, generator=torch.Generator().manual_seed(0))
    return images, (images[:, 0] > 0.5).long()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def trained(schedule, net=None, seed=0, augmentation=STILL, **options):
    net, (images, targets) = net or network(), problem()
    generator = torch.Generator().manual_seed(seed)
    losses = train(
        net, images, targets, schedule, lambda x, _chosen: x, generator, augmentation=augmentation, **options
    )
    return net, losses


def test_a_tiny_problem_is_learnt():
    net, losses = trained(Schedule(steps=300, rate=3e-2))
    images, targets = problem()
    assert losses[-1] < 0.2 * losses[0]
    assert (net(images).argmax(dim=1) == targets).float().mean() > 0.97
    assert not net.training


def test_first_loss_is_the_cross_entropy():
    net = network()
    images, targets = problem()
    expected = nn.functional.cross_entropy(net(images), targets).item()
    assert trained(Schedule(steps=1), net)[1] == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("steps", [1, 3, 10, 37])
def test_parts_of_a_schedule_add_up_to_it(steps):
    seen = []
    for part in ((0.0, 0.7), (0.7, 1.0)):
        trained(Schedule(steps, *part), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step + 1, steps) for step in range(steps)]


def test_rate_warms_up_and_falls_along_a_cosine():
    schedule = Schedule(steps=400, rate=2.0)
    assert schedule.rate_at(0) == pytest.approx(2 / 30)
    assert schedule.rate_at(14) == pytest.approx(0.5 * (1 + math.cos(math.pi * 14 / 400)))
    assert schedule.rate_at(200) == pytest.approx(1)
    assert schedule.rate_at(399) < 1e-3


def test_groups_scale_the_rate():
    """AdamW's first step is the rate for every weight that has a gradient."""
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    groups = [{"params": [*net[0].parameters()], "scale": 0.0}, {"params": [*net[2].parameters()], "scale": 2.0}]
    trained(Schedule(steps=1, rate=0.3, weight_decay=0.0), net, groups=groups)
    moved = [(p - b).abs().max().item() for p, b in zip(net.parameters(), before, strict=True)]
    assert moved == [0, 0, pytest.approx(0.02, rel=1e-3), pytest.approx(0.02, rel=1e-3)]


def test_seed_decides():
    schedule = Schedule(steps=5, batch=1)
    first, again, other = (trained(schedule, seed=seed, augmentation=Augmentation())[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_prepare_is_told_which_sections_it_gets():
    """Each section is even and tells its number; so does `chosen`."""
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 4, 4) / 10
    seen = []

    def prepare(x, chosen):
        torch.testing.assert_close(x[:, 0, 0, 0], chosen / 10)
        seen.append(chosen.tolist())
        return x

    targets = torch.zeros(5, 4, 4, dtype=torch.long)
    train(network(), images, targets, Schedule(steps=20, batch=3), prepare, torch.Generator(), augmentation=STILL)
    assert all(len(set(chosen)) == 3 for chosen in seen)
    assert {z for chosen in seen for z in chosen} == set(range(5))


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.0, 0.3), (0.3, 1.0)])
def test_the_first_half_of_the_schedule_sees_sections_of_half_the_size(part):
    """Of 13 x 14 pixels, in whichever parts the schedule is run."""
    images, sizes = torch.rand(2, 1, 13, 14), []
    targets = (images[:, 0] > 0.5).long()

    def prepare(x, _chosen):
        sizes.append(tuple(x.shape[2:]))
        return x

    train(network(), images, targets, Schedule(10, *part, halved=0.5), prepare, torch.Generator(), augmentation=STILL)
    expected = [(7, 7)] * 5 + [(13, 14)] * 5
    assert sizes == expected[round(10 * part[0]) : round(10 * part[1])]


def test_pixels_that_augmentation_left_unknown_do_not_count():
    """The loss is the mean over known pixels of each step, not over all."""
    images, targets = torch.zeros(1, 1, 20, 20), torch.zeros(1, 20, 20, dtype=torch.long)
    constant = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.zero_()
    far = Augmentation(rotation=0, translation=0.9, scaling=0, contrast=0, brightness=0)
    found = train(constant, images, targets, Schedule(steps=1), lambda x, _: x, torch.Generator(), augmentation=far)
    assert found == [pytest.approx(math.log(2))]


def test_coordinates_run_from_minus_1_to_1():
    found = with_coordinates(torch.zeros(3, 2, 5, 9), torch.tensor([2.0, 3.0, 6.0]), (2.0, 6.0))
    assert found.shape == (3, 5, 5, 9)
    np.testing.assert_allclose(found[0, 2, :, 4], [-1, -0.5, 0, 0.5, 1])
    np.testing.assert_allclose(found[0, 3, 2], np.linspace(-1, 1, 9), atol=1e-6)
    np.testing.assert_allclose(found[:, 4, 1, 1], [-1, -0.5, 1])
    assert torch.isfinite(with_coordinates(torch.zeros(1, 1, 1, 1), torch.tensor([2.0]), (2.0, 2.0))).all()
