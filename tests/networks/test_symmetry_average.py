import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.inference import Options, predict
from limner.networks.contextual import ContextualNetwork
from limner.networks.symmetry_average import SymmetryAverage
from limner.networks.tiled_unet import TiledUNet

SHIFTS = (0, 3, 5)


def network_with(build=lambda: ContextualNetwork(widths=(2, 4, 4, 4), branch_width=2), seed=0):
    """In evaluation, with the statistics of a batch, as after training."""
    torch.manual_seed(seed)
    network = build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.bias, 0, 0.5)
    with torch.no_grad():
        network.train()(noise(4, 1, 64, 64, seed=seed))
    return network.eval()


def noise(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def probabilities(network, image):
    with torch.inference_mode():
        return network(image).exp()


def tiled(network, image, options):
    found = np.full((2, *image.shape[2:]), np.nan, np.float32)

    def write(tile, p):
        found[:, *tile.kept.slices] = p

    grid = predict(network, image[0, 0].numpy(), write, options)
    return grid, found


def eight(image):
    """The symmetries of the square, by transposing and flipping."""
    for transposed, down, across in product((False, True), repeat=3):
        flips = [axis for axis, flipped in ((2, down), (3, across)) if flipped]
        yield (image.transpose(2, 3) if transposed else image).flip(flips)


def test_mean_of_the_eight_predictions_by_hand():
    network, image = network_with(), noise(2, 1, 24, 32)
    expected = torch.zeros(2, 2, 24, 32)
    for transposed, down, across in product((False, True), repeat=3):
        flips = [axis for axis, flipped in ((2, down), (3, across)) if flipped]
        turned = (image.transpose(2, 3) if transposed else image).flip(flips)
        with torch.inference_mode():
            back = torch.softmax(network(turned), dim=1).flip(flips)
        expected += (back.transpose(2, 3) if transposed else back) / 8
    found = probabilities(SymmetryAverage(network).eval(), image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - probabilities(SymmetryAverage(network, symmetries=False).eval(), image)).abs().max() > 0.01


def test_what_is_said_of_a_turned_image_is_turned():
    averaged, image = SymmetryAverage(network_with()).eval(), noise(1, 1, 24, 40)
    expected = probabilities(averaged, image)
    for turned, turned_expected in zip(eight(image), eight(expected), strict=True):
        torch.testing.assert_close(probabilities(averaged, turned), turned_expected, atol=1e-5, rtol=0)


def test_without_symmetries_and_shifts_it_is_the_network():
    network, image = network_with(), noise(1, 1, 24, 40)
    with torch.inference_mode():
        expected = torch.softmax(network(image), dim=1)
    single = SymmetryAverage(network, symmetries=False).eval()
    torch.testing.assert_close(probabilities(single, image), expected, atol=1e-6, rtol=0)


def test_a_shifted_crop_is_that_of_the_image_moved_on():
    """Crops of 0 and 3 averaged by hand; beyond the border the image is continued up to whole blocks."""
    network, image = network_with(), noise(1, 1, 64, 64)
    moved = F.pad(image, (3, 5, 3, 5), mode="replicate")
    with torch.inference_mode():
        here, there = (torch.softmax(network(i), dim=1) for i in (image, moved))
    found = probabilities(SymmetryAverage(network, False, (0, 3)).eval(), image)
    torch.testing.assert_close(found, (here + there[:, :, 3:67, 3:67]) / 2, atol=1e-6, rtol=0)
    assert (here - there[:, :, 3:67, 3:67]).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(1, 1), (2, 19), (21, 30), (40, 64)])
@pytest.mark.parametrize("shifts", [(0,), SHIFTS])
def test_probabilities_of_any_size_sum_to_1(shape, shifts):
    found = probabilities(SymmetryAverage(network_with(), shifts=shifts).eval(), noise(2, 1, *shape))
    assert found.shape == (2, 2, *shape)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, *shape), atol=1e-5, rtol=0)


def test_certainty_has_a_logarithm():
    class Certain(nn.Module):
        alignment, halo = 8, 0

        def forward(self, image):
            return torch.cat([image - 1e6, image + 1e6], dim=1)

    found = SymmetryAverage(Certain())(noise(1, 1, 8, 8))
    assert torch.isfinite(found).all()
    assert (found.softmax(dim=1)[:, 1] == 1).all()


@pytest.mark.parametrize("shape", [(9, 190), (163, 142)])
@pytest.mark.parametrize("shifts", [(0,), SHIFTS])
def test_tiles_give_what_the_whole_image_gives(shape, shifts):
    averaged, image = SymmetryAverage(network_with(), shifts=shifts).eval(), noise(1, 1, *shape)
    grid, found = tiled(averaged, image, Options(window=144, device="cpu"))
    assert len(grid) > 1
    assert grid.halo == (56 if shifts == (0,) else 64)
    np.testing.assert_allclose(found, probabilities(averaged, image)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("shift", range(8))
def test_the_halo_holds_for_every_shift_and_a_block_less_than_the_networks_does_not(shift):
    """In numbers of 64 bit, where nothing but the halo makes a difference."""
    averaged = SymmetryAverage(network_with(), symmetries=False, shifts=(shift,)).double().eval()
    image = noise(1, 1, 200, 200).double()
    expected = probabilities(averaged, image)[:, :, 64:136, 64:136]

    def error(halo):
        read, kept = slice(64 - halo, 136 + halo), slice(halo, halo + 72)
        return float((probabilities(averaged, image[:, :, read, read])[:, :, kept, kept] - expected).abs().max())

    assert error(-(-averaged.halo // 8) * 8) < 1e-12
    assert error(40) > 1e-9


def test_tiles_of_a_unet_do_too():
    network = network_with(lambda: TiledUNet(1, widths=(4, 4, 4)))
    averaged, image = SymmetryAverage(network).eval(), noise(1, 1, 131, 150)
    grid, found = tiled(averaged, image, Options(window=96, device="cpu"))
    assert len(grid) > 4
    np.testing.assert_allclose(found, probabilities(averaged, image)[0].numpy(), atol=1e-5)


def test_it_travels_to_workers_and_is_computed_there_in_evaluation():
    averaged, image = SymmetryAverage(network_with(), shifts=(0, 4)), noise(1, 1, 40, 40)
    expected = probabilities(averaged, image)
    for other in (pickle.loads(pickle.dumps(averaged)), copy.deepcopy(averaged)):
        assert (other.halo, other.alignment) == (58, 8)
        assert torch.equal(probabilities(other, image), expected)
    averaged.network.train()
    _, found = tiled(averaged, image, Options(window=136, device="cpu"))
    np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-5)
    assert averaged.network.training


@pytest.mark.parametrize("shifts", [(), (-1,), (0, 8)])
def test_shifts_from_0_to_the_alignment(shifts):
    with pytest.raises(ValueError, match=r"^SymmetryAverage\(\): shifts .* found; give one or more from 0 to 7"):
        SymmetryAverage(network_with(), shifts=shifts)
