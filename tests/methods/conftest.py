from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

SHAPE = (13, 48, 56)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads; another program on the same cores would slow them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_phantom() -> Callable[..., tuple[NDArray[np.float32], NDArray[Any]]]:
    """Images and labels: a grey ellipse (3) that grows and shifts, and in it a bright disc (7), on dark noise."""

    def make(shape: tuple[int, int, int] = SHAPE, dtype: type = np.uint16) -> tuple[NDArray[np.float32], NDArray[Any]]:
        y, x = np.indices(shape[1:])
        labels = np.zeros(shape, dtype)
        for z, section in enumerate(labels):
            down, right = y - (20 + 0.6 * z), x - (22 + 0.9 * z)
            section[np.hypot(down / (10 + 0.5 * z), right / (8 + 0.7 * z)) < 1] = 3
            section[np.hypot(down - 1, right - 2) < 3 + 0.2 * z] = 7
        grey = np.select([labels == 3, labels == 7], [120.0, 200.0], 20.0)
        noise = np.random.default_rng(0).normal(0, 8, shape)
        return (grey + noise).astype(np.float32), labels

    return make
