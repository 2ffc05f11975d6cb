"""FCN-8s on VGG-16: the network of the stack completion paper, for those who have its ImageNet weights.

VGG-16 without its last layer, its fully connected layers turned into convolutions; scores of the classes at a 32nd, a
16th and an 8th of the resolution, each coarser one upsampled twofold and added to the next finer one, the last
upsampled eightfold. Weights of the VGG part are named as in torchvision, so that its published file can be read.

Departures from Long et al.: the input is padded to a multiple of 32 and the first fully connected layer pads by 3,
where the paper pads the image by 100 pixels and crops; every upsampling is learned, where the paper keeps the last one
fixed; what is upsampled is first continued beyond its border, so that a constant stays constant up to the edge.

References
----------
Long, Shelhamer, Darrell, "Fully convolutional networks for semantic segmentation", CVPR 2015,
doi:10.1109/CVPR.2015.7298965. Simonyan, Zisserman, "Very deep convolutional networks for large-scale image
recognition", ICLR 2015, arXiv:1409.1556. Atzeni et al., "A probabilistic model combining deep learning and multi-atlas
segmentation for semi-automated labelling of histology", MICCAI 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

# Mean and standard deviation, red, green and blue in [0, 1], to which torchvision's weights expect pixels to be mapped.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)

_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; a pool ends each
_POOL3, _POOL4 = 17, 24  # where in `features` the layers after these pools begin


class FCN8s(nn.Module):
    """Scores of every class at every pixel.

    Parameters
    ----------
    n_classes : int
        Number of classes, background included.
    in_channels : int
        Channels of the image; torchvision's weights need 3. An image of one channel is repeated to as many.
    fc_width : int
        Channels of the two layers that were fully connected; torchvision's weights need 4096 (135 million weights in
        all, 540 MB).

    Examples
    --------
    >>> network = FCN8s(n_classes=5, fc_width=64).eval()
    >>> network(torch.zeros(2, 1, 50, 70)).shape
    torch.Size([2, 5, 50, 70])
    """

    def __init__(self, n_classes: int, in_channels: int = 3, fc_width: int = 4096) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.features = nn.Sequential(*_vgg_layers(in_channels))
        self.classifier = nn.Sequential(
            *(nn.Conv2d(_BLOCKS[-1][-1], fc_width, kernel_size=7, padding=3), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Conv2d(fc_width, fc_width, kernel_size=1), nn.ReLU(), nn.Dropout(0.5)),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.replace_head(n_classes)

    def replace_head(self, n_classes: int) -> None:
        """Start the layers that depend on the classes afresh, for a new number of classes.

        Scores begin at zero and upsampling as bilinear interpolation, as in the paper. The new weights stay where the
        old ones were; an optimiser that holds the old ones must be made anew.
        """
        fc7: Tensor = self.classifier[3].weight  # type: ignore[assignment]
        self.score_conv7 = _zero_convolution(fc7.shape[0], n_classes)
        self.score_pool4 = _zero_convolution(_BLOCKS[3][-1], n_classes)
        self.score_pool3 = _zero_convolution(_BLOCKS[2][-1], n_classes)
        self.upsample_conv7 = _bilinear_upsampling(n_classes, 2)
        self.upsample_pool4 = _bilinear_upsampling(n_classes, 2)
        self.upsample_pool3 = _bilinear_upsampling(n_classes, 8)
        self.to(fc7.device, fc7.dtype)

    def forward(self, image: Tensor) -> Tensor:
        """Scores (logits) of each class.

        Parameters
        ----------
        image : Tensor
            Shape (B, C, Y, X), float, C being `in_channels` or 1. For torchvision's weights: in [0, 1], less
            `IMAGENET_MEAN`, divided by `IMAGENET_DEVIATION`.

        Returns
        -------
        Tensor
            Shape (B, n_classes, Y, X), before softmax.
        """
        if image.shape[1] == 1:
            image = image.expand(-1, self.in_channels, -1, -1)
        height, width = image.shape[2:]
        padded = functional.pad(image, (0, -width % 32, 0, -height % 32), mode="replicate")
        pool3 = self.features[:_POOL3](padded)  # (B, 256, Y/8, X/8)
        pool4 = self.features[_POOL3:_POOL4](pool3)  # (B, 512, Y/16, X/16)
        conv7 = self.classifier(self.features[_POOL4:](pool4))  # (B, fc_width, Y/32, X/32)
        scores = _upsampled(self.score_conv7(conv7), self.upsample_conv7) + self.score_pool4(pool4)
        scores = _upsampled(scores, self.upsample_pool4) + self.score_pool3(pool3)
        return _upsampled(scores, self.upsample_pool3)[:, :, :height, :width]

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the last four convolution layers: the second that was fully connected and the three of scores.

        The stack completion paper lets "the final four convolutional layers" learn 20 times faster; that these are the
        four is our reading.
        """
        for layer in (self.classifier[3], self.score_conv7, self.score_pool4, self.score_pool3):
            yield from layer.parameters()

    def parameter_groups(self, learning_rate: float, head_factor: float = 20.0) -> list[dict[str, Any]]:
        """Two groups for an optimiser: `head_parameters` at `head_factor` times the learning rate, and the others.

        Examples
        --------
        >>> network = FCN8s(n_classes=5, fc_width=64)
        >>> optimiser = torch.optim.SGD(network.parameter_groups(1e-4), momentum=0.9)
        >>> [group["lr"] for group in optimiser.param_groups]
        [0.0001, 0.002]
        """
        head = list(self.head_parameters())
        in_head = {id(parameter) for parameter in head}
        others = [parameter for parameter in self.parameters() if id(parameter) not in in_head]
        return [{"params": others, "lr": learning_rate}, {"params": head, "lr": learning_rate * head_factor}]


