"""The cases on which scribbles are measured: a volume, its organs, and simulated strokes on some of its sections.

Strokes are simulated from the full label map, with seeds; methods see the image and the strokes alone. Reads
LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from limner.annotations import Scribbles, simulate_scribbles
from limner.io import read, read_labels
from limner.volume import LabelMap, Volume

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data"))
MOUSE_STACK = {"hippocampal formation": 3, "cerebellum": 12}
MOUSE_MRI = {"hippocampus": 1, "cerebellum": 8}  # left; right is 20 more
N_TESTED, N_VALIDATION = 5, 2


@dataclass(frozen=True)
class Case:
    """An organ of a volume.

    Parameters
    ----------
    name, organ : str
        Of the volume and of the organ.
    images : Volume
        Its sections.
    labels : LabelMap
        Every structure, left and right as one.
    label : int
        Of the organ.
    """

    name: str
    organ: str
    images: Volume
    labels: LabelMap
    label: int

    @property
    def truth(self) -> NDArray[np.bool_]:
        """Shape (Z, Y, X)."""
        return self.labels.labels == self.label

    def sections(self, n: int) -> tuple[int, ...]:
        """`n` sections spread evenly over those with the organ: the middles of n equal parts."""
        present = np.flatnonzero(self.truth.any(axis=(1, 2)))
        first, length = present[0], present[-1] + 1 - present[0]
        return tuple(int(first + length * (i + 0.5) / n) for i in range(n))

    def scribbles(self, sections: Sequence[int], seed: int, found: NDArray[np.bool_] | None = None) -> Scribbles:
        """Four or five strokes a class on each of the sections, where something was found where it was missed."""
        labels = None if found is None else np.where(found, self.label, 0)
        marks = simulate_scribbles(self.labels.labels, [self.label], sections, seed, found=labels)
        return Scribbles.from_marks(LabelMap(marks, self.labels.space))


def mouse_stack() -> list[Case]:
    """Hippocampal formation and cerebellum of `stack_stpt_mouse`."""
    folder = DATA / "stack_stpt_mouse"
    images = read(folder / "stpt_native_50x40x40um.nii.gz")
    labels = read_labels(folder / "coarse_native_50x40x40um.nii.gz", images).label_map
    return [Case("stack_stpt_mouse", organ, images, labels, label) for organ, label in MOUSE_STACK.items()]


def mouse_mri(animals: slice) -> list[Case]:
    """Hippocampus and cerebellum of some animals of `mouse_mri`, in the order of their names."""
    cases = []
    for path in sorted((DATA / "mouse_mri" / "images").iterdir())[animals]:
        images = read(path)
        labels = read_labels(DATA / "mouse_mri" / "labels" / path.name, images).label_map
        merged = LabelMap(np.where(labels.labels > 20, labels.labels - 20, labels.labels), labels.space)
        name = path.name.removesuffix(".nii.gz")
        cases += [Case(name, organ, images, merged, label) for organ, label in MOUSE_MRI.items()]
    return cases


def scores(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Mapping[str, float]:
    """Precision, recall, F1 and IoU over the volume."""
    both, either = int((found & truth).sum()), int((found | truth).sum())
    return {
        "precision": both / max(int(found.sum()), 1),
        "recall": both / max(int(truth.sum()), 1),
        "f1": 2 * both / max(int(found.sum() + truth.sum()), 1),
        "iou": both / max(either, 1),
    }
