import numpy as np
import pytest
import torch

from limner.distances import signed_distances
from limner.registration.label_flow import Options, few, follow, label_velocity
from limner.registration.warp import jacobian_determinants, warp

SPACING = (0.05, 0.04)
CLIP = 1.0


def disc(y, x, radius, shape=(80, 100)):
    rows, columns = np.indices(shape)
    return np.hypot((rows - y) * SPACING[0], (columns - x) * SPACING[1]) < radius


def distances(labels, structures=(0, 1, 2)):
    return torch.from_numpy(signed_distances(labels.astype(int), structures, SPACING, CLIP))


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def halfway(fixed, moving, velocity, share=0.5):
    """The labels a share of the way from the fixed to the moving section."""
    shape = fixed.shape[1:]
    back, on = (follow(velocity, part, shape, SPACING) for part in (-share, 1 - share))
    near = warp(fixed[None], back, SPACING) * (1 - share) + warp(moving[None], on, SPACING) * share
    return near[0].argmax(dim=0).numpy()


LOOSE = Options(pixels=136, stiffness=0.1, steps=60)


def test_a_structure_that_moved_is_met_halfway():
    """A disc .24 mm across that moves by .24 mm: where it was and where it goes overlap nowhere."""
    before, after = (np.where(disc(40, x, 0.12), 1, 0) for x in (47, 53))
    fixed, moving = distances(before, (0, 1)), distances(after, (0, 1))
    velocity = label_velocity(fixed, moving, SPACING, CLIP, LOOSE)
    assert velocity.shape == (1, 2, 80, 100)
    assert dice(halfway(fixed, moving, velocity) == 1, disc(40, 50, 0.12)) > 0.85
    assert not halfway(fixed, moving, torch.zeros_like(velocity)).any()
    assert dice(halfway(fixed, moving, velocity, share=1 / 3) == 1, disc(40, 49, 0.12)) > 0.85


def test_stiffness_holds_it_back():
    before, after = (np.where(disc(40, x, 0.12), 1, 0) for x in (47, 53))
    fixed, moving = distances(before, (0, 1)), distances(after, (0, 1))
    sizes = [
        float(label_velocity(fixed, moving, SPACING, CLIP, Options(stiffness=s))[0, 1, 40, 50])
        for s in (0.1, 3.0, 100.0)
    ]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2] > 0


def test_the_whole_way_leads_from_one_section_to_the_other_and_back():
    before = np.where(disc(40, 40, 0.9), 1, 0) + disc(35, 36, 0.3)
    after = np.where(disc(43, 47, 0.8), 1, 0) + disc(40, 44, 0.4)
    fixed, moving = distances(before), distances(after)
    velocity = label_velocity(fixed, moving, SPACING, CLIP, Options(stiffness=0.01, steps=60))
    there, back = (follow(velocity, share, fixed.shape[1:], SPACING) for share in (1.0, -1.0))
    carried = warp(moving[None], there, SPACING)[0].argmax(dim=0).numpy()
    returned = warp(fixed[None], back, SPACING)[0].argmax(dim=0).numpy()
    for structure in (1, 2):  # all of the disc, and the disc in it
        assert dice(carried >= structure, before >= structure) > 0.9
        assert dice(returned >= structure, after >= structure) > 0.9
        assert dice(after >= structure, before >= structure) < 0.8
    assert float(jacobian_determinants(there, SPACING).min()) > 0


def test_labels_that_agree_stay_where_they_are():
    labels = distances(np.where(disc(40, 50, 0.9), 1, 0))
    assert label_velocity(labels, labels.clone(), SPACING, CLIP).abs().max() < 1e-4


def test_a_structure_that_one_section_lacks_folds_nothing():
    fixed, moving = distances(np.where(disc(40, 50, 0.9), 1, 0)), distances(np.zeros((80, 100)))
    velocity = label_velocity(fixed, moving, SPACING, CLIP)
    assert velocity.isfinite().all()
    assert float(jacobian_determinants(follow(velocity, 1.0, (80, 100), SPACING), SPACING).min()) > 0


def test_large_sections_are_compared_on_a_small_grid():
    before, after = (np.where(disc(y, 120, 1.5, (160, 260)), 1, 0) for y in (80, 86))
    fixed, moving = distances(before, (0, 1)), distances(after, (0, 1))
    velocity = label_velocity(fixed, moving, SPACING, CLIP, Options(pixels=65, stiffness=0.1))
    assert velocity.shape == (1, 2, 40, 65)
    found = follow(velocity, 1.0, (160, 260), SPACING)
    assert found.shape == (1, 2, 160, 260)
    assert found[0, 0, 80, 120] == pytest.approx(6 * SPACING[0], rel=0.25)


def test_random_sums_keep_squared_differences():
    maps = torch.randn(2, 300, 20, 30, generator=torch.Generator().manual_seed(1))
    asked = []

    def of(chosen):
        asked.append(len(chosen))
        return maps[:, list(chosen)].transpose(0, 1)

    sums = few(of, range(300), 32).transpose(0, 1)
    assert sums.shape == (2, 32, 20, 30)
    assert sum(asked) == 300
    assert max(asked) == 32  # never all at once
    kept, all_of_them = ((m[0] - m[1]).square().sum(dim=0).mean() for m in (sums, maps))
    assert float(kept) == pytest.approx(float(all_of_them), rel=0.1)
    assert torch.equal(few(of, range(9), 32), maps[:, :9].transpose(0, 1))


def test_many_structures_move_asfew_do():
    """Forty vertical stripes, all .12 mm further right."""
    stripes = np.indices((60, 200))[1] // 5
    before, after = stripes, np.roll(stripes, 3, axis=1)
    names = tuple(range(40))
    velocities = [
        label_velocity(distances(before, names), distances(after, names), SPACING, CLIP, Options(most=most, pixels=200))
        for most in (40, 32)
    ]
    middle = [float(v[0, 1, 20:40, 60:140].mean()) for v in velocities]
    assert middle[0] == pytest.approx(0.12, rel=0.3)
    assert middle[1] == pytest.approx(middle[0], rel=0.2)
