import numpy as np
import pytest
import torch

from limner.completion import common_deviation
from limner.tiled_evidence import Tile, TiledEvidence, pixels_inside

L, SHAPE = 7, (5, 8)


def tiled_and_dense():
    """Two tiles that tell apart three and five of seven structures; the others share a chance that differs by pixel."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.empty(L, *SHAPE)
    tiles = []
    for columns, near in ((slice(0, 3), [0, 2, 6]), (slice(3, 8), [0, 1, 3, 4, 5])):
        size = SHAPE[0], columns.stop - columns.start
        odds = 3 * torch.randn(L, *size, generator=generator)
        far = [i for i in range(L) if i not in near]
        odds[far] = odds.amin(dim=0) - torch.rand(size, generator=generator)  # never the likeliest
        log_p = odds.log_softmax(dim=0)
        dense[:, :, columns] = log_p
        tiles.append(Tile(slice(0, SHAPE[0]), columns, torch.tensor(near), log_p[near], log_p[far[0]]))
    return TiledEvidence(tiles, L, SHAPE), dense


def every(evidence):
    """All that can be asked of it, as arrays."""
    pixels = torch.tensor([39, 0, 2, 3, 17, 17])
    highest, best = evidence.best()
    return [evidence.dense(), highest, best, evidence.at(pixels), torch.tensor(evidence.entropy())] + [
        torch.from_numpy(a) for a in evidence.areas()
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_tiles_say_what_dense_probabilities_say(temperature):
    evidence, dense = tiled_and_dense()
    evidence, dense = evidence.tempered(temperature), (dense / temperature).log_softmax(dim=0)
    chances = dense.exp()
    pixels = torch.tensor([39, 0, 2, 3, 17, 17])
    expected = [
        dense,
        chances.amax(dim=0),
        chances.argmax(dim=0),
        dense.flatten(1)[:, pixels],
        -(chances * dense).sum(dim=0).mean(),
        torch.bincount(chances.argmax(dim=0).flatten(), minlength=L),
        torch.from_numpy(common_deviation(chances.numpy())),
    ]
    for found, wanted in zip(every(evidence), expected, strict=True):
        torch.testing.assert_close(found, wanted, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_strips_of_all_are_the_whole():
    dense = torch.randn(3, 130, 100, generator=torch.Generator().manual_seed(1)).log_softmax(dim=0)
    evidence = TiledEvidence.of_all(dense)
    assert [(t.rows.start, t.rows.stop) for t in evidence.tiles] == [(0, 40), (40, 80), (80, 120), (120, 130)]
    assert torch.equal(evidence.dense(), dense)
    assert torch.equal(evidence.best()[1], dense.argmax(dim=0))
    np.testing.assert_allclose(evidence.areas()[1], common_deviation(dense.exp().numpy()), rtol=1e-5)


def test_a_chance_that_many_share_is_not_lost():
    """No atlas reaches: each of 400 is as likely, of which background alone is told apart."""
    log_p = torch.full((1, 2, 2), 1 / 400).log()
    evidence = TiledEvidence([Tile(slice(0, 2), slice(0, 2), torch.tensor([0]), log_p, log_p[0])], 400, (2, 2))
    assert evidence.entropy() == pytest.approx(np.log(400), rel=1e-5)
    torch.testing.assert_close(evidence.tempered(2.5).dense(), evidence.dense())
    likeliest, deviation = evidence.areas()
    assert likeliest.tolist() == [4] + [0] * 399
    np.testing.assert_allclose(deviation, 4 * np.sqrt(1 / 400 * 399 / 400), rtol=1e-5)


def test_pixels_inside_are_those_of_the_tile():
    pixels = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    inside, row, column = pixels_inside(slice(2, 5), slice(3, 9), pixels, width=10)
    section = np.arange(60).reshape(6, 10)[2:5, 3:9]
    assert sorted(pixels[inside].tolist()) == section.ravel().tolist()
    assert section[row, column].tolist() == pixels[inside].tolist()


def test_evidence_combined_with_other_is_made_tile_by_tile_and_says_what_dense_sums_say():
    evidence, dense = tiled_and_dense()
    other = torch.randn(L, *SHAPE, generator=torch.Generator().manual_seed(4))
    sizes = []

    def product(tile):
        sizes.append(tile.log_p.numel())
        return (tile.log_p + other[(slice(None), *tile.where)]).log_softmax(dim=0)

    combined = evidence.combined(product)
    assert sizes == []
    whole = TiledEvidence.of_all((dense + other).log_softmax(dim=0))
    for temperature in (1.0, 2.0):
        for found, wanted in zip(
            every(combined.tempered(temperature)), every(whole.tempered(temperature)), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert max(sizes) == L * 5 * 5  # the wider of the two tiles


def test_combined_tiles_of_a_large_section_are_strips():
    dense = torch.randn(3, 130, 100, generator=torch.Generator().manual_seed(1)).log_softmax(dim=0)
    whole = Tile(slice(0, 130), slice(0, 100), torch.arange(3), dense, torch.zeros(130, 100))
    combined = TiledEvidence([whole], 3, (130, 100)).combined(lambda tile: tile.log_p)
    assert [t.rows for t in combined.tiles] == [slice(0, 40), slice(40, 80), slice(80, 120), slice(120, 130)]
    assert torch.equal(combined.dense(), dense)


def test_some_structures_alone():
    evidence, dense = tiled_and_dense()
    assert torch.equal(evidence.dense(2, 6), evidence.dense()[2:6])
    torch.testing.assert_close(evidence.dense(2, 6), dense[2:6], rtol=1e-5, atol=1e-5)


def test_where_nothing_is_known_every_structure_is_as_likely():
    evidence = TiledEvidence.of_none(5, (130, 100))
    assert torch.equal(evidence.dense(), torch.full((5, 130, 100), 1 / 5).log())
    assert [tile.rows.stop for tile in evidence.tiles] == [40, 80, 120, 130]
