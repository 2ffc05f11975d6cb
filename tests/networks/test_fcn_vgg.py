from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from limner.networks.fcn_vgg import (
    FCN8s,
    _bilinear_upsampling,
    _upsampled,
    check_vgg16_weights,
    load_vgg16_weights,
)

# VGG-16 (configuration D of the paper) as torchvision stores it: place in `features`, channels in, channels out.
VGG16_CONVOLUTIONS = [
    (0, 3, 64),
    (2, 64, 64),
    (5, 64, 128),
    (7, 128, 128),
    (10, 128, 256),
    (12, 256, 256),
    (14, 256, 256),
    (17, 256, 512),
    (19, 512, 512),
    (21, 512, 512),
    (24, 512, 512),
    (26, 512, 512),
    (28, 512, 512),
]
WIDTH = 64  # in place of 4096


def torchvision_shapes(width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for place, channels_in, channels_out in VGG16_CONVOLUTIONS:
        shapes[f"features.{place}.weight"] = (channels_out, channels_in, 3, 3)
        shapes[f"features.{place}.bias"] = (channels_out,)
    return shapes | {
        "classifier.0.weight": (width, 25088),
        "classifier.0.bias": (width,),
        "classifier.3.weight": (width, width),
        "classifier.3.bias": (width,),
    }


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    """Random weights as in torchvision's file, the two wide layers narrower."""
    generator = torch.Generator().manual_seed(0)
    shapes = torchvision_shapes(WIDTH) | {"classifier.6.weight": (1000, WIDTH), "classifier.6.bias": (1000,)}
    return {name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}


@pytest.fixture
def network() -> FCN8s:
    torch.manual_seed(0)
    return FCN8s(n_classes=4, fc_width=WIDTH)


def vgg_part(network: FCN8s) -> dict[str, torch.Tensor]:
    return {k: v for k, v in network.state_dict().items() if k.startswith(("features.", "classifier."))}


def test_names_and_shapes_are_torchvisions():
    with torch.device("meta"):  # the full width, without its memory
        found = {name: tuple(weight.shape) for name, weight in vgg_part(FCN8s(n_classes=4)).items()}
    expected = torchvision_shapes(4096)
    assert list(found) == list(expected)
    as_convolutions = {"classifier.0.weight": (4096, 512, 7, 7), "classifier.3.weight": (4096, 4096, 1, 1)}
    assert found == expected | as_convolutions
    n_weights = sum(int(np.prod(shape)) for shape in found.values())
    assert n_weights == 138_357_544 - 1000 * 4097  # the published total, less the layer for ImageNet's classes


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_convolutions_equal_the_fully_connected_layers(network, stored, tmp_path, ending):
    path = tmp_path / f"vgg16{ending}"
    safetensors.torch.save_file(stored, path) if ending == ".safetensors" else torch.save(stored, path)
    load_vgg16_weights(network, path)
    pool5 = torch.rand(1, 512, 7, 7, generator=torch.Generator().manual_seed(1))  # that of a 224 x 224 image
    by_convolution = network.eval().classifier(pool5)[0, :, 3, 3]  # where the 7 x 7 window sees it all
    first = functional.linear(pool5.flatten(1), stored["classifier.0.weight"], stored["classifier.0.bias"]).relu()
    second = functional.linear(first, stored["classifier.3.weight"], stored["classifier.3.bias"]).relu()
    assert second.std() > 0
    torch.testing.assert_close(by_convolution, second[0])


def test_features_are_those_of_vgg16(network, stored, tmp_path):
    torch.save(stored, tmp_path / "vgg16.pth")
    load_vgg16_weights(network, tmp_path / "vgg16.pth")
    image = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    expected = image
    for place, _, _ in VGG16_CONVOLUTIONS:
        name = f"features.{place}"
        expected = functional.conv2d(expected, stored[f"{name}.weight"], stored[f"{name}.bias"], padding=1).relu()
        if place in (2, 7, 14, 21, 28):
            expected = functional.max_pool2d(expected, 2)
    torch.testing.assert_close(network.features(image), expected)
    assert expected.shape == (1, 512, 2, 1)


def test_skips_are_taken_at_an_eighth_and_a_sixteenth(network):
    seen = {}
    for name in ("score_pool3", "score_pool4", "score_conv7"):
        getattr(network, name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: tuple(inputs[0].shape)})
        )
    network(torch.rand(1, 3, 64, 96))
    assert seen == {"score_conv7": (1, WIDTH, 2, 3), "score_pool4": (1, 512, 4, 6), "score_pool3": (1, 256, 8, 12)}


def test_every_score_layer_reaches_the_output(network):
    network.eval()
    image = torch.rand(1, 3, 64, 64)
    assert not network(image).any()  # scores begin at zero
    for name in ("score_pool3", "score_pool4", "score_conv7"):
        layer = getattr(network, name)
        nn.init.constant_(layer.bias, 1.0)
        torch.testing.assert_close(network(image), torch.ones(1, 4, 64, 64))
        nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 70), (50, 31)])
def test_output_has_the_size_of_the_input(network, size):
    assert network.eval()(torch.rand(2, 3, *size)).shape == (2, 4, *size)