def load_vgg16_weights(network: FCN8s, path: Path) -> None:
    """Set the VGG part of a network to torchvision's weights, from a file on this machine.

    Nothing is changed unless everything fits. The last layer of VGG-16 (``classifier.6``) is left out.

    Parameters
    ----------
    network : FCN8s
        With 3 input channels and the full `fc_width`.
    path : Path
        torchvision's ``vgg16-397923af.pth`` or any .pth, .pt or .safetensors file with the same names and shapes.

    Raises
    ------
    ValueError
        If the file cannot be read as weights, lacks one, or holds one of another shape.

    Examples
    --------
    >>> load_vgg16_weights(FCN8s(n_classes=12), Path("vgg16-397923af.pth"))  # doctest: +SKIP
    """
    targets = _vgg_part(network)
    stored = _fitting_tensors(path, targets)
    with torch.no_grad():
        for name, weight in targets.items():
            weight.copy_(stored[name].reshape(weight.shape))


def check_vgg16_weights(path: Path) -> None:
    """Check that `load_vgg16_weights` can take a file for a network of full width; nothing is kept.

    Parameters
    ----------
    path : Path
        As of `load_vgg16_weights`.

    Raises
    ------
    ValueError
        As of `load_vgg16_weights`.

    Examples
    --------
    >>> check_vgg16_weights(Path("vgg16-397923af.pth"))  # doctest: +SKIP
    """
    with torch.device("meta"):  # shapes alone, without the 540 MB
        network = FCN8s(n_classes=1)
    _fitting_tensors(path, _vgg_part(network))


def _vgg_part(network: FCN8s) -> dict[str, Tensor]:
    prefixes = ("features.", "classifier.")
    return {name: weight for name, weight in network.state_dict().items() if name.startswith(prefixes)}


def _fitting_tensors(path: Path, targets: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a file holds, when that has the names and shapes of `targets`."""
    stored = _read_tensors(path)
    for name, weight in targets.items():
        if name not in stored:
            raise ValueError(
                f"load_vgg16_weights(): {path} has no {name}; give VGG-16 weights with torchvision's names"
            )
        expected = _torchvision_shape(name, weight)
        if tuple(stored[name].shape) != expected:
            raise ValueError(
                f"load_vgg16_weights(): {name} has shape {tuple(stored[name].shape)} in {path}, the network takes "
                f"{expected}; give VGG-16 weights with torchvision's shapes"
            )
    return stored


def _vgg_layers(channels: int) -> Iterator[nn.Module]:
    """Layers of VGG-16 in torchvision's order; their places there are the names of their weights."""
    for block in _BLOCKS:
        for width in block:
            yield nn.Conv2d(channels, width, kernel_size=3, padding=1)
            yield nn.ReLU(inplace=True)
            channels = width
        yield nn.MaxPool2d(2)


def _zero_convolution(in_channels: int, n_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, n_classes, kernel_size=1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _bilinear_upsampling(n_classes: int, factor: int) -> nn.ConvTranspose2d:
    """A transposed convolution that begins as bilinear interpolation of each class by itself; see `_upsampled`."""
    cropped = factor // 2 + factor  # half a kernel's reach, and the pixel by which `_upsampled` continues the border
    layer = nn.ConvTranspose2d(n_classes, n_classes, 2 * factor, stride=factor, padding=cropped, bias=False)
    hat = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
    with torch.no_grad():
        layer.weight.copy_(torch.eye(n_classes)[:, :, None, None] * hat[:, None] * hat)
    return layer


def _upsampled(scores: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    return layer(functional.pad(scores, (1, 1, 1, 1), mode="replicate"))


def _torchvision_shape(name: str, weight: Tensor) -> tuple[int, ...]:
    """The shape under which torchvision stores a weight: those of the classifier as matrices."""
    if name.startswith("classifier.") and weight.ndim == 4:
        return weight.shape[0], weight[0].numel()
    return tuple(weight.shape)


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or "no such file"  # safetensors leaves it out
        raise ValueError(f"load_vgg16_weights(): {path} cannot be read ({reason}); name a file of weights") from error
    # Unpickling bytes that are no weights raises a dozen kinds of error, some with pages of advice.
    except Exception as error:
        raise ValueError(
            f"load_vgg16_weights(): {path} cannot be read as weights (damaged, or not a state dict of tensors?); give "
            "torchvision's vgg16-397923af.pth, or a .pth, .pt or .safetensors file like it"
        ) from error
    if not isinstance(stored, Mapping) or not all(isinstance(one, Tensor) for one in stored.values()):
        raise ValueError(f"load_vgg16_weights(): {path} holds something other than a state dict of weights")
    return stored
