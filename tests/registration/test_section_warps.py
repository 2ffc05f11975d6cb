import numpy as np
import pytest
import torch

from limner.registration.section_warps import SectionWarps, links, register_sections
from limner.registration.velocity_field import Options
from limner.registration.warp import compose, warp

SHAPE = (40, 50)
COARSE = (20, 25)
SPACING = (0.1, 0.2)  # of the coarse grid


def shift(y, x):
    field = torch.zeros(1, 2, *COARSE)
    field[:, 0], field[:, 1] = y, x
    return field


def chain():
    """Five sections; from z to z + 1 everything lies 0.1 (z + 1) mm further down, and as much further left."""
    fields = {}
    for z in range(4):
        step = 0.1 * (z + 1)
        fields[z, z + 1], fields[z + 1, z] = shift(step, -step), shift(-step, step)
    return SectionWarps(fields, SHAPE, SPACING, ((3, 2),))


@pytest.mark.parametrize(("z", "atlas", "expected"), [(0, 3, 0.6), (3, 0, -0.6), (1, 4, 0.9), (2, 3, 0.3), (2, 2, 0)])
def test_shifts_along_a_chain_add_up(z, atlas, expected):
    found = chain().displacement(z, atlas)
    assert found.shape == (1, 2, *SHAPE)
    torch.testing.assert_close(found[:, 0], torch.full((1, *SHAPE), float(expected)))
    torch.testing.assert_close(found[:, 1], torch.full((1, *SHAPE), -float(expected)))


def test_a_chain_follows_fields_from_where_it_arrives():
    """0 -> 1 moves 4 columns right; 1 -> 2 moves down, on its right half alone."""
    second = shift(0.0, 0.0)
    second[:, 0, :, 12:] = 0.5
    warps = SectionWarps({(0, 1): shift(0.0, 4 * SPACING[1]), (1, 2): second}, COARSE, SPACING)
    found = warps.displacement(0, 2)[0, 0, 5]
    np.testing.assert_allclose(found[:8], 0, atol=1e-5)
    np.testing.assert_allclose(found[8:], 0.5, atol=1e-5)


def test_a_direct_pair_goes_before_the_chain():
    warps = chain()
    warps.fields[0, 3] = shift(7.0, 0.0)
    assert warps.displacement(0, 3)[0, :, 5, 5].tolist() == [7.0, 0.0]
    torch.testing.assert_close(warps.displacement(0, 4)[0, :, 5, 5], torch.tensor([1.0, -1.0]))


def test_chains_that_are_kept_are_those_composed_anew():
    """Fields that differ from place to place, asked for in any order, against composing one by one."""
    generator = torch.Generator().manual_seed(0)
    fields = {
        pair: torch.randn(1, 2, *COARSE, generator=generator) * 0.1
        for z in range(5)
        for pair in ((z, z + 1), (z + 1, z))
    }
    warps = SectionWarps(fields, COARSE, SPACING)
    for z, atlas in [(0, 5), (0, 2), (5, 1), (2, 4), (0, 5), (3, 0), (5, 1), (3, 3)]:
        expected = torch.zeros(1, 2, *COARSE)
        towards = 1 if atlas > z else -1
        for at in range(z, atlas, towards):
            expected = compose(expected, fields[at, at + towards], SPACING)
        assert torch.equal(warps.displacement(z, atlas), expected)


def test_arrays_round_trip():
    warps = chain()
    back = SectionWarps.from_arrays(warps.to_arrays())
    assert (back.shape, back.spacing, back.unmatched) == (warps.shape, warps.spacing, warps.unmatched)
    assert back.fields.keys() == warps.fields.keys()
    for pair, field in warps.fields.items():
        assert torch.equal(back.fields[pair], field)


def test_no_pairs_at_all():
    back = SectionWarps.from_arrays(SectionWarps({}, SHAPE, SPACING).to_arrays())
    assert not back.displacement(0, 0).any()


