"""Incomplete annotations, each as targets and weights in [0, 1] (weight 0: unknown)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.volume import LabelMap


@dataclass(frozen=True)
class SectionLabels:
    """A stack of which some sections are labelled completely and the others not at all.

    Parameters
    ----------
    label_map : LabelMap
        Labels over the whole stack, shape (Z, Y, X); what stands on unlabelled sections is ignored.
    labelled : tuple of int
        Indices of the labelled sections, increasing. On these 0 means background; elsewhere nothing is known.

    Raises
    ------
    ValueError
        If no section is labelled, or an index lies outside the stack.
    """

    label_map: LabelMap
    labelled: tuple[int, ...]

    def __post_init__(self) -> None:
        n_sections = self.label_map.space.shape[0]
        if not self.labelled:
            raise ValueError("SectionLabels(): no section is labelled; label at least one")
        outside = [i for i in self.labelled if not 0 <= i < n_sections]
        if outside:
            raise ValueError(
                f"SectionLabels(): section {outside[0]} is named as labelled, but the stack has sections 0 to "
                f"{n_sections - 1}"
            )
        object.__setattr__(self, "labelled", tuple(sorted(set(self.labelled))))

    @classmethod
    def from_label_map(cls, label_map: LabelMap, labelled: Sequence[int] | None = None) -> SectionLabels:
        """Take the sections named in `labelled`, or where that is None every section that holds any label."""
        if labelled is None:
            labelled = np.flatnonzero((label_map.labels > 0).any(axis=(1, 2))).tolist()
        return cls(label_map, tuple(labelled))

    @property
    def unlabelled(self) -> tuple[int, ...]:
        """Indices of the sections without labels, increasing."""
        known = set(self.labelled)
        return tuple(i for i in range(self.label_map.space.shape[0]) if i not in known)

    @property
    def weights(self) -> NDArray[np.float32]:
        """Weight of each section, shape (Z,): 1 where labelled, 0 where unknown."""
        weights = np.zeros(self.label_map.space.shape[0], dtype=np.float32)
        weights[list(self.labelled)] = 1.0
        return weights


def simulate_partial(labels: NDArray[np.integer[Any]], fraction: float, seed: int) -> NDArray[np.integer[Any]]:
    """Keep a random share of the objects of a fully labelled image, as if the others had not been annotated.

    Parameters
    ----------
    labels : ndarray of int
        Instance labels, shape (Y, X) or any other; 0 is background.
    fraction : float
        Share of the objects to keep, in (0, 1]; of n objects the nearest whole number is kept, one at least.
    seed : int
        Of the draw. The draws are nested: what is kept at 0.1 is kept at 0.25 too, given the same seed.

    Returns
    -------
    ndarray of int
        Same shape, type and ids; the dropped objects are 0. All 0 where `labels` is.

    Raises
    ------
    ValueError
        If `fraction` lies outside (0, 1].

    Examples
    --------
    >>> simulate_partial(np.array([[1, 1, 0, 2, 0, 5, 7]]), fraction=0.5, seed=0)
    array([[1, 1, 0, 0, 0, 5, 0]])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"simulate_partial(): fraction is {fraction}; give a number over 0, at most 1")
    ids = np.unique(labels[labels > 0])
    order = np.random.default_rng(seed).permutation(ids)
    kept = order[: max(1, int(fraction * len(ids) + 0.5))]
    return np.where(np.isin(labels, kept), labels, labels.dtype.type(0))
