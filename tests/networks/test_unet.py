import pytest
import torch
from torch.nn import functional as F

from limner.networks.unet import UNet


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(n_classes=5, in_channels=3, widths=(8, 16, 24))


def noise(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (21, 30), (16, 64), (33, 17)])
def test_output_has_the_size_of_the_input(network, shape):
    with torch.no_grad():
        assert network(noise(2, 3, *shape)).shape == (2, 5, *shape)
        assert network.features(noise(2, 3, *shape)).shape == (2, network.n_features, *shape)


def test_default_network_takes_sections_of_the_mouse():
    network = UNet(n_classes=13)
    with torch.no_grad():
        assert network(noise(1, 1, 193, 271)).shape == (1, 13, 193, 271)


def test_forward_is_the_head_on_the_features(network):
    image = noise(2, 3, 21, 30)
    with torch.no_grad():
        features = network.features(image)
        by_hand = torch.einsum("lc,bcyx->blyx", network.head.weight[:, :, 0, 0], features)
        by_hand += network.head.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(network(image), by_hand)
        assert features.std() > 0.1


@pytest.mark.parametrize("training", [True, False])
def test_an_image_does_not_depend_on_the_others_of_its_batch(network, training):
    network.train(training)
    images = noise(3, 3, 20, 26)
    others = torch.cat([images[:1], 100 * noise(2, 3, 20, 26, seed=2)])
    with torch.no_grad():
        torch.testing.assert_close(network(images)[0], network(others)[0], atol=1e-5, rtol=1e-5)


def test_a_pixel_sees_as_far_as_the_lowest_level(network):
    """Neighbours by the skip at full size, far pixels by the lower levels alone."""
    image = noise(1, 3, 40, 40).requires_grad_(True)
    features = network.features(image)
    features[0, :, 20, 20].square().sum().backward()
    assert image.grad[0, :, 18:23, 18:23].abs().sum(0).min() > 0
    assert image.grad[0, :, 20, 34].abs().max() > 0


def test_every_weight_gets_a_gradient(network):
    F.cross_entropy(network(noise(2, 3, 16, 24)), torch.zeros(2, 16, 24, dtype=torch.long)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_overfits_a_tiny_section():
    """Labels that need both the grey level and the place: the same grey is class 1 left and class 2 right."""
    torch.manual_seed(0)
    network = UNet(n_classes=3, in_channels=1, widths=(8, 16, 24))
    labels = torch.zeros(1, 24, 32, dtype=torch.long)
    labels[:, 4:12, 3:13], labels[:, 10:20, 18:30] = 1, 2
    image = (labels > 0).float()[:, None] + 0.2 * noise(1, 1, 24, 32)
    image = image + 0.5 * torch.linspace(0, 1, 32)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(network(image), labels).backward()
        optimiser.step()
    assert (network(image).argmax(1) == labels).float().mean() > 0.995


def test_receptive_field_by_hand():
    """Two levels: 2 pixels and a neighbour, halved, 2, doubled, 2; see also the test of several fields of view."""
    assert UNet(2, widths=(8, 8)).receptive_field(0, 0) == (-10, 9)
    assert UNet(2, widths=(8, 8)).receptive_field(1, 4) == (-8, 13)
