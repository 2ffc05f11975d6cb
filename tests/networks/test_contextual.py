import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.inference import Options, predict
from limner.networks.contextual import ContextualNetwork


def network_with(widths=(4, 4, 6, 6), in_channels=1, seed=0) -> ContextualNetwork:
    """In evaluation, with affine terms far from 0 and 1 and the statistics of a batch, as after training."""
    torch.manual_seed(seed)
    network = ContextualNetwork(in_channels, widths=widths, branch_width=4, dropout=0.0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
    with torch.no_grad():
        network.train()(noise(4, in_channels, 64, 64, seed=seed))
    return network.eval()


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiled(network, image, options):
    """Probabilities tile by tile of an image (Y, X) in [0, 1]."""
    found = np.full((2, *image.shape), np.nan, np.float32)

    def write(tile, probabilities):
        found[:, *tile.kept.slices] = probabilities

    return predict(network, image, write, options), found


def whole(network, image):
    with torch.no_grad():
        return torch.softmax(network(torch.from_numpy(image)[None, None]), 1)[0].numpy()


def test_the_layers_are_those_of_the_paper():
    """16 convolutions, of 3 x 3 and a few of 1 x 1; 3 poolings; 3 deconvolutions, by 2, 4 and 8."""
    network = ContextualNetwork()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(m.kernel_size[0] for m in convolutions) == [1] * 3 + [3] * 13
    assert [m.stride for m in network.modules() if isinstance(m, nn.ConvTranspose2d)] == [(2, 2), (4, 4), (8, 8)]
    poolings = []
    with pytest.MonkeyPatch.context() as patch:
        pool = F.max_pool2d
        patch.setattr(F, "max_pool2d", lambda x, n, **more: poolings.append(n) or pool(x, n, **more))
        network.eval()(noise(1, 1, 16, 16))
    assert poolings == [2, 2, 2]
    assert 0.5e6 < sum(p.numel() for p in network.parameters()) < 0.8e6


def test_weights_are_drawn_as_xavier_and_glorot_did():
    torch.manual_seed(0)
    for module in ContextualNetwork().modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 1000:
            receptive = module.kernel_size[0] ** 2
            limit = (6 / (receptive * (module.in_channels + module.out_channels))) ** 0.5
            assert 0.95 * limit < module.weight.abs().max() <= limit


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (16, 64), (21, 30), (33, 17), (47, 95)])
def test_output_has_the_size_of_the_input(shape):
    network = network_with(in_channels=3)
    with torch.no_grad():
        assert network(noise(2, 3, *shape)).shape == (2, 2, *shape)
        assert [score.shape for score in network.scores(noise(2, 3, *shape))] == [(2, 2, *shape)] * 3


def test_the_three_branches_are_summed_and_see_further_the_deeper_they_leave():
    network, image = network_with(), noise(1, 1, 43, 50)
    with torch.no_grad():
        first, second, third = network.scores(image)
        torch.testing.assert_close(network(image), first + second + third)
        rows, columns = slice(3, 17), slice(20, 50)
        torch.testing.assert_close(network(image, (rows, columns)), network(image)[:, :, rows, columns])
    assert min(score.std() for score in (first, second, third)) > 0.05
    reaches = []
    for score in network.scores(image.requires_grad_()):
        (gradient,) = torch.autograd.grad(score[0, 1, 21, 25], image, retain_graph=True)
        reaches.append(int((gradient != 0).sum()))
    assert reaches[0] < reaches[1] < reaches[2]


def test_a_region_depends_on_its_receptive_field_and_on_nothing_else():
    """The gradient of a few outputs vanishes outside and not on the field's first and last pixel, for every phase.

    Maximum pooling and ReLU stop gradients by chance; linear functions of the same field stand in for them.
    """
    network = network_with().double()
    for block in network.modules():
        if isinstance(block, nn.Sequential) and isinstance(block[-1], nn.ReLU):
            block[-1] = nn.Identity()
    size = 18 * network.alignment
    image = noise(1, 1, size, size, dtype=torch.float64).requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "max_pool2d", lambda x, n, ceil_mode: F.avg_pool2d(x, n, ceil_mode=ceil_mode))
        maps = network(image)
    middle = size // 2
    for y, x, length in [
        *((middle + n, middle + 7 - n, 1) for n in range(8)),
        (middle, middle, 8),
        (middle + 3, 70, 5),
    ]:
        outputs = maps[0, 1, y : y + length, x : x + length].sum()
        (gradient,) = torch.autograd.grad(outputs, image, retain_graph=True)
        for axis, pixel in ((0, y), (1, x)):
            found = torch.nonzero(gradient[0, 0].abs().amax(1 - axis))[:, 0]
            assert (int(found[0]), int(found[-1])) == network.receptive_field(pixel, pixel + length - 1)


def test_halo_by_hand():
    """The deepest branch, of 8 pixels: -1 to 8 refined, -1 to 1 enlarged, -4 to 4, -8 to 9, -11 to 12, -22 to 25,
    -24 to 27, -48 to 55, -50 to 57."""
    network = network_with()
    assert (network.halo, network.alignment) == (50, 8)
    assert network.receptive_field(0, 7) == (-50, 57)
    assert network.receptive_field(80, 167) == (30, 217)


@pytest.mark.parametrize("shape", [(1, 1), (5, 190), (136, 168), (177, 163)])
def test_tiles_give_what_the_whole_image_gives(shape):
    network, image = network_with(), noise(*shape).numpy()
    expected = whole(network, image)
    for window in (120, 136):
        grid, found = tiled(network, image, Options(window=window, device="cpu"))
        assert grid.halo == 56
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(grid) > 1 or shape == (1, 1)


def test_tiles_with_a_halo_of_a_block_less_do_not():
    network, image = network_with(), noise(177, 163).numpy()
    _, found = tiled(network, image, Options(window=136, halo=48, device="cpu"))
    assert np.abs(found - whole(network, image)).max() > 1e-4


def test_normalisation_is_folded_into_convolutions_without_gradients():
    network, image = network_with(), noise(2, 1, 37, 50)
    expected = network(image)
    untouched = copy.deepcopy(network.state_dict())
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", lambda *_: pytest.fail("normalised apart"))
        torch.testing.assert_close(network(image), expected.detach(), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, untouched[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        network.branches[2].normalise[0].bias.add_(1)  # of a deconvolution
        assert (network(image) - expected).abs().max() > 0.01


def test_the_deepest_maps_drop_out_in_training_alone():
    network, image = ContextualNetwork(widths=(4, 4, 8, 8), dropout=0.5), noise(4, 1, 32, 32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    first, again = network.train().scores(image), network.scores(image)
    assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True, True, False]
    with torch.no_grad():
        network.eval()
        assert torch.equal(network(image), network(image))


def test_every_weight_gets_a_gradient():
    network = ContextualNetwork(widths=(4, 6, 8, 10)).train()
    F.cross_entropy(network(noise(2, 1, 48, 64)), torch.zeros(2, 48, 64, dtype=torch.long)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_overfits_a_tiny_image():
    torch.manual_seed(0)
    network = ContextualNetwork(widths=(8, 12, 16, 16), dropout=0.0).train()
    labels = torch.zeros(2, 32, 48, dtype=torch.long)
    labels[:, 6:14, 5:15], labels[0, 16:28, 30:41] = 1, 1
    image = labels.float()[:, None] + 0.3 * noise(2, 1, 32, 48)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(network(image), labels).backward()
        optimiser.step()
    assert (network.eval()(image).argmax(1) == labels).float().mean() > 0.99
