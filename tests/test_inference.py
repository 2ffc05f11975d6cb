"""Tile by tile against the whole image at once."""

import numpy as np
import pytest
import torch
from torch import nn

from limner.inference import PAPER_WINDOWS, Options, batches, predict, unit_range
from limner.networks.tiled_unet import TiledUNet


def network_with(in_channels=3, levels=5, seed=0):
    """Batch statistics as after training; logits spread so that both classes occur."""
    torch.manual_seed(seed)
    network = TiledUNet(in_channels, widths=(4, 6, 8, 10, 12)[:levels])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.1, 0.3)
            nn.init.normal_(module.bias, 0, 0.5)
    return network.eval()


def picture(*shape, seed=1):
    """Smooth blobs and noise, 8 bit."""
    draw = np.random.default_rng(seed)
    y, x = np.indices(shape[:2])
    waves = (np.sin(y / 7) * np.cos(x / 9))[(...,) + (None,) * (len(shape) - 2)]
    return np.clip(110 + 70 * waves + draw.normal(0, 30, shape), 0, 255).astype(np.uint8)


def whole(network, image):
    """The network on the whole image, in its plain form."""
    pixels = torch.from_numpy(image.astype(np.float32) / 255)
    pixels = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)[None]
    with torch.no_grad():
        return torch.softmax(network(pixels), 1)[0].numpy()


class Sink:
    """An image of probabilities, NaN where nothing was written; refuses a core pixel that is written twice."""

    def __init__(self, shape):
        self.found = np.full((2, *shape), np.nan, np.float32)
        self.tiles = []

    def __call__(self, tile, probabilities):
        assert probabilities.dtype == np.float32
        assert probabilities.shape == (2, *tile.kept.shape)
        core = probabilities[:, *tile.core.within(tile.kept)]
        assert np.isnan(self.found[:, *tile.core.slices]).all()
        self.found[:, *tile.core.slices] = core
        self.tiles.append(tile)


