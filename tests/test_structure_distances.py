import numpy as np
import pytest
import torch

from limner.distances import signed_distances
from limner.structure_distances import StructureDistances

SPACING, CLIP = (0.1, 0.2), 0.55


@pytest.fixture
def labels():
    """Structures of many sizes on a section whose sides are no multiple of a block."""
    y, x = np.mgrid[:61, :45]
    found = np.zeros((61, 45), np.int32)
    for label, (row, column, radius) in {3: (20, 20, 15), 40: (20, 14, 4), 8: (58, 40, 6), 900: (5, 43, 1)}.items():
        found[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = label
    return found


def dense(labels, structures):
    return torch.from_numpy(signed_distances(labels, structures, SPACING, CLIP))


def test_they_are_the_signed_distances(labels):
    distances = StructureDistances.of(labels, SPACING, CLIP)
    assert distances.structures == (0, 3, 8, 40, 900)
    wanted = [0, 8, 5, 900]  # 5 is not there
    assert torch.equal(distances.dense(wanted), dense(labels, wanted))
    assert torch.equal(distances.of_structure(40), dense(labels, [40])[0])


@pytest.mark.parametrize("rows", [slice(0, 61), slice(7, 9), slice(40, 61), slice(16, 24)])
@pytest.mark.parametrize("columns", [slice(0, 45), slice(8, 16), slice(44, 45), slice(5, 30)])
def test_windows_hold_what_is_near_them(labels, rows, columns):
    distances = StructureDistances.of(labels, SPACING, CLIP)
    whole = dense(labels, distances.structures)
    near = distances.near(rows, columns)
    assert torch.equal(distances.at(near, rows, columns), whole[near][:, rows, columns])
    far = np.setdiff1d(range(5), near.tolist())
    assert (whole[far][:, rows, columns] == -CLIP).all()
    # of what is passed over, and of that alone, the blocks around are clipped, too
    blocks = [slice(s.start // 8 * 8, -(-s.stop // 8) * 8) for s in (rows, columns)]
    assert [int((d[tuple(blocks)] > -CLIP).any()) for d in whole] == [int(i in near) for i in range(5)]


def test_what_is_kept_follows_what_is_near_not_the_number_of_structures():
    y, x = np.mgrid[:160, :160]
    labels = 1 + (y // 10) * 16 + x // 10  # 256 structures of 10 x 10 pixels
    distances = StructureDistances.of(labels, (0.1, 0.1), 0.5)
    assert len(distances.structures) == 256
    assert distances.blocks.numel() < 0.05 * 256 * labels.size


def test_a_structure_that_fills_the_section_is_near_everywhere():
    distances = StructureDistances.of(np.full((9, 20), 4), SPACING, CLIP)
    assert torch.equal(distances.of_structure(4), torch.full((9, 20), CLIP))
    assert distances.near(slice(8, 9), slice(19, 20)).tolist() == [0]
