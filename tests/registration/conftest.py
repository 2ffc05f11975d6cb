from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

Images = NDArray[np.float64]


@pytest.fixture(scope="session")
def make_phantom() -> Callable[..., tuple[Images, NDArray[np.bool_]]]:
    """An ellipse with texture of several scales in [0.3, 1] on background 0, and its inside."""

    def make(shape: tuple[int, int], seed: int = 0) -> tuple[Images, NDArray[np.bool_]]:
        rng = np.random.default_rng(seed)
        texture = sum(w * s * ndimage.gaussian_filter(rng.standard_normal(shape), s) for s, w in ((2, 0.5), (6, 1)))
        texture = (texture - texture.min()) / np.ptp(texture)
        y, x = np.indices(shape) - (np.array(shape) - 1)[:, None, None] / 2
        radius = np.hypot(y / (0.36 * shape[0]), x / (0.30 * shape[1]))
        return (0.3 + 0.7 * texture) / (1 + np.exp(30 * (radius - 1))), radius < 0.95

    return make


@pytest.fixture(scope="session")
def smooth_warp() -> Callable[..., Images]:
    """A displacement of at most about `pixels` along y and x, shape (2, Y, X): local bulges, none near the border."""

    def make(shape: tuple[int, int], pixels: float) -> Images:
        y, x = np.indices(shape) / (np.array(shape) - 1)[:, None, None] - 0.5

        def bulge(at_y: float, at_x: float) -> Images:
            return np.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / (2 * 0.16**2))

        return pixels * np.stack([bulge(-0.1, 0.12) - bulge(0.15, -0.1), bulge(0.12, 0.1)])

    return make


@pytest.fixture(scope="session")
def sampled() -> Callable[[Images, Images], Images]:
    """Read an image where a displacement in pixels, shape (2, Y, X), points."""

    def sample(image: Images, displacement: Images) -> Images:
        return ndimage.map_coordinates(image, np.indices(image.shape) + displacement, order=1, mode="nearest")

    return sample
