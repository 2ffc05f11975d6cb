import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.networks.tiled_unet import PAPER_WIDTHS, TiledUNet


def network_with(widths=(4, 6, 8, 10, 12), in_channels=3, seed=0) -> TiledUNet:
    """In evaluation, with batch statistics and affine terms far from 0 and 1, as after training."""
    torch.manual_seed(seed)
    network = TiledUNet(in_channels, widths=widths)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.1, 0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return network.eval()


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (16, 64), (21, 30), (33, 17), (47, 95)])
def test_output_has_the_size_of_the_input(shape):
    with torch.no_grad():
        assert network_with()(noise(2, 3, *shape)).shape == (2, 2, *shape)


def test_default_width_has_half_a_million_to_two_million_parameters_and_the_papers_has_31():
    def millions(network):
        return sum(p.numel() for p in network.parameters()) / 1e6

    assert 0.5 < millions(TiledUNet()) < 2
    with torch.device("meta"):
        assert 31 < millions(TiledUNet(widths=PAPER_WIDTHS)) < 32


def test_normalisation_follows_the_non_linearity():
    """So maps before the head may be negative, and shifted by the bias alone where nothing fires."""
    block = network_with().up[-1]
    assert [type(m) for m in block] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 2


@pytest.mark.parametrize("signs", [1, -1, 0])
def test_folded_normalisation_gives_what_the_layers_give(signs):
    """Of negative weights, where the maximum of the ReLU turns into a minimum, too; 0: both, and one that is 0."""
    block = network_with().down[1]
    with torch.no_grad():
        block[2].weight.mul_(signs or torch.tensor([1, -1, 0, 1, -1, 1.0]))
    image = noise(2, 4, 9, 11) - 0.3
    layers = list(block)
    expected = nn.Sequential(*layers)(image)
    with torch.no_grad():
        found = block(image)
    assert not torch.allclose(expected, nn.Sequential(*layers[:2], *layers[3:])(image), atol=0.1)  # it does something
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_a_pixel_depends_on_its_receptive_field_and_on_nothing_else(levels):
    """The gradient of one output vanishes outside and not on the field's first and last pixel, for every phase.

    Maximum pooling and ReLU stop gradients by chance; functions of the same field that pass them stand in for them.
    """
    network = network_with(widths=(3, 4, 5, 6, 7)[:levels], in_channels=1).double()
    for block in (*network.down, *network.up):
        block[1], block[4] = nn.Softplus(), nn.Softplus()
    size = 18 * network.alignment
    image = noise(1, 1, size, size, dtype=torch.float64).requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "max_pool2d", lambda x, n, ceil_mode: F.avg_pool2d(x, n, ceil_mode=ceil_mode))
        maps = network(image)
    for phase in range(network.alignment):
        y, x = size // 2 + phase, size // 2 + network.alignment - 1 - phase
        (gradient,) = torch.autograd.grad(maps[0, 1, y, x], image, retain_graph=True)
        for axis, pixel in ((0, y), (1, x)):
            reached = torch.nonzero(gradient[0, 0].abs().amax(1 - axis))[:, 0]
            assert (int(reached[0]), int(reached[-1])) == network.receptive_field(pixel)


def test_halo_of_an_aligned_region():
    """By hand for two levels: 2 convolutions, half, 2 convolutions, 2 convolutions doubled: 8 pixels."""
    assert (network_with((3, 4)).halo, network_with((3, 4)).alignment) == (8, 2)
    network = network_with()
    assert (network.halo, network.alignment) == (94, 16)
    inside = [network.receptive_field(p) for p in range(64, 128)]
    assert min(first for first, _ in inside) == 64 - 94
    assert max(last for _, last in inside) == 127 + 94


@pytest.mark.parametrize("shape", [(1, 1), (37, 50), (64, 96), (129, 71)])
def test_a_region_is_cut_from_the_whole(shape):
    network, image = network_with(), noise(2, 3, *shape)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        whole = network(image)
        for _ in range(8):
            spans = [sorted(torch.randint(0, n + 1, (2,), generator=draw).tolist()) for n in shape]
            rows, columns = (
                slice(a, max(b, a + 1)) if a < n else slice(n - 1, n) for (a, b), n in zip(spans, shape, strict=True)
            )
            found = network(image, (rows, columns))
            torch.testing.assert_close(found, whole[:, :, rows, columns], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [230, 239, 240, 241, 256, 271])
def test_the_image_end_cut_off_at_an_aligned_place_gives_the_same_as_the_whole_image(size):
    """Bottom and right borders at every phase of the poolings; 96 is the halo, aligned."""
    network = network_with()
    image = noise(1, 3, size, size - 3)
    with torch.no_grad():
        whole = network(image)
        part = network(image[:, :, 32:, 16:])
        torch.testing.assert_close(part[:, :, 96:, 96:], whole[:, :, 128:, 112:], atol=1e-5, rtol=1e-5)
        assert (part[:, :, 80:96, 96:] - whole[:, :, 112:128, 112:]).abs().max() > 1e-6  # less halo would not do


def test_every_weight_gets_a_gradient():
    network = TiledUNet(widths=(4, 6, 8, 10, 12)).train()
    F.cross_entropy(network(noise(2, 3, 48, 64)), torch.zeros(2, 48, 64, dtype=torch.long)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_overfits_a_tiny_image():
    torch.manual_seed(0)
    network = TiledUNet(1, widths=(8, 12, 16, 16, 16)).train()
    labels = torch.zeros(2, 32, 48, dtype=torch.long)
    labels[:, 6:14, 5:15], labels[0, 16:28, 30:41] = 1, 1
    image = labels.float()[:, None] + 0.3 * noise(2, 1, 32, 48)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(network(image), labels).backward()
        optimiser.step()
    assert (network.eval()(image).argmax(1) == labels).float().mean() > 0.99