def test_registered_shift_is_found_in_both_directions(make_phantom):
    """Section 1 is section 0 moved 3 pixels down: from 0 to its match in 1 it is +3 pixels of 0.05 mm along y."""
    image, inside = make_phantom((48, 56))
    stack = np.stack([image, np.roll(image, 3, axis=0), np.zeros_like(image)])[:, None].astype(np.float32)
    seen = []
    warps = register_sections(
        stack,
        [(1, 0), (2, 1)],
        (0.05, 0.08),
        options=Options(start="rigid", steps=10),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert warps.unmatched == ((2, 1),)
    assert seen[-1] == (2, 2)
    for z, atlas, sign in [(0, 1, 1), (1, 0, -1)]:
        found = warps.displacement(z, atlas)[0].numpy()
        assert np.median(found[0][inside]) == pytest.approx(sign * 0.15, abs=0.03)
        assert np.median(found[1][inside]) == pytest.approx(0, abs=0.03)
    assert not warps.displacement(2, 1).any()


# ---- sections that are no links of the chain ------------------------------------------------------------------------


def around():
    """Sections 0 to 5, of which 2 is torn and 3 blank: from 1 to 4 everything lies 1 mm further down."""
    fields = {}
    for z, a, y in [(1, 0, 0.1), (4, 1, -1.0), (5, 4, 0.2), (2, 1, 0.03)]:
        fields[z, a], fields[a, z] = shift(y, 0.0), shift(-y, 0.0)
    return SectionWarps(fields, SHAPE, SPACING, anchors={2: 1, 3: 4})


@pytest.mark.parametrize(
    ("z", "atlas", "expected"),
    [
        (0, 5, -0.1 + 1.0 - 0.2),
        (5, 0, 0.1 - 1.0 + 0.2),
        (2, 0, 0.03 + 0.1),
        (2, 5, 0.03 + 1.0 - 0.2),
        (0, 2, -0.1 - 0.03),
        (3, 5, -0.2),  # it stands where 4 stands
        (3, 0, -1.0 + 0.1),
        (5, 3, 0.2),
        (2, 3, 0.03 + 1.0),
        (3, 2, -1.0 - 0.03),
        (2, 1, 0.03),
    ],
)
def test_a_chain_passes_over_torn_and_blank_sections(z, atlas, expected):
    torch.testing.assert_close(around().displacement(z, atlas)[0, 0], torch.full(SHAPE, float(expected)))


def test_anchors_come_back_from_arrays():
    assert SectionWarps.from_arrays(around().to_arrays()).anchors == {2: 1, 3: 4}


@pytest.mark.parametrize(
    ("n", "blank", "torn", "expected"),
    [
        (4, (), (), ([(1, 0), (2, 1), (3, 2)], {})),
        (4, (0,), (3,), ([(2, 1), (3, 2)], {0: 1, 3: 2})),
        (6, (2, 3), (), ([(1, 0), (4, 1), (5, 4)], {2: 1, 3: 4})),
        (3, (1,), (1,), ([(2, 0)], {1: 0})),
        (2, (0, 1), (), ([], {})),
    ],
)
def test_links(n, blank, torn, expected):
    assert links(n, blank, torn) == expected


@pytest.mark.parametrize(("orientation", "axes"), [(1, (0,)), (2, (1,)), (3, (0, 1))])
def test_a_flipped_section_is_registered_the_right_way_round(make_phantom, orientation, axes):
    """Displacements lead from each pixel of the flipped section to its match, and back."""
    image, _ = make_phantom((48, 56))
    image = image.astype(np.float32)
    image[10:16, 12:20] += 100
    flipped = np.flip(np.roll(image, 2, axis=0), axes)
    stack = np.stack([image, flipped])[:, None].astype(np.float32)
    warps = register_sections(
        stack, [(1, 0)], (0.05, 0.05), options=Options(start="none"), orientations={1: orientation}
    )
    for z, atlas, expected in ((1, 0, flipped), (0, 1, image)):
        moved = warp(torch.from_numpy(stack[atlas][None].copy()), warps.displacement(z, atlas), (0.05, 0.05))[0, 0]
        inner = np.s_[8:-8, 8:-8]
        assert np.corrcoef(moved.numpy()[inner].ravel(), expected[inner].ravel())[0, 1] > 0.97
