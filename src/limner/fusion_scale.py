"""How sure fusion may be of its borders: the scale rho, fitted on labelled sections that are left out in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from limner.calibration import best_scale, mean_log_loss
from limner.label_fusion import blend
from limner.section_fusion import PAPER_RHO, SectionFusion

SAMPLED = 2**18  # pixels times structures of a section on which rho is fitted, about


def as_indices(fusion: SectionFusion, z: int, structures: Sequence[int]) -> Tensor:
    """The labels of a labelled section as indices into `structures`, (Y, X); -1 where the label is none of them."""
    known, labels = np.asarray(structures), fusion.labels[z]
    order = np.argsort(known)
    index = order[np.searchsorted(known, labels, sorter=order).clip(max=len(known) - 1)]
    return torch.from_numpy(np.where(known[index] == labels, index, -1)).to(fusion.device)


def sample(fusion: SectionFusion, z: int, structures: Sequence[int], most: int = 4000) -> tuple[Tensor, Tensor]:
    """Pixels of a labelled section within `clip_mm` of its structures, for fitting scales.

    Parameters
    ----------
    fusion : SectionFusion
    z : int
        The labelled section.
    structures : sequence of int
        Background among them; pixels of other labels are left out.
    most : int
        Under twice as many pixels are taken, evenly.

    Returns
    -------
    pixels, truth : Tensor of int
        Flat indices into (Y, X) and indices into `structures`, each of shape (N,).
    """
    truth = as_indices(fusion, z, structures).flatten()
    background = structures.index(0)
    known = fusion.distances(z)
    near = truth >= 0
    if 0 in known.structures:
        near = known.of_structure(0).flatten() < fusion.options.clip_mm
    usable = torch.nonzero((truth >= 0) & (near | (truth != background)))[:, 0]
    usable = usable[:: max(1, len(usable) // most)]
    return usable, truth[usable]


def fitted_rho(fusion: SectionFusion) -> tuple[float, list[float]]:
    """The rho_scale with the lowest log loss on labelled sections, each left out in turn.

    A border that wandered like a Brownian motion is unsure by `SectionFusion.spread`, so rho of a section is rho_scale
    over that. With one labelled section the paper's rho is taken.

    Returns
    -------
    scale : float
        LogOdds per mm, times sqrt(mm).
    losses : list of float
        Log loss of each section left out; none where the scale could not be fitted.
    """
    samples = []
    for z in fusion.labelled if len(fusion.labelled) > 1 else ():
        structures = fusion.structures(z, left_out=z)
        pixels, truth = sample(fusion, z, structures, most=max(1, min(4000, SAMPLED // len(structures))))
        samples.append((*fusion.blended_at(z, z, pixels), truth, fusion.spread(z, left_out=z)))
    samples = [s for s in samples if len(s[2])]
    if not samples:
        return PAPER_RHO * fusion.typical_spread(), []

    one = torch.ones(1, device=fusion.device)  # what was blended already stands for a single atlas

    def losses(scale: float) -> list[float]:
        return [
            mean_log_loss(blend(d[None, ..., None], one, c[None, :, None], scale / s)[..., 0], t)
            for d, c, t, s in samples
        ]

    best = best_scale(lambda scale: sum(losses(scale)) / len(samples), 0.1, 100.0)
    return best, losses(best)