def test_padding_to_a_multiple_of_32_continues_the_image(network):
    nn.init.normal_(network.score_pool3.weight)
    network.eval()
    image = torch.rand(1, 3, 40, 32)
    continued = torch.cat([image, image[:, :, -1:].expand(-1, -1, 24, -1)], dim=2)
    torch.testing.assert_close(network(image), network(continued)[:, :, :40])


def test_grey_is_repeated(network):
    nn.init.normal_(network.score_pool3.weight)
    network.eval()
    grey = torch.rand(1, 1, 32, 32)
    assert network(grey).any()
    torch.testing.assert_close(network(grey), network(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("factor", [2, 8])
def test_upsampling_begins_as_bilinear_interpolation(factor):
    layer = _bilinear_upsampling(3, factor)
    scores = torch.rand(2, 3, 5, 7)
    expected = functional.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(_upsampled(scores, layer), expected)
    constant = _upsampled(torch.full((1, 3, 5, 7), 2.5), layer)
    assert constant.eq(2.5).all()  # exactly, the edges too


def test_dropout_is_off_in_eval_and_on_in_training(network):
    nn.init.normal_(network.score_conv7.weight)
    image = torch.rand(1, 3, 32, 32)
    network.eval()
    assert torch.equal(network(image), network(image))
    network.train()
    assert not torch.equal(network(image), network(image))
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_replaced_head_has_new_classes_and_leaves_the_rest(network):
    network.double()
    before = {name: weight.clone() for name, weight in vgg_part(network).items()}
    nn.init.normal_(network.score_pool3.weight)
    network.replace_head(7)
    scores = network.eval()(torch.rand(1, 3, 32, 32, dtype=torch.float64))
    assert scores.shape == (1, 7, 32, 32)
    assert scores.dtype == torch.float64
    assert not scores.any()
    assert all(torch.equal(weight, before[name]) for name, weight in vgg_part(network).items())


def test_parameter_groups_hold_every_weight_once(network):
    slow, fast = network.parameter_groups(1e-3)
    assert (slow["lr"], fast["lr"]) == (1e-3, pytest.approx(2e-2))
    assert len(fast["params"]) == 4 * 2  # weight and bias of four layers
    assert {id(p) for p in fast["params"]} == {id(p) for p in network.head_parameters()}
    together = [id(p) for p in slow["params"] + fast["params"]]
    assert sorted(together) == sorted(id(p) for p in network.parameters())


@pytest.mark.slow
def test_learns_one_small_section_by_heart(network):
    y, x = np.mgrid[:32, :32]
    target = torch.from_numpy(np.where((y - 16) ** 2 + (x - 10) ** 2 < 60, 1, np.where(x > 22, 2, 0)))[None]
    image = functional.one_hot(target, 3).permute(0, 3, 1, 2).float() - 0.5
    network.replace_head(3)
    optimiser = torch.optim.SGD(network.parameter_groups(3e-3), momentum=0.9)
    for _ in range(25):
        optimiser.zero_grad()
        functional.cross_entropy(network(image), target).backward()
        optimiser.step()
    with torch.no_grad():
        found = network.eval()(image).argmax(1)
    accuracy = (found == target).float().mean()
    majority = (target == 0).float().mean()
    assert majority < 0.65  # what a network that learned nothing reaches
    assert accuracy > 0.93


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.7.bias": None}, "has no features.7.bias"),
        (
            {"features.0.weight": torch.zeros(64, 1, 3, 3)},
            r"features.0.weight has shape \(64, 1, 3, 3\) in .*vgg16.pth",
        ),
        ({"classifier.0.weight": torch.zeros(4096, 25088)[:1]}, r"the network takes \(64, 25088\)"),
        (
            {"classifier.3.weight": torch.zeros(32, 128)},
            r"classifier.3.weight has shape \(32, 128\)",
        ),  # as many numbers
    ],
)
def test_weights_that_do_not_fit_change_nothing(network, stored, tmp_path, change, message):
    path = tmp_path / "vgg16.pth"
    torch.save({name: weight for name, weight in (stored | change).items() if weight is not None}, path)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_vgg16_weights(network, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["absent.pth", "absent.safetensors", "text.pth", "bytes.pt", "text.safetensors", "empty.pt", "list.pt", "epoch.pt"],
)
def test_files_that_hold_no_weights_are_named(network, tmp_path: Path, name):
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "bytes.pt").write_bytes(b"]" + bytes(range(256)))
    (tmp_path / "empty.pt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(ValueError, match=name) as caught:
        load_vgg16_weights(network, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 200


def test_weights_are_checked_without_a_network(tmp_path):
    path = tmp_path / "vgg16.pth"
    # of full width, yet small on disk: every tensor repeats one number
    full = {name: torch.zeros(1).expand(shape) for name, shape in torchvision_shapes(4096).items()}
    torch.save(full, path)
    check_vgg16_weights(path)
    torch.save(full | {"classifier.3.bias": torch.zeros(64)}, path)
    with pytest.raises(ValueError, match=r"classifier\.3\.bias has shape \(64,\) in .*vgg16\.pth, .* takes \(4096,\)"):
        check_vgg16_weights(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"vgg16\.pth cannot be read as weights \(damaged, "):
        check_vgg16_weights(path)
