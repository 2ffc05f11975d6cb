import numpy as np
import pytest
import torch
from scipy import ndimage

from limner import mirror_image
from limner.fusion_scale import fitted_rho
from limner.mirror_image import ASYMMETRY, MirrorImage, ask_mirror_image
from limner.section_fusion import FusionOptions, SectionFusion


def halves(alike):
    """Two lobes, on either side of a slanting plane, that swell and shrink faster than sections are labelled."""
    positions, spacing, shape = 0.1 * np.arange(41), (0.1, 0.1), (20, 44)
    y, x = (((np.arange(n) - (n - 1) / 2) * 0.1) for n in shape)
    z, y, x = np.meshgrid(positions - 2.0, y, x, indexing="ij")
    across, deep = x + 0.12 * z, z - 0.12 * x  # a plane turned by .12 radians
    width = 1.0 + 0.4 * np.sin(2 * np.pi * deep / 2.2)
    inside = np.abs(across) < width if alike else (x > 0.3) & (x < 1.2)  # one lobe alone, everywhere the same
    labels = np.where(inside & (np.abs(y) < 0.7), 3, 0)
    levels = np.where(labels, 100.0, 0.0) + 60 * np.exp(-(across**2)) * (1 + np.sin(deep))
    images = ndimage.gaussian_filter(levels, 1)[:, None].astype(np.float32)
    options = FusionOptions(label_flow=False)
    return SectionFusion(images, labels, tuple(range(0, 41, 8)), positions, spacing, options)


def mistakes(fusion):
    between = [z for z in range(8, 33) if z % 8]
    structures = np.array([0, 3])
    return sum((structures[fusion.evidence(z).argmax(dim=0).numpy()] != fusion.labels[z]).sum() for z in between)


def test_the_mirror_image_helps_where_halves_are_alike():
    fusion, without = halves(alike=True), halves(alike=True)
    found = ask_mirror_image(fusion)
    assert found == {"rho_scale": fusion.rho_scale, "mirror": 1.0}
    assert fusion.rho_scale != fitted_rho(without)[0]
    assert fusion.beside.matrix[0, 2] == pytest.approx(-0.24, abs=0.06)  # twice the angle
    assert mistakes(fusion) < 0.85 * mistakes(without)


def test_the_mirror_image_is_not_asked_where_halves_differ():
    fusion, without = halves(alike=False), halves(alike=False)
    assert ask_mirror_image(fusion) == {"rho_scale": fitted_rho(without)[0], "mirror": 0.0}
    assert fusion.beside is None
    without.rho_scale = fusion.rho_scale
    torch.testing.assert_close(fusion.evidence(12), without.evidence(12))


def test_no_mirror_image_with_many_structures_or_few_sections(monkeypatch):
    fusion = halves(alike=True)
    assert MirrorImage.of(fusion) is not None
    fusion.labelled = (0, 16, 32)
    assert MirrorImage.of(fusion) is None
    monkeypatch.setattr(mirror_image, "MANY", 1)
    assert MirrorImage.of(halves(alike=True)) is None


def test_what_the_mirror_image_says_is_read_on_the_other_side():
    """Where a point is mirrored onto a labelled section that holds its label, on the other side; and an input."""
    fusion = halves(alike=True)
    fusion.beside = MirrorImage.of(fusion)
    distances, variance = fusion.beside.says(12, None)
    assert distances.shape == (2, 20, 44)
    assert variance.shape == (1, 20, 44)
    assert variance[0, :, 22].mean() > variance[0, :, 34].mean() > ASYMMETRY  # further out, nearer to 16
    found = distances.argmax(dim=0).numpy() * 3
    own = fusion.blended_distances(12)
    blended = 3 * torch.einsum("n,nlyx->lyx", own[1], own[0]).argmax(dim=0).numpy()
    truth = fusion.labels[12]
    assert (found != truth).sum() < (blended != truth).sum()
    assert any(np.array_equal(distances.numpy(), i) for i in fusion.inputs(12) if isinstance(i, np.ndarray))


def test_a_section_left_out_is_unknown_to_its_mirror_image():
    fusion = halves(alike=True)
    image = MirrorImage.of(fusion)
    other = halves(alike=True)
    other.labels[16] = 0
    other.labels[16, 2:5, 2:5] = 3
    without = MirrorImage(other, image.matrix)  # the plane has seen all labelled sections
    torch.testing.assert_close(without.says(16, 16)[0], image.says(16, 16)[0])
    assert (without.says(12, None)[0] - image.says(12, None)[0]).abs().max() > 0.1  # elsewhere its labels count


def test_every_labelled_section_on_the_way_is_read():
    fusion = halves(alike=True)
    fusion.labelled = (0, 5, 11, 16, 21, 27, 32, 40)
    image = MirrorImage.of(fusion)
    column, _ = image.column(image.mirrored_points(16))
    read = set(column.positions.tolist())
    assert all(min(abs(r - fusion.positions[a]) for r in read) < 1e-5 for a in (11, 16, 21))
