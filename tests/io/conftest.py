from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from numpy.typing import NDArray

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write images under the names s1, s2, ... (s10 after s9) into a new folder."""

    def make(images: Sequence[NDArray[Any]], name: str = "stack", ending: str = ".png", first: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i, image in enumerate(images, start=first):
            iio.imwrite(folder / f"s{i}{ending}", image)
        return folder

    return make


@pytest.fixture
def make_truncated() -> Callable[[Path, float], Path]:
    """Cut a file to a fraction of its length."""

    def cut(path: Path, fraction: float) -> Path:
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * fraction)])
        return path

    return cut


@pytest.fixture
def noise() -> NDArray[np.uint16]:
    """Incompressible 16-bit pixels, shape (6, 20, 30), so that a truncated file lacks pixels and not mere padding."""
    return np.random.default_rng(0).integers(0, 2**16, (6, 20, 30)).astype(np.uint16)
