"""Maps of sections tile by tile: equal to the whole section at once, kept, and taken up where a run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from limner.inference import Options, predict
from limner.networks.contextual import ContextualNetwork
from limner.run_record import Store
from limner.section_maps import SectionMaps, make_maps

SMALL = Options(window=176, device="cpu")


@pytest.fixture(scope="module")
def network() -> ContextualNetwork:
    torch.manual_seed(0)
    return ContextualNetwork(widths=(2, 2, 4, 4), branch_width=2).eval()


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.float32]]:
    draw = np.random.default_rng(0)
    return [draw.standard_normal(shape).astype(np.float32) for shape in ((230, 301), (64, 90))]


def as_is(_: Any) -> Any:
    return lambda pixels: pixels


def made(network: ContextualNetwork, images: list[Any], store: Store, **more: Any) -> SectionMaps:
    return make_maps(network, images, ["a", "b"], store, 1, SMALL, as_is, **more)


class Reads:
    """An image that counts what is read of it."""

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        self.pixels, self.shape, self.reads = pixels, pixels.shape, 0

    def __getitem__(self, region: tuple[slice, slice]) -> NDArray[np.float32]:
        self.reads += 1
        return self.pixels[region]


def test_maps_are_those_of_whole_sections(
    network: ContextualNetwork, images: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    told = list[tuple[int, int]]()
    maps = made(network, images, Store(tmp_path), progress=lambda *n: told.append(n))
    assert [len(grid) for grid in maps.grids] == [6, 1]
    assert told[-1] == (7, 7)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for z, image in enumerate(images):
        whole = np.zeros(image.shape, np.float32)
        predict(network, image, lambda _, p, whole=whole: np.copyto(whole, p[1]), Options(device="cpu"))
        np.testing.assert_allclose(maps[z], whole, atol=1e-6)
        assert maps[z].std() > 0


def test_what_is_kept_is_not_computed_again(
    network: ContextualNetwork, images: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    counted = [Reads(image) for image in images]

    class Stop(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        made(network, counted, Store(tmp_path), progress=stop)
    before = counted[0].reads
    maps = made(network, counted, Store(tmp_path))
    assert 3 <= before < 6
    assert counted[0].reads == 6
    made(network, counted, Store(tmp_path))
    assert [image.reads for image in counted] == [6, 1]
    assert maps[0].shape == (230, 301)


def test_maps_of_another_key_are_made_anew(
    network: ContextualNetwork, images: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    made(network, images, Store(tmp_path))
    counted = [Reads(image) for image in images]
    make_maps(network, counted, ["a", "other"], Store(tmp_path), 1, SMALL, as_is)
    assert [image.reads for image in counted] == [0, 1]


def test_windows_of_another_size_are_other_tiles(
    network: ContextualNetwork, images: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    first = made(network, images, Store(tmp_path))
    whole = [first[z] for z in range(2)]
    larger = make_maps(network, images, ["a", "b"], Store(tmp_path), 1, Options(window=240, device="cpu"), as_is)
    assert len(larger.grids[0]) != len(first.grids[0])
    again = made(network, images, Store(tmp_path))
    for maps in (larger, again):
        for z in range(2):
            np.testing.assert_allclose(maps[z], whole[z], atol=1e-6)


def test_a_damaged_tile_is_made_anew_by_the_next_run(
    network: ContextualNetwork, images: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    maps = made(network, images, Store(tmp_path))
    whole = maps[1]
    file = next(tmp_path.glob("map-00001-*"))
    content = bytearray(file.read_bytes())
    content[200:260] = bytes(60)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is missing or damaged; give the command again"):
        maps[1]
    np.testing.assert_array_equal(made(network, images, Store(tmp_path))[1], whole)


def test_a_tile_that_is_lost_is_told(
    network: ContextualNetwork, images: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    maps = made(network, images, Store(tmp_path))
    next(tmp_path.glob("map-00001-*")).unlink()
    with pytest.raises(ValueError, match=r"^SectionMaps\(\): tile \(0, 0\) of section 1 is missing or damaged"):
        maps[1]
