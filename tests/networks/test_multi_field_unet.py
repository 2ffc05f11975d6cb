import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limner.networks.multi_field_unet import MultiFieldUNet


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network_with(n_classes=3, in_channels=1, widths=(8, 16), magnifications=(1, 2, 4)) -> MultiFieldUNet:
    torch.manual_seed(0)
    return MultiFieldUNet(n_classes, in_channels, widths, magnifications)


def without_normalisation(network: MultiFieldUNet) -> MultiFieldUNet:
    """What is left depends on near pixels alone; group normalisation looks at the whole image."""
    for block in network.modules():
        for name, child in list(block.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(block, name, nn.Identity())
    return network.eval()


def without_networks(magnifications) -> MultiFieldUNet:
    """What each U-Net would see of a region, side by side on the finest grid."""
    network = network_with(magnifications=magnifications)
    network.fields = nn.ModuleList(nn.Identity() for _ in magnifications)
    network.join = nn.Identity()
    return network


def spans(*starts, size):
    return tuple(slice(start, start + size) for start in starts)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (1, 40), (21, 30), (33, 17)])
def test_output_has_the_size_of_the_section(shape, channels):
    network = network_with(in_channels=channels)
    with torch.no_grad():
        assert network(noise(2, channels, *shape)).shape == (2, 3, *shape)
        assert network.features(noise(2, channels, *shape)).shape == (2, network.n_features, *shape)


def test_forward_is_a_linear_function_of_the_features():
    network, image = network_with(), noise(2, 1, 21, 30)
    with torch.no_grad():
        by_hand = torch.einsum("lc,bcyx->blyx", network.head.weight[:, :, 0, 0], network.features(image))
        torch.testing.assert_close(network(image), by_hand + network.head.bias.view(1, -1, 1, 1))


@pytest.mark.parametrize("shape", [(96, 120), (91, 113), (94, 115)])
@pytest.mark.parametrize("region", [None, spans(24, 30, size=32), spans(21, 43, size=27)])
def test_all_fields_see_a_point_at_the_same_place(shape, region):
    """A ramp stays a ramp when it is reduced and enlarged, if and only if nothing is shifted or stretched by it."""
    y, x = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    ramp = (3 * y + x).float()[None, None]
    seen = without_networks((1, 2, 3, 4, 8)).features(ramp, region and [region])
    whole = region or (slice(0, shape[0]), slice(0, shape[1]))
    inner = (
        (..., slice(8, -16), slice(8, -16)) if region is None else ...
    )  # the last reduced pixel may be a part of one
    expected = ramp[:, :, *whole].expand_as(seen)
    torch.testing.assert_close(seen[inner], expected[inner], atol=2e-3, rtol=0)


def test_patches_at_corners_see_as_many_pixels_inwards():
    """In both corners the field that is half as fine sees 16 of its pixels, from the very first or to the last."""
    image = torch.arange(64.0).view(1, 1, 1, 64).expand(2, 1, 64, 64)
    network, seen = without_networks((1, 2)), []
    network.fields[1].register_forward_hook(lambda *call: seen.append(call[1][0]))
    network.features(image, [spans(0, 0, size=16), spans(48, 48, size=16)])
    assert seen[0].shape == (2, 1, 16, 16)
    assert seen[0][0, 0, 0].tolist() == [2 * i + 0.5 for i in range(16)]
    assert seen[0][1, 0, 0].tolist() == [2 * i + 0.5 for i in range(16, 32)]


@pytest.mark.parametrize(("widths", "magnifications"), [((8, 8), (1, 2, 4)), ((8, 8, 8), (1, 2))])
def test_a_pixel_depends_on_its_receptive_field_and_on_nothing_else(widths, magnifications):
    """And that reaches beyond what the finest U-Net sees. Functions of the same field stand in for those that stop
    gradients by chance."""
    network = without_normalisation(network_with(widths=widths, magnifications=magnifications)).double()
    for block in network.modules():
        for name, child in list(block.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(block, name, nn.Softplus())
    step = magnifications[-1] * 2 ** (len(widths) - 1)
    size = 16 * max(step, 8)
    image = noise(1, 1, size, size, dtype=torch.float64).requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "max_pool2d", lambda x, n, ceil_mode: F.avg_pool2d(x, n, ceil_mode=ceil_mode))
        features = network.features(image)
    for phase in range(step // 2):
        y, x = size // 2 + phase, size // 2 + step - 1 - phase
        (gradient,) = torch.autograd.grad(features[0, :, y, x].sum(), image, retain_graph=True)
        for axis, pixel in ((0, y), (1, x)):
            reached = torch.nonzero(gradient[0, 0].abs().amax(1 - axis))[:, 0]
            assert (int(reached[0]), int(reached[-1])) == network.receptive_field(pixel)
            first, last = network.fields[0].receptive_field(pixel - 2, pixel + 2)
            assert reached[0] < first - 4
            assert reached[-1] > last + 4


def test_a_patch_is_cut_from_the_whole():
    """Away from its own border, and up to it where that is the section's; at places where poolings fall alike."""
    network, images = without_normalisation(network_with(widths=(8, 8), magnifications=(1, 2))), noise(3, 1, 120, 128)
    regions = [spans(24, 40, size=40), spans(0, 0, size=40), spans(80, 88, size=40)]
    inner = [(slice(12, -12), slice(12, -12)), (slice(0, -12), slice(0, -12)), (slice(12, 40), slice(12, 40))]
    with torch.no_grad():
        found, whole = network.features(images, regions), network.features(images)
    for i, (region, part) in enumerate(zip(regions, inner, strict=True)):
        expected = whole[i][:, *region]
        torch.testing.assert_close(found[i][:, *part], expected[:, *part], atol=1e-5, rtol=1e-4)
        assert (found[i] - expected).abs().max() > 1e-3


def test_a_patch_does_not_depend_on_the_others_of_its_batch():
    network, images = network_with(), noise(2, 1, 64, 70)
    regions = [spans(3, 20, size=24), spans(40, 1, size=24)]
    with torch.no_grad():
        both = network(images, regions)
        for i in range(2):
            torch.testing.assert_close(both[i : i + 1], network(images[i : i + 1], regions[i : i + 1]))


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([spans(0, 0, size=8)], "1 regions and 2 images"),
        ([spans(0, 0, size=8), spans(0, 0, size=9)], "the sizes"),
        ([spans(0, 0, size=8), spans(0, 13, size=8)], "rows 0 to 8, columns 13 to 21 are not within"),
        ([spans(-1, 0, size=8)] * 2, "rows -1 to 7"),
    ],
)
def test_wrong_regions(regions, message):
    with pytest.raises(ValueError, match=rf"^features\(\): .*{message}"):
        network_with().features(noise(2, 1, 20, 20), regions)


@pytest.mark.parametrize("magnifications", [(), (2, 4), (1, 1), (1, 4, 2)])
def test_wrong_magnifications(magnifications):
    with pytest.raises(ValueError, match=r"MultiFieldUNet\(\): magnifications are"):
        network_with(magnifications=magnifications)


@pytest.mark.parametrize("regions", [None, [spans(5, 6, size=24), spans(20, 0, size=24)]])
def test_every_weight_gets_a_gradient(regions):
    network = network_with()
    logits = network(noise(2, 1, 48, 50), regions)
    F.cross_entropy(logits, torch.zeros(2, *logits.shape[2:], dtype=torch.long)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name
