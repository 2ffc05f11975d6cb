"""Completion of a real stack damaged on purpose: the sample, every other pixel, three labelled sections.

The harm that a damaged section does to the others, and what becomes of it itself, beside the undamaged stack.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from limner.annotations import SectionLabels
from limner.io import read, read_label_volume
from limner.methods.stack_completion import Model, complete
from limner.metrics.pixels import score_stack
from limner.registration.stack_alignment import find_faults, find_torn
from limner.space import Space
from limner.stack_settings import Settings
from limner.volume import LabelMap, Volume

SAMPLE = Path(__file__).parents[2] / "examples" / "data" / "mouse_stack"
N, LABELLED, DAMAGED = 13, (0, 6, 12), 3
SPACE = Space((N, 97, 136), (0.05, 0.08, 0.08))
WITHIN_MM = 0.2


@dataclass
class Completed:
    """Accuracy of each unlabelled section, the labels and the notes."""

    accuracy: dict[int, float]
    labels: np.ndarray
    notes: tuple[str, ...]

    def others(self):
        return float(np.mean([a for z, a in self.accuracy.items() if z != DAMAGED]))

    def faults(self):
        return [note for note in self.notes if note.startswith("Section ")]


FUSION = Settings(method="fusion")
GEM = Settings(method="gem", training_steps=60, network_pixels=68)


def completed(images, truth, labelled=None, settings=FUSION):
    known = np.zeros_like(truth)
    known[list(LABELLED)] = (truth if labelled is None else labelled)[list(LABELLED)]
    annotations = SectionLabels(LabelMap(known, SPACE), LABELLED)
    done = complete(Volume(images, SPACE), annotations, settings, device="cpu", jobs=1)
    unlabelled = [z for z in range(N) if z not in LABELLED]
    score = score_stack(done.labels, LabelMap(truth, SPACE), unlabelled, WITHIN_MM)
    return Completed({z: score.accuracy[z] for z in unlabelled}, done.labels.labels, done.notes)


@pytest.fixture(scope="module")
def sample():
    images = read(SAMPLE / "images.nii.gz")
    truth = read_label_volume(SAMPLE / "truth.nii.gz", like=images)
    pixels = ndimage.uniform_filter(images.pixels[20 : 20 + N].astype(np.float32), (0, 2, 2))
    return pixels[:, ::2, ::2].copy(), truth.labels[20 : 20 + N, ::2, ::2].copy()


@pytest.fixture(scope="module")
def undamaged(sample):
    return completed(*sample)


@pytest.fixture(scope="module")
def undamaged_by_gem(sample):
    return completed(*sample, settings=GEM)


@pytest.fixture
def shown(monkeypatch):
    """The labelled sections that local training, and with it GEM, is shown."""
    shown, original = set(), Model._adapted

    def spy(model, atlases, structures):
        shown.update(atlases)
        return original(model, atlases, structures)

    monkeypatch.setattr(Model, "_adapted", spy)
    return shown


def background(section):
    return float(np.median(np.concatenate([section[0], section[-1], section[:, 0], section[:, -1]])))


def shifted(section, pixels, fill):
    return ndimage.shift(section, pixels, order=0, cval=fill)


def right_part(shape):
    """What lies behind a slanted cut."""
    y, x = np.indices(shape)
    return x - 75 + 0.4 * (y - 48) > 0


def torn(section):
    """The right part moves 0.6 mm to the right."""
    behind = right_part(section.shape)
    fill = background(section)
    moved = shifted(np.where(behind, section, np.nan), (0, 8), np.nan)
    return np.where(np.isnan(moved), np.where(behind, fill, section), moved).astype(np.float32)


def folded(section):
    """The right part moves 0.6 mm to the left, over what is there."""
    behind = right_part(section.shape)
    fill = background(section)
    moved = shifted(np.where(behind, section - fill, 0), (0, -8), 0)
    return (np.where(behind, fill, section) + moved).astype(np.float32)


def test_the_undamaged_stack_gives_no_alarm(undamaged):
    assert undamaged.faults() == []
    assert undamaged.others() > 0.9


def test_a_missing_section_takes_its_labels_from_its_neighbours(sample, undamaged):
    """The sections after it lie 10 % of the width further on: a chain through the missing one would lose them."""
    images, truth = sample[0].copy(), sample[1].copy()
    for z in range(DAMAGED, N):
        images[z] = shifted(images[z], (0, 13), background(images[z]))
    truth[DAMAGED + 1 :] = shifted(truth[DAMAGED + 1 :], (0, 0, 13), 0)
    images[DAMAGED] = background(images[DAMAGED]) + np.random.default_rng(0).normal(0, 2, images.shape[1:])
    found = completed(images, truth)
    assert found.faults() == [f"Section {DAMAGED} is blank: its labels rest on its neighbours alone."]
    assert found.others() > undamaged.others() - 0.01
    assert found.accuracy[DAMAGED] > undamaged.accuracy[DAMAGED] - 0.03


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((0, 1), "turned by 180 degrees"),
        ((1,), "mirrored left to right"),
        ((0,), "mirrored top to bottom"),
    ],
)
@pytest.mark.parametrize("damaged", [DAMAGED, 6])
def test_a_turned_or_mirrored_section_is_told_and_used_the_right_way_round(sample, undamaged, axes, words, damaged):
    """Also where it is a labelled one, whose labels are turned with it."""
    images, truth = sample[0].copy(), sample[1].copy()
    images[damaged], truth[damaged] = np.flip(images[damaged], axes), np.flip(truth[damaged], axes)
    found = completed(images, truth)
    assert [note.split(":")[0] for note in found.faults()] == [f"Section {damaged} is {words}"]
    assert found.others() > undamaged.others() - 0.01
    assert found.accuracy[DAMAGED] > undamaged.accuracy[DAMAGED] - 0.02


@pytest.mark.parametrize("damage", [torn, folded])
def test_a_torn_or_folded_section_harms_no_other(sample, undamaged, damage):
    images, truth = sample[0].copy(), sample[1]
    images[DAMAGED] = damage(images[DAMAGED])
    found = completed(images, truth)
    assert len(found.faults()) == 1
    assert found.faults()[0].startswith(f"Section {DAMAGED} is torn or folded")
    assert found.others() > undamaged.others() - 0.002
    left = ~right_part(truth.shape[1:])  # of the rest nobody knows where it should lie
    assert np.mean((found.labels == truth)[DAMAGED, left]) > 0.9


@pytest.mark.parametrize("damage", [torn, folded])
@pytest.mark.parametrize("at", [0, N - 1])
def test_a_torn_or_folded_section_at_an_end_is_told(sample, damage, at):
    """Of a sound stack nothing is told, see above; nor of its pieces, each of which ends elsewhere."""
    images = sample[0].copy()
    images[at] = damage(images[at])
    inspection = find_faults(images[:, None], SPACE.spacing[1:])
    assert inspection.torn == (at,)
    assert inspection.faults()[at].startswith("torn or folded (its neighbour fits")
    whole = find_faults(sample[0][:, None], SPACE.spacing[1:])
    pairs = dict(zip(map(tuple, whole.pairs.tolist()), whole.correlation.tolist(), strict=True))
    for first in range(N - 8):
        for last in range(first + 8, N):
            near = np.array([pairs[z, z + 1] for z in range(first, last)])
            far = np.array([pairs[z, z + 2] for z in range(first, last - 1)])
            assert find_torn(near, far) == []


def test_brightness_that_drifts_by_a_third_does_little(sample, undamaged):
    images, truth = sample
    drift = np.random.default_rng(1).uniform(0.7, 1.3, N).astype(np.float32)
    found = completed(images * drift[:, None, None], truth)
    assert found.faults() == []
    assert np.mean(list(found.accuracy.values())) > np.mean(list(undamaged.accuracy.values())) - 0.01


def test_a_section_shifted_by_a_tenth_of_its_width_gets_its_labels_where_it_lies(sample, undamaged):
    images, truth = sample[0].copy(), sample[1].copy()
    images[DAMAGED] = shifted(images[DAMAGED], (0, 13), background(images[DAMAGED]))
    truth[DAMAGED] = shifted(truth[DAMAGED], (0, 13), 0)
    found = completed(images, truth)
    assert found.faults() == []
    assert found.others() > undamaged.others() - 0.01
    assert found.accuracy[DAMAGED] > undamaged.accuracy[DAMAGED] - 0.02


def test_a_structure_of_one_neighbour_ends_halfway(sample, undamaged):
    """It is wiped from sections 6 and 12: it fades out between, and nothing else changes."""
    images, truth = sample
    largest = int(np.bincount(truth[0].ravel())[1:].argmax()) + 1
    wiped = truth.copy()
    wiped[6:][wiped[6:] == largest] = 0
    found = completed(images, truth, wiped)
    areas = [(found.labels[z] == largest).sum() / (truth[z] == largest).sum() for z in range(N)]
    assert areas[1] > 0.5
    assert max(areas[4:]) < 0.1
    assert all(a > b - 0.05 for a, b in pairwise(areas[:6]))
    rest = (truth != largest) & (undamaged.labels != largest) & (found.labels != largest)
    rest[list(LABELLED)] = False
    assert np.mean(found.labels[rest] == undamaged.labels[rest]) > 0.98


def test_labels_in_one_hemisphere_stay_there(sample, undamaged):
    images, truth = sample
    half = truth.copy()
    half[:, :, 68:] = 0
    found = completed(images, truth, half)
    left, right = np.s_[:, :, :64], np.s_[:, :, 72:]
    assert not found.labels[right].any()
    before, after = (np.mean(labels[left] == truth[left]) for labels in (undamaged.labels, found.labels))
    assert after > before - 0.005


@pytest.mark.parametrize("damaged", [DAMAGED, 6])
@pytest.mark.parametrize("damage", ["blank", "mirrored"])
def test_the_network_is_not_taught_by_what_misleads_it(sample, undamaged_by_gem, shown, damage, damaged):
    images, truth = sample[0].copy(), sample[1].copy()
    if damage == "blank":
        noise = np.random.default_rng(0).normal(0, 2, images.shape[1:])
        images[damaged] = background(images[damaged]) + noise
    else:
        images[damaged], truth[damaged] = np.flip(images[damaged], 1), np.flip(truth[damaged], 1)
    found = completed(images, truth, settings=GEM)
    words = {"blank": "blank", "mirrored": "mirrored left to right"}
    assert [note.split(":")[0] for note in found.faults()] == [f"Section {damaged} is {words[damage]}"]
    assert shown == {0, 6, 12} - {damaged}
    assert found.others() > undamaged_by_gem.others() - 0.02
    assert found.accuracy[DAMAGED] > undamaged_by_gem.accuracy[DAMAGED] - 0.03


def test_where_every_labelled_section_misleads_fusion_speaks_alone(sample, shown):
    images, truth = sample[0].copy(), sample[1].copy()
    for z in (6, 12):  # what lies between them has no other neighbours
        images[z], truth[z] = np.flip(images[z], 1), np.flip(truth[z], 1)
    by_gem, by_fusion = (completed(images, truth, settings=s) for s in (GEM, FUSION))
    assert len(by_gem.faults()) == 2
    assert shown == {0}
    np.testing.assert_array_equal(by_gem.labels[7:12], by_fusion.labels[7:12])
    assert (by_gem.labels[1:6] != by_fusion.labels[1:6]).any()


def test_gem_stands_brightness_that_drifts_by_a_third(sample, undamaged_by_gem):
    images, truth = sample
    drift = np.random.default_rng(1).uniform(0.7, 1.3, N).astype(np.float32)
    found = completed(images * drift[:, None, None], truth, settings=GEM)
    assert found.faults() == []
    assert np.mean(list(found.accuracy.values())) > np.mean(list(undamaged_by_gem.accuracy.values())) - 0.01


def test_of_a_blank_section_the_network_alone_says_that_it_saw_it(sample):
    images = sample[0].copy()
    images[DAMAGED] = background(images[DAMAGED])
    found = completed(images, sample[1], settings=replace(GEM, method="network", training_steps=2))
    assert found.faults() == [f"Section {DAMAGED} is blank: the network sees it as it is; look at its labels."]