class Watched:
    """An image that notes the largest region anybody read."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.reads = pixels, pixels.shape, []

    def __getitem__(self, region):
        found = self.pixels[region]
        self.reads.append(found.shape[:2])
        return found


def tiled(network, image, options, **more):
    sink = Sink(image.shape[:2])
    predict(network, image, sink, options, **more)
    return sink.found


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (240, 256), (257, 271), (419, 390)])
def test_tiles_with_their_halo_give_what_the_whole_image_gives(shape, channels):
    network = network_with(channels or 1)
    image = picture(*shape, *([channels] if channels else []))
    expected = whole(network, image)
    for window in (208, 256, 320):
        found = tiled(network, image, Options(window=window, device="cpu"))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(found.argmax(0), expected.argmax(0))


def test_many_sizes_windows_margins_and_batches():
    """Three levels have a halo of 22, so that many tiles fit a small image."""
    network, draw = network_with(levels=3), np.random.default_rng(3)
    for _ in range(25):
        image = picture(*draw.integers(1, 220, 2), 3)
        margin, window = int(draw.choice([0, 4, 9])), 80 + 4 * int(draw.integers(0, 10))
        options = Options(window=window, margin=margin, batch=int(draw.integers(1, 4)), device="cpu")
        expected = whole(network, image)
        found = tiled(network, image, options)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(found.argmax(0), expected.argmax(0))


def test_what_is_kept_beyond_the_core_holds_as_well():
    network, image = network_with(levels=3), picture(150, 170, 3)
    expected = whole(network, image)

    def check(tile, probabilities):
        np.testing.assert_allclose(probabilities, expected[:, *tile.kept.slices], atol=1e-5)

    grid = predict(network, image, check, Options(window=112, margin=12, device="cpu"))
    assert len(grid) > 4
    assert any(tile.kept.shape > tile.core.shape for tile in grid)


def test_less_halo_than_the_network_asks_for_shows():
    network, image = network_with(levels=3), picture(200, 200, 3)
    error = np.abs(tiled(network, image, Options(window=64, halo=8, device="cpu")) - whole(network, image))
    assert error.max() > 1e-4


def test_the_papers_windows_cover_the_image_and_nearly_agree():
    network, image = network_with(), picture(300, 400, 3)
    reads = Watched(image)
    found = tiled(network, reads, PAPER_WINDOWS)
    assert reads.reads == [(256, 256), (256, 256), (256, 144), (172, 256), (172, 256), (172, 144)]
    assert (found.argmax(0) == whole(network, image).argmax(0)).mean() > 0.99


def test_no_more_than_the_window_is_ever_read_and_training_mode_and_device_stay_the_callers():
    network, image = network_with(levels=3).train(), Watched(picture(300, 310, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = tiled(network, image, Options(window=96, device="cpu"))
    assert max(max(read) for read in image.reads) == 96
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    np.testing.assert_allclose(found, whole(network.eval(), image.pixels), atol=1e-5)


def test_glass_is_neither_read_nor_computed():
    network, image = network_with(levels=3), Watched(picture(200, 210, 3))
    expected = whole(network, image.pixels)
    found = tiled(network, image, Options(window=96, device="cpu"), skip=lambda tile: tile.index[0] == 1)
    grid = Options(window=96).grid(network, (200, 210))
    rows = grid[1, 0].core.slices[0]
    assert len(image.reads) == len(grid) - grid.counts[1]
    assert (found[0, rows] == 1).all()
    assert (found[1, rows] == 0).all()
    np.testing.assert_allclose(found[:, : rows.start], expected[:, : rows.start], atol=1e-5)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_stopped_run_goes_on_where_it_stopped(jobs):
    network, image, options = network_with(levels=3), picture(200, 210, 3), Options(window=96, jobs=jobs, device="cpu")
    sink, told = Sink((200, 210)), []

    def full_disk(tile, probabilities):
        if len(sink.tiles) == 4:
            raise OSError("disk full")
        sink(tile, probabilities)

    with pytest.raises(OSError, match="disk full"):
        predict(network, image, full_disk, options)
    done = {tile.index for tile in sink.tiles}
    assert len(done) == 4
    again = Watched(image)
    grid = predict(network, again, sink, options, done=done, progress=lambda *said: told.append(said))
    assert len(again.reads) == len(grid) - 4
    assert told[0] == (4, len(grid))
    assert told[-1] == (len(grid), len(grid))
    assert [n for n, _ in told] == sorted(n for n, _ in told)
    np.testing.assert_allclose(sink.found, whole(network, image), atol=1e-5)


def test_batches_hold_tiles_of_one_kind_in_their_order():
    grid = Options(window=96).grid(network_with(levels=3), (200, 400))
    found = list(batches(grid, 3))
    assert [tile for batch in found for tile in batch] == list(grid)
    assert max(len(batch) for batch in found) == 3
    for batch in found:
        assert len({(tile.read.shape, str(tile.kept.within(tile.read))) for tile in batch}) == 1


def test_dask_arrays_are_read_by_the_tile():
    array = pytest.importorskip("dask.array", reason="dask is not installed")
    network, image = network_with(levels=3), picture(130, 140, 3)
    found = tiled(network, array.from_array(image, chunks=(50, 60, 3)), Options(window=96, device="cpu"))
    np.testing.assert_allclose(found, whole(network, image), atol=1e-5)


@pytest.mark.filterwarnings("default")  # of distributed's own making
def test_a_cluster_gives_the_same_result():
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    network, image, told = network_with(levels=3), picture(200, 210, 3), []
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        options = Options(window=96, device="cpu", scheduler=cluster.scheduler_address)
        found = tiled(network, image, options, progress=lambda *said: told.append(said))
    np.testing.assert_allclose(found, tiled(network, image, Options(window=96, device="cpu")), atol=1e-6)
    assert told[-1][0] == told[-1][1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_same_result():
    network, image = network_with(), picture(419, 390, 3)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = tiled(network, image, Options(window=256, batch=4, device="cuda"))
    np.testing.assert_allclose(found, whole(network, image), atol=1e-4)


def test_ranges_of_whole_numbers():
    np.testing.assert_array_equal(unit_range(np.array([0, 65535], np.uint16)), [0, 1])
    np.testing.assert_array_equal(unit_range(np.array([-2.5, 7])), np.float32([-2.5, 7]))


def test_images_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match=r"\(Y, X\) or \(Y, X, C\)"):
        predict(network_with(), np.zeros((2, 3, 4, 5)), Sink((2, 3)))
    with pytest.raises(ValueError, match="multiple of 16 from 208 on"):
        predict(network_with(), np.zeros((300, 300, 3)), Sink((300, 300)), Options(window=192))
