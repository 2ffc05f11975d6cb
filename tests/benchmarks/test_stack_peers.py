"""Fusion as the peers of stack completion do it, against Limner's."""

import numpy as np
import torch

from limner import distances as limner_distances
from limner.label_fusion import atlas_log_weights, fuse
from stack_peers import CLIP_MM, Stack, blend, distances, filled, mixture, signed_distance

PLANE = (0.04, 0.04)


def sections() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    maps = np.zeros((2, 30, 40), np.uint8)
    maps[0, 5:20, 4:30], maps[0, 8:12, 10:20] = 3, 7
    maps[1, 8:25, 6:28], maps[1, 20:24, 10:30] = 3, 9
    levels = draw.uniform(0, 255, (2, 30, 40)).astype(np.float32)
    return list(maps), levels, draw.uniform(0, 255, (30, 40)).astype(np.float32)


def test_distances_are_limners() -> None:
    mask = sections()[0][0] == 3
    expected = limner_distances.signed_distance(mask, PLANE, CLIP_MM)
    assert np.allclose(signed_distance(mask, PLANE), expected, atol=1e-6)
    assert (signed_distance(np.zeros((3, 3), bool), PLANE) == -CLIP_MM).all()


def test_mixture_is_the_printed_equation_and_its_normalised_form() -> None:
    maps, levels, section = sections()
    structures, found = distances(maps, PLANE)
    assert structures.tolist() == [0, 3, 7, 9]
    gaps = np.array([0.1, 0.4])
    weights = atlas_log_weights(torch.from_numpy(section)[None], torch.from_numpy(levels)[:, None], torch.tensor(gaps))
    covered = torch.ones(2, 30, 40, dtype=torch.bool)
    evidence = {}
    for printed in (True, False):
        expected = fuse(torch.from_numpy(found), weights, covered, 21.0, printed=printed).numpy()
        got = mixture(found, levels, section, gaps, normalised=not printed)
        evidence[printed] = got - np.logaddexp.reduce(got, axis=0)
        assert np.allclose(evidence[printed], expected, atol=1e-4)
    assert not np.allclose(evidence[True], evidence[False], atol=0.1)


def test_blending_gives_the_nearer_section_more() -> None:
    found = np.stack([np.full((1, 2, 2), 1.0), np.full((1, 2, 2), -1.0)])
    assert np.allclose(blend(found, np.array([0.1, 0.3])), 0.5)
    assert np.allclose(blend(found[:1], np.array([0.1])), 1.0)


def test_neighbours_are_the_sections_around() -> None:
    arrays = {"levels": np.zeros((9, 2, 2)), "labels": np.zeros((9, 2, 2)), "spacing": np.array([0.05, 0.04, 0.04])}
    stack = Stack({**arrays, "labelled": np.array([0, 4, 8])})
    assert stack.neighbours(3) == [0, 4]
    assert stack.neighbours(4) == [0, 8]
    assert np.allclose(stack.gaps_mm(3, [0, 4]), [0.15, 0.05])


def test_what_nothing_reached_takes_the_nearest_in_mm() -> None:
    section = np.zeros((3, 5), np.int16)
    section[0, 0], section[2, 4] = 7, 2
    assert filled(section, (1.0, 1.0))[:, 1].tolist() == [7, 7, 7]
    assert filled(section, (10.0, 1.0))[::2].tolist() == [[7] * 5, [2] * 5]
    assert filled(section, (0.1, 10.0))[:, 1].tolist() == [7, 7, 7]
    assert (filled(0 * section, (1.0, 1.0)) == 0).all()
